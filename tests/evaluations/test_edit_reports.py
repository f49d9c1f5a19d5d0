"""Measured editing: baselines and scores against closed forms, the report of a folder of results, the page."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cm.commands.cli import parse
from cm.commands.edit import run_image_edit
from cm.commands.edit_inputs import InputFiles
from cm.config.scripts import EditConfig, configure, resolved
from cm.data.images import to_uint8
from cm.data.prepare import prepare
from cm.errors import UserError
from cm.models.pretrained import load_pretrained
from cm.objectives.lpips import import_piq
from evaluations.reports import edit_page, edit_report
from evaluations.reports.edit_report import bicubic, grey, make_metrics, mean_fill, measure, table
from tests.helpers.lpips_files import write_small_files
from tests.helpers.models import save_consistency_model

SIDE = 8


@pytest.fixture
def truth(tmp_path):
    """Two grey images, each of one value but for one pixel in the middle."""
    folder = tmp_path / "truth"
    folder.mkdir()
    for name, value in (("a", 100), ("b", 50)):
        pixels = np.full((SIDE, SIDE), value, np.uint8)
        pixels[3, 3] = 220
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def _write_results(folder, truth, errors, **flags):
    """Results of an editing run: result k of each image is the truth plus errors[k] everywhere."""
    folder.mkdir()
    config = configure(
        EditConfig, input=str(truth), image_size=SIDE, in_channels=1, num_results=len(errors), **flags
    )
    images = {}
    for path in sorted(truth.iterdir()):
        names = [f"{path.stem}_{k:03d}.png" for k in range(len(errors))]
        for name, error in zip(names, errors):
            pixels = np.asarray(Image.open(path)).astype(int) + error
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
        images[str(path)] = names
    (folder / "edit.json").write_text(json.dumps({"config": resolved(config), "images": images}))
    return folder


def _psnr(error):
    return 20 * math.log10(255 / error)


# ---- baselines --------------------------------------------------------------------------------


def test_mean_fill_keeps_what_is_known_and_fills_each_channel():
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0], images[1, 2] = 0.5, -0.25
    images[:, :, 1:3, 1:3] = 9.0  # unknown to it
    filled = mean_fill(images, configure(EditConfig, mask="center:0.5"))
    assert filled[0, 0].unique().tolist() == [0.5]
    assert filled[1, 2].unique().tolist() == [-0.25]
    assert not filled[0, 1:].any()
    images[0, 0, 0, 0] = 1.7  # one of twelve known pixels
    assert mean_fill(images, configure(EditConfig, mask="center:0.5"))[0, 0, 1, 1] == pytest.approx(
        0.5 + 1.2 / 12
    )
    nothing_known = mean_fill(images, configure(EditConfig, mask="box:0,0,4,4"))
    assert not nothing_known.any()


def test_grey_is_the_luma():
    image = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 2, 2)
    assert grey(image, configure(EditConfig))[0, :, 0, 0].tolist() == pytest.approx(
        [2 * 0.2989 - 1] * 3, abs=1e-3
    )


def test_bicubic_enlarges_the_patch_means():
    ramp = torch.linspace(-1, 1, 16).expand(1, 1, 16, 16)
    out = bicubic(ramp, configure(EditConfig, task="superres", factor=2))
    assert out.shape == ramp.shape
    assert torch.allclose(out[..., 4:-4], ramp[..., 4:-4], atol=0.02)  # a plane, away from the border
    checks = (torch.arange(16) % 2 * 2.0 - 1).expand(1, 1, 16, 16)
    assert torch.allclose(
        bicubic(checks, configure(EditConfig, task="superres", factor=2)),
        torch.zeros(1, 1, 16, 16),
        atol=1e-6,
    )


# ---- scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "window"), [(8, 3), (12, 5), (16, 7), (64, 7)])
def test_metrics(size, window):
    metrics = make_metrics(size)
    assert list(metrics) == ["psnr", "ssim"]
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 1, size, size, generator=generator)
    b = torch.stack([a[0], a[1] + 0.1, torch.rand(1, size, size, generator=generator)]).clamp(0, 1)
    psnr, ssim = metrics["psnr"](b, a), metrics["ssim"](b, a)
    assert psnr[1] == pytest.approx(-10 * math.log10(float((b[1] - a[1]).square().mean())), abs=1e-3)
    assert ssim[0] == pytest.approx(1, abs=1e-5)
    assert ssim[1] > 0.5 > ssim[2]
    expected = import_piq().ssim(b, a, kernel_size=window, data_range=1.0, reduction="none")
    assert torch.equal(ssim, expected)


def test_lpips_where_its_weights_are(tmp_path):
    write_small_files(tmp_path)
    lpips = make_metrics(16, str(tmp_path))["lpips"]
    a = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    distance = lpips(torch.stack([a[0], 1 - a[1]]), a)
    assert distance[0] == 0
    assert distance[1] > 0.01


def test_measure(truth, tmp_path):
    """Errors of known size: one result, their mean, and the baseline of a single missing pixel."""
    folder = _write_results(tmp_path / "r", truth, [10, -20], task="inpaint", mask="box:3,3,1,1")
    result = measure(folder)
    assert (result.task, result.images) == ("inpaint box:3,3,1,1", 2)
    baseline, one, mean = result.methods.values()
    assert list(result.methods) == ["mean of the known pixels", "one result", "mean of 2 results"]
    assert one["psnr"] == pytest.approx((_psnr(10) + _psnr(20)) / 2, abs=1e-3)
    assert mean["psnr"] == pytest.approx(_psnr(5), abs=1e-3)
    filled = [_psnr(abs(220 - value) / SIDE) for value in (100, 50)]  # one pixel of 64 is wrong
    assert baseline["psnr"] == pytest.approx(sum(filled) / 2, abs=0.1)  # it is written with 8 bits
    assert baseline["ssim"] < mean["ssim"]
    lines = table([result, replace(result, task="again")]).splitlines()
    assert len(lines) == 2 + 6
    assert lines[2] == (
        f"| inpaint box:3,3,1,1 | 2 | mean of the known pixels | {baseline['psnr']:.2f} | {baseline['ssim']:.3f} |"
    )
    assert lines[3].startswith("|  |  | one result |")
    assert lines[5].startswith("| again |")


def test_one_result_has_no_mean(truth, tmp_path):
    folder = _write_results(tmp_path / "r", truth, [10], task="superres", factor=4)
    assert list(measure(folder).methods) == ["bicubic", "one result"]
    (folder / "a_000.png").unlink()
    with pytest.raises(UserError, match=r"a_000\.png is missing"):
        measure(folder)


def test_folders_that_cannot_be_measured(truth, tmp_path):
    with pytest.raises(UserError, match="not a folder of image_edit's results"):
        measure(tmp_path)
    (tmp_path / "edit.json").write_text('{"config": {"no_such_flag": 1}}')
    with pytest.raises(UserError, match=r"not a folder of image_edit's results.*no_such_flag"):
        measure(tmp_path)
    with pytest.raises(UserError, match="stroke has no truth"):
        measure(_write_results(tmp_path / "s", truth, [1], task="stroke"))
    folder = _write_results(tmp_path / "i", truth, [1])
    truth.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"--input .* no such file or folder"):
        measure(folder)
    small = tmp_path / "small"
    small.mkdir()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(small / "x.png")
    folder = _write_results(tmp_path / "low", small, [1], task="superres", factor=4)
    with pytest.raises(UserError, match="there is no truth for x"):
        measure(folder)


# ---- with a model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "rgb.pt"
    save_consistency_model(path, class_cond=True, num_classes=10)
    return path


@pytest.fixture(scope="module")
def colour_digits(tmp_path_factory):
    pytest.importorskip("sklearn")
    path = tmp_path_factory.mktemp("data") / "test"
    prepare("digits_rgb", str(path), image_size=SIDE, split="test", limit=12)
    return path


def test_report_of_a_real_run(model, colour_digits, tmp_path, monkeypatch):
    """A prepared set is the input, brings its labels, and is the truth."""
    flags = ["--model_path", str(model), "--input", str(colour_digits), "--num_results", "2"]
    folder = tmp_path / "r"
    run_image_edit(
        parse(EditConfig, ["--task", "colorize", *flags, "--out_dir", str(folder), "--ts", "0,9,17"])
    )
    monkeypatch.setattr("sys.argv", ["x", str(folder), "--out", str(tmp_path / "report.md")])
    edit_report.main()
    assert (tmp_path / "report.md").read_text().startswith("| task | images | method |")
    numbers = json.loads((tmp_path / "report.json").read_text())[str(folder)]
    assert numbers["images"] == 12
    assert 5 < numbers["grey"]["psnr"] < 40
    assert numbers["mean of 2 results"]["psnr"] > numbers["one result"]["psnr"]


def test_results_of_a_model_whose_classes_were_the_folders_names(truth, tmp_path):
    folder = _write_results(tmp_path / "edited", truth, [10], task="inpaint", class_cond=True, num_classes=3)
    assert measure(folder).methods["one result"]["psnr"] == pytest.approx(_psnr(10), abs=1e-4)


def test_page(model, colour_digits, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", str(model), str(colour_digits), str(tmp_path / "page.png")])
    edit_page.main()
    first = (tmp_path / "page.png").read_bytes()
    edit_page.main()
    assert (tmp_path / "page.png").read_bytes() == first


def test_what_is_on_the_page(model, colour_digits):
    loaded = load_pretrained(parse(EditConfig, ["--model_path", str(model), "--input", str(colour_digits)]))
    inputs = list(InputFiles(loaded.config).load(range(12)))
    page = list(edit_page.blocks(loaded, inputs))
    assert [[group.shape[:2] for group in block.groups] for block in page] == [
        *[[(1, 6)] * 3] * 4,  # with colourisation
        [(1, 3)] * 6,
        [(1, 6)] * 3,
        [(1, 19)],
    ]
    truth = to_uint8(inputs[0].image[None])[0]
    assert np.array_equal(page[0].groups[0][0, -1], truth)
    grey_input = page[0].groups[0][0, 0]
    assert (grey_input == grey_input[..., :1]).all() and not (truth == truth[..., :1]).all()


def test_strokes_are_crude(colour_digits):
    config = configure(EditConfig, input=str(colour_digits), image_size=SIDE, in_channels=3)
    item = next(InputFiles(config).load(range(1)))
    crude = edit_page.as_strokes(item)
    colours = {tuple(p) for p in crude.image.flatten(1).T.tolist()}
    assert len(colours) <= 6
    assert crude.image.shape == item.image.shape
    assert crude.key != item.key
    assert not crude.truth
    assert not torch.equal(crude.image, item.image)
