"""The library from Python: train, load, sample, denoise, edit, convert, evaluate; and the tutorial."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cm
from cm.commands.cli import parse, parse_config
from cm.commands.sample import run_image_sample
from cm.config.scripts import SampleConfig
from cm.data.images import from_uint8, to_uint8
from cm.errors import UserError
from evaluations.evaluator import Options, evaluate
from evaluations.features import load_features
from evaluations.npz_io import open_images, open_reference
from evaluations.protocols import PROTOCOLS
from tests.helpers.eval_files import write_classifier, write_npz
from tests.helpers.notebook import TUTORIAL, cells_of, notebook_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
    for name in ("bag", "shoe"):
        (folder / "data" / name).mkdir(parents=True)
    from PIL import Image

    for i, image in enumerate(pixels):
        Image.fromarray(image[..., 0]).save(folder / "data" / ("bag", "shoe")[i % 2] / f"{i}.png")
    common = {"total_training_steps": 2, "num_workers": 0, "preview_count": 0, "num_channels": 32}
    teacher = cm.train(str(folder / "data"), out_dir=str(folder / "teacher"), **common)
    student = cm.train(
        str(folder / "data"), teacher=str(folder / "teacher"), out_dir=str(folder / "cd"), **common
    )
    return folder, teacher, student


def test_models_know_what_they_are(runs):
    _, teacher, student = runs
    assert teacher.class_names == student.class_names == ("bag", "shoe")
    assert not teacher.is_consistency and student.is_consistency
    assert student.image_shape == (1, 8, 8) and student.config.num_channels == 32
    assert isinstance(student.network, torch.nn.Module)
    assert "consistency_distillation, 1 x 8 x 8, 2 classes" in repr(student)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_samples_are_those_of_the_command(runs, steps, tmp_path):
    folder, _, student = runs
    images = student.sample(5, classes=["shoe", 0], steps=steps, seed=3)
    assert images.shape == (5, 1, 8, 8) and images.abs().max() <= 1
    flags = {0: ["--sampler", "onestep"], 1: ["--sampler", "onestep"], 2: ["--sampler", "multistep"]}
    extra = flags.get(steps, ["--sampler", "multistep", "--ts", "0,4,8,13,17"])
    argv = ["--model_path", str(folder / "cd"), "--num_samples", "5", "--classes", "shoe,bag", "--seed", "3"]
    run_image_sample(parse_config(SampleConfig, [*argv, *extra, "--out_dir", str(tmp_path)]))
    drawn = np.load(tmp_path / "samples_5x8x8x1.npz")
    assert (drawn["arr_0"] == to_uint8(images).numpy()).all() and drawn["arr_1"].tolist() == [1, 0, 1, 0, 1]


def test_a_dry_run_of_sampling_shows_what_the_model_says(runs, capsys):
    argv = ["--model_path", str(runs[0] / "cd"), "--sampler", "multistep", "--dry_run", "True"]
    with pytest.raises(SystemExit):
        parse(SampleConfig, argv)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["image_size"], shown["steps"], shown["ts"]) == (8, 18, "0,10,17")


def test_samples_do_not_depend_on_the_batch(runs):
    _, teacher, _ = runs
    whole = teacher.sample(3, classes="bag", steps=3, sampler="heun")
    torch.testing.assert_close(whole, teacher.sample(3, classes=0, steps=3, batch_size=2), atol=1e-5, rtol=0)
    pictures = teacher.sample(2, steps=2, output="pil")
    assert [p.size for p in pictures] == [(8, 8)] * 2


def test_metrics_are_those_of_the_evaluator(tmp_path):
    judge = f"classifier={write_classifier(tmp_path / 'judge.pt')}"
    known, drawn = (str(write_npz(tmp_path / f"{n}.npz", 60, seed=i)) for i, n in enumerate(("ref", "drawn")))
    asked = {"features": judge, "metrics": "fid,inception_score", "batch_size": 16}
    found = cm.evaluate(drawn, known, **asked)
    options = Options(PROTOCOLS["classifier"], ("fid", "inception_score"), batch_size=16)
    network = load_features(judge, "classifier", torch.device("cpu"))
    expected = evaluate(open_reference(known), [open_images(drawn)], network, options)["metrics"]
    assert found == expected and set(found) == {"fid", "inception_score"}
    images = from_uint8(np.load(drawn)["arr_0"]) + 1e-4  # quantisation truncates
    assert cm.evaluate(images, known, **asked) == pytest.approx(expected)
    assert cm.evaluate(known, known, **asked)["fid"] < 1e-6 < found["fid"]


def test_a_mistake_in_what_is_evaluated_is_known_before_a_network_is_made(tmp_path, monkeypatch):
    known = str(write_npz(tmp_path / "ref.npz", 20))
    monkeypatch.setattr("evaluations.evaluator.measuring", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(TypeError, match="no option batchsize: batch_size"):
        cm.evaluate(known, known, batchsize=4)
    with pytest.raises(UserError, match="did you mean fid"):
        cm.evaluate(known, known, metrics="fidd")
    with pytest.raises(UserError, match=r"none\.npz"):
        cm.evaluate([known, str(tmp_path / "none.npz")], known)


def test_edits_of_a_model_that_is_not_finite_are_refused(runs):
    _, _, student = runs
    broken = copy.deepcopy(student)
    for p in broken.network.parameters():
        p.data.fill_(torch.nan)
    with pytest.raises(UserError, match="image 0: the model's output at noise level 80 is not finite"):
        broken.edit.superres(torch.zeros(1, 2, 2), 4, classes=0)


def test_denoise(runs):
    _, _, student = runs
    x = torch.randn(2, 1, 8, 8)
    together = student.denoise(x, 1.0, ["bag", "shoe"])
    apart = student.denoise(x[1:], torch.tensor([1.0]), 1)
    torch.testing.assert_close(together[1:], apart, atol=1e-5, rtol=0)
    # The boundary condition: the identity at sigma_min
    torch.testing.assert_close(student.denoise(x, 0.002, 0, clip=False), x)


def test_editing(runs):
    _, teacher, student = runs
    image, mask = torch.rand(1, 8, 8) * 2 - 1, torch.zeros(8, 8)
    mask[:, 4:] = 1
    result = student.edit.inpaint(image, mask, classes="bag")
    torch.testing.assert_close(result[0, :, :, :4], image[:, :, :4])
    assert (result[0, :, :, 4:] != image[:, :, 4:]).any()
    small = torch.rand(2, 1, 4, 4) * 2 - 1
    large = student.edit.superres(small, 2, classes=[0, 1])
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(large, 2), small, atol=0.3, rtol=0)
    frames = student.edit.interpolate(1, 2, frames=3, classes=0)
    ends = [student.sample(1, classes=0, seed=seed) for seed in (1, 2)]
    torch.testing.assert_close(frames[[0, 2]], torch.cat(ends), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="needs a consistency model"):
        teacher.edit.inpaint(image, mask, classes=0)


def test_arrays_and_whole_numbers_of_numpy_are_taken(runs):
    _, _, student = runs
    labels = np.array([1, 0])
    images = student.sample(np.int64(2), classes=labels, steps=np.int32(1))
    torch.testing.assert_close(images, student.sample(2, classes=torch.tensor([1, 0]), steps=1))
    known = student.denoise(images.numpy(), 1.0, labels)
    torch.testing.assert_close(known, student.denoise(images, 1.0, [1, 0]))
    mask = np.zeros((2, 8, 8), bool)
    mask[1, :, 4:] = True  # one for each image
    edited = student.edit.inpaint(images.numpy(), mask, classes=labels)
    torch.testing.assert_close(edited[0], images[0], atol=1e-5, rtol=0)
    assert (edited[1, :, :, 4:] != images[1, :, :, 4:]).any()


def test_an_option_that_the_sampler_does_not_have_is_named(runs):
    with pytest.raises(TypeError, match="sampler heun has no option s_chrn; did you mean s_churn"):
        runs[1].sample(1, classes=0, s_chrn=1.0)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda m: m.denoise(torch.zeros(1, 3, 8, 8), 1.0, 0),
            r"\(1, 3, 8, 8\), the model takes \(n, 1, 8, 8\)",
        ),
        (
            lambda m: m.denoise(torch.zeros(2, 1, 8, 8), torch.ones(3), 0),
            r"\(3,\), the images \(2, 1, 8, 8\)",
        ),
        (lambda m: m.denoise(torch.zeros(3, 1, 8, 8), 1.0, [0, 1]), "2 classes for 3 images"),
        (lambda m: m.denoise(torch.zeros(3, 1, 8, 8), 1.0), "give classes"),
        (lambda m: m.edit.inpaint(torch.zeros(1, 8, 8), torch.zeros(4, 4)), r"\(4, 4\) for images of 8 x 8"),
        (lambda m: m.edit.inpaint(torch.zeros(1, 9, 9), torch.zeros(8, 8)), r"\(1, 1, 9, 9\)"),
        (lambda m: m.edit.superres(torch.zeros(1, 8, 8), 3), "factor of 3"),
        (lambda m: m.sample(1, classes="shoes"), "did you mean"),
        (lambda m: m.denoise(torch.zeros(3, 1, 8, 8), 0.0, 0), "sigma must be above 0 and finite, got 0.0"),
        (
            lambda m: m.denoise(torch.zeros(3, 1, 8, 8), torch.tensor([1, 2, np.nan]), 0),
            "sigma must be above 0",
        ),
        (lambda m: m.edit.superres(torch.zeros(1, 8, 8), 0), "factor of 0"),
        (lambda m: m.edit.colorize(torch.zeros(2, 8, 8)), r"\(2, 8, 8\), colorize takes"),
        (lambda m: m.edit.colorize(torch.zeros(8, 8)), r"\(8, 8\), colorize takes"),
        (lambda m: m.edit.interpolate(1, 2, frames=1), "frames must be 2 or more, got 1"),
        (lambda m: m.sample(-1), "n must be a whole number from 0 up, got -1"),
        (lambda m: m.sample("two"), "n must be a whole number from 0 up, got 'two'"),
        (lambda m: m.sample(1, batch_size=0), "batch_size must be a whole number from 1 up"),
        (lambda m: m.sample(1, seed="a"), "seed must be of type int, got 'a'"),
        (lambda m: m.sample(1, steps=1.0), "steps must be a whole number from 0 up, got 1.0"),
        (
            lambda m: m.denoise(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 1.0, 0),
            "x are torch.uint8, expected floats",
        ),
        (lambda m: m.denoise(None, 1.0, 0), "x must be a tensor, got NoneType"),
        (
            lambda m: m.edit.inpaint(torch.full((1, 8, 8), 200.0), torch.zeros(8, 8)),
            r"200 to 200, expected \[-1, 1\]",
        ),
        (lambda m: m.edit.inpaint(torch.zeros(1, 8, 8), torch.full((8, 8), 255)), "a mask is 0 or 1.*255"),
        (lambda m: m.edit.superres(torch.zeros(1, 8, 8), 2.0), "factor must be a whole number.*got 2.0"),
        (lambda m: m.edit.colorize(torch.zeros(1, 8, 8)), "colorize needs a model of colour images"),
        (lambda m: m.edit.interpolate("a", 2), "first must be a whole number from 0 up, got 'a'"),
        (lambda m: cm.evaluate(torch.zeros(4, 8, 8), "r"), r"samples of shape \(4, 8, 8\)"),
        (lambda m: m.sample(1, output="png"), "'tensor' or 'pil'"),
        (lambda m: m.sample(1, steps=40), "18 points"),
        (lambda m: m.push("x", to="tensorflow"), "diffusers"),
    ],
)
def test_what_does_not_fit_is_a_value_error_with_both_sides(runs, call, message):
    with pytest.raises(ValueError, match=message):
        call(runs[2])


@pytest.mark.parametrize("to", ["cm", "safetensors"])
def test_a_pushed_model_is_the_same_model(runs, to, tmp_path):
    if to == "safetensors":
        pytest.importorskip("safetensors")
    _, _, student = runs
    again = cm.load(student.push(str(tmp_path / f"m.{to}"), to=to))
    assert again.class_names == student.class_names
    assert torch.equal(again.sample(2, classes=1, seed=5), student.sample(2, classes=1, seed=5))


def test_import_costs_nothing():
    code = "import cm, sys; assert 'torch' not in sys.modules and 'load' in dir(cm) and 'cm.api' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        cm.laod  # noqa: B018


def test_the_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = TUTORIAL.read_text()
    short = source.replace('"total_training_steps": 400', '"total_training_steps": 2')
    assert short != source
    kinds = [
        [kind for o in cell["outputs"] for kind in o.get("data", o)] for cell in code_of(notebook_of(short))
    ]
    assert (
        kinds[0] == kinds[1] == []
        and "text/plain" in kinds[2]
        and [k[0] for k in kinds[-2:]] == ["image/png"] * 2
    )
    assert (tmp_path / "runs/tutorial/samples.png").exists()


def test_the_notebook_is_the_tutorial_with_its_outputs():
    path = TUTORIAL.with_suffix(".ipynb")
    stored = json.loads(path.read_text())
    without = [{**cell, "outputs": [], "execution_count": None} for cell in code_of(stored)]
    assert without == code_of({"cells": cells_of(TUTORIAL.read_text())}), "python -m tests.helpers.notebook"
    assert path.stat().st_size < 400_000
    assert [cell["outputs"][-1]["data"].keys() for cell in code_of(stored)[-2:]] == [
        {"image/png", "text/plain"}
    ] * 2


def code_of(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
