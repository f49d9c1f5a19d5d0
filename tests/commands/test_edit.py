"""image_edit: every task on a tiny model, what is known stays, bad input is one line, ranks do not matter."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cm.commands.cli import parse
from cm.commands.edit import noise_levels, run_image_edit
from cm.commands.edit_inputs import InputFiles, result_stems
from cm.commands.interpolate import corner_noise, path_between
from cm.commands.masks import known_mask
from cm.commands.paste import paste_back
from cm.config.scripts import EditConfig, configure
from cm.data.images import from_uint8, to_uint8
from cm.errors import UserError
from cm.runtime import distributed, logger
from cm.sampling.editing import luma
from cm.sampling.noise import IndexedGenerator
from cm.storage.weights import load_weights, save_weights
from tests.helpers.models import save_consistency_model
from tests.helpers.mp import launch, run_ranks

SIDE = 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_consistency_model(folder / "rgb.pt")
    save_consistency_model(
        folder / "grey.pt", in_channels=1, class_cond=True, num_classes=4, class_names=tuple("abcd")
    )
    save_consistency_model(folder / "edm.pt", training_mode="progdist", scale_mode="progdist", start_scales=4)
    return folder


@pytest.fixture
def images(tmp_path):
    """Three colour images."""
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(rng.integers(60, 200, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def _run(models, out, task, *flags, model="rgb.pt"):
    argv = ["--task", task, "--model_path", str(models / model), "--out_dir", str(out), *map(str, flags)]
    run_image_edit(parse(EditConfig, argv))
    return json.loads((out / "edit.json").read_text())


def _pixels(path):
    return np.asarray(Image.open(path))


def _float(path):
    return from_uint8(_pixels(path)[None])[0]


def test_inpaint_keeps_what_is_known(models, images, tmp_path):
    meta = _run(models, tmp_path / "out", "inpaint", "--input", images, "--mask", "left", "--num_results", 2)
    known = known_mask("left", SIDE, SIDE).bool().numpy()
    truth = _pixels(images / "b.png").astype(int)
    results = [_pixels(tmp_path / "out" / f"b_00{i}.png").astype(int) for i in range(2)]
    for result in results:
        assert np.abs(result - truth)[known].max() <= 1  # uint8 truncates
        assert np.abs(result - truth)[~known].max() > 20
    assert (results[0] != results[1]).any()
    assert list(meta["images"]) == [str(images / f"{n}.png") for n in "abc"]
    assert meta["images"][str(images / "b.png")] == ["b_000.png", "b_001.png"]
    assert len(meta["sigmas"]) == 18
    assert meta["sigmas"][0] == 80
    assert meta["config"]["mask"] == "left"
    grid = Image.open(tmp_path / "out" / "grid.png")
    assert grid.size == (4 * 66 + 2, 3 * 66 + 2 + 16)  # input | 2 results | truth


def test_superres_keeps_patch_means_of_full_and_small_inputs(models, images, tmp_path):
    _run(models, tmp_path / "full", "superres", "--input", images / "a.png", "--factor", 4)
    means = torch.nn.functional.avg_pool2d(_float(images / "a.png"), 4)
    result = _float(tmp_path / "full" / "a_000.png")
    saturated = (result.abs() > 0.99).any()
    assert saturated or torch.allclose(torch.nn.functional.avg_pool2d(result, 4), means, atol=0.02)
    small = Image.fromarray(np.full((2, 2, 3), 128, dtype=np.uint8))
    small.save(tmp_path / "small.png")
    _run(models, tmp_path / "low", "superres", "--input", tmp_path / "small.png", "--factor", 4)
    assert _pixels(tmp_path / "low" / "small_000.png").shape == (SIDE, SIDE, 3)
    assert Image.open(tmp_path / "low" / "grid.png").size == (2 * 66 + 2, 66 + 2 + 16)  # there is no truth


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_colorize_takes_colour_and_grey(models, images, tmp_path, mode):
    Image.open(images / "a.png").convert(mode).save(tmp_path / "x.png")
    _run(models, tmp_path / "out", "colorize", "--input", tmp_path / "x.png", "--ts", "0,9,17")
    columns = 3 if mode == "RGB" else 2
    assert Image.open(tmp_path / "out" / "grid.png").size == (columns * 66 + 2, 66 + 2 + 16)
    result = _pixels(tmp_path / "out" / "x_000.png").astype(float)
    luma = np.asarray(Image.open(images / "a.png").convert("L")).astype(float)
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        shown = np.asarray(grid)[2 + 16 : 2 + 16 + 64 : 8, 2 : 2 + 64 : 8].astype(float)  # the first tile
    assert np.abs(shown - luma[..., None]).max() <= 2  # the input is shown grey
    inside = ((result > 1) & (result < 254)).all(-1)
    assert inside.any()
    assert np.abs(result @ [0.2989, 0.5870, 0.1140] - luma)[inside].max() < 3


def test_stroke_and_denoise_start_from_the_image(models, images, tmp_path):
    common = ("--input", images / "a.png")
    meta = _run(models, tmp_path / "s", "stroke", *common, "--sigma_start", 0.4, "--repeat", 2)
    assert meta["sigmas"] == [0.4, 0.002]
    near = _run(models, tmp_path / "n", "denoise", *common, "--sigma", 0.002)
    assert near["sigmas"] == [0.002, 0.002]
    # At sigma_min the consistency function is the identity: the image comes back, but for noise of 0.002.
    difference = _pixels(tmp_path / "n" / "a_000.png").astype(int) - _pixels(images / "a.png")
    assert np.abs(difference).max() <= 2
    meta = _run(models, tmp_path / "d", "denoise", *common, "--sigmas", "0.5,0.1", "--noisy_input", "True")
    assert meta["sigmas"] == [0.5, 0.1, 0.002]


def test_classes_condition_the_result(models, images, tmp_path):
    common = ("--input", images / "a.png", "--mask", "center:0.75")
    _run(models, tmp_path / "1", "inpaint", *common, "--classes", "1", model="grey.pt")
    _run(models, tmp_path / "2", "inpaint", *common, "--classes", "2", model="grey.pt")
    one, two = _pixels(tmp_path / "1" / "a_000.png"), _pixels(tmp_path / "2" / "a_000.png")
    assert one.shape == (SIDE, SIDE)
    assert (one != two).any()


def test_labels_come_with_a_prepared_input(models, tmp_path):
    """Those of an npz serve where --classes is empty; they must be there and fit the model."""
    pixels = np.random.default_rng(0).integers(0, 255, (3, SIDE, SIDE, 1), dtype=np.uint8)
    np.savez(tmp_path / "with.npz", arr_0=pixels, arr_1=np.array([3, 0, 1]))
    _run(models, tmp_path / "a", "inpaint", "--input", tmp_path / "with.npz", model="grey.pt")
    np.savez(tmp_path / "without.npz", arr_0=pixels)
    without = ("--input", tmp_path / "without.npz")
    _run(models, tmp_path / "b", "inpaint", *without, "--classes", "3,0,1", model="grey.pt")
    _run(models, tmp_path / "c", "inpaint", *without, "--classes", "3", model="grey.pt")
    results = [[_pixels(tmp_path / d / f"{i:06d}_000.png").tolist() for i in range(3)] for d in "abc"]
    assert results[0] == results[1]
    assert [results[0][i] == results[2][i] for i in range(3)] == [True, False, False]
    with pytest.raises(UserError, match="--classes is missing"):
        _run(models, tmp_path / "d", "inpaint", *without, model="grey.pt")
    np.savez(tmp_path / "high.npz", arr_0=pixels, arr_1=np.array([3, 0, 4]))
    with pytest.raises(UserError, match="has label 4, the model has 4 classes"):
        _run(models, tmp_path / "d", "inpaint", "--input", tmp_path / "high.npz", model="grey.pt")


def test_result_depends_on_seed_image_and_number_only(models, images, tmp_path):
    _run(models, tmp_path / "all", "inpaint", "--input", images, "--num_results", 3, "--batch_size", 2)
    _run(models, tmp_path / "one", "inpaint", "--input", images / "b.png", "--num_results", 2)
    for i in range(2):
        a, b = (_pixels(tmp_path / d / f"b_00{i}.png").astype(int) for d in ("all", "one"))
        assert np.abs(a - b).max() <= 1  # another batch size rounds differently
    _run(models, tmp_path / "seed", "inpaint", "--input", images / "b.png", "--seed", 1)
    a, b = (_pixels(tmp_path / d / "b_000.png").astype(int) for d in ("one", "seed"))
    assert np.abs(a - b).max() > 5


def _on_rank(models, images, out):
    argv = ["--task", "inpaint", "--model_path", str(models / "rgb.pt"), "--out_dir", str(out)]
    run_image_edit(parse(EditConfig, [*argv, "--input", str(images), "--num_results", "2"]))
    return distributed.get_rank()


def test_ranks_share_the_images(models, images, tmp_path):
    assert run_ranks("tests.commands.test_edit:_on_rank", 2, models, images, tmp_path / "two") == [0, 1]
    _on_rank(models, images, tmp_path / "one")
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "two").iterdir())
    assert len(files) == 6 + 2
    for name in files[:6]:
        a, b = _pixels(tmp_path / "one" / name).astype(int), _pixels(tmp_path / "two" / name).astype(int)
        assert np.abs(a - b).max() <= 1


def test_interpolation(models, tmp_path):
    generator = IndexedGenerator(7)
    generator.set_rows([0])
    noise = generator.randn(1, 3, SIDE, SIDE)[0]
    np.save(tmp_path / "n.npy", noise.numpy())
    meta = _run(models, tmp_path / "out", "interpolate", "--between", f"3,{tmp_path}/n.npy,7", "--frames", 4)
    assert len(meta["frames"]) == 7
    middle, last = (_pixels(tmp_path / "out" / meta["frames"][i]) for i in (3, 6))
    assert np.array_equal(middle, last)  # the file holds the noise of seed 7
    assert (_pixels(tmp_path / "out" / meta["frames"][0]) != last).any()
    with Image.open(tmp_path / "out" / "interpolation.gif") as animation:
        assert animation.size == (64, 64)
        assert animation.n_frames > 5
    _run(
        models, tmp_path / "apng", "interpolate", "--between", "3,7", "--animation", "apng", "--ts", "0,9,17"
    )
    with Image.open(tmp_path / "apng" / "interpolation.apng") as animation:
        assert animation.n_frames == 2 * 9 - 2


def test_path_passes_every_corner_once():
    corners = [corner_noise(str(seed), (1, 4, 4)) for seed in (1, 2, 3)]
    path = path_between(corners, 5)
    assert len(path) == 9
    for i, corner in zip((0, 4, 8), corners):
        assert torch.allclose(path[i], corner, atol=1e-6)
    norms = path.flatten(1).norm(dim=1)
    assert norms.max() / norms.min() < max(c.norm() for c in corners) / min(c.norm() for c in corners) + 0.2


def test_noise_levels():
    def levels(**flags):
        return noise_levels(configure(EditConfig, steps=18, **flags))

    assert len(levels(task="inpaint")) == 18
    assert len(noise_levels(configure(EditConfig, steps=201))) == 18
    assert len(noise_levels(configure(EditConfig, steps=5))) == 5
    assert levels(task="stroke").tolist() == [1.0, 0.002]
    assert levels(task="interpolate").tolist() == [80, 0.002]
    assert levels(task="inpaint", ts="0,9").tolist() == levels(task="inpaint", ts="0,9,17").tolist()
    assert levels(task="stroke", ts="12,17")[0] == pytest.approx(0.2963, abs=1e-3)
    assert levels(task="inpaint", sigmas="80,2").tolist() == [80, 2, 0.002]


def test_result_stems_never_collide():
    assert result_stems(["a.png", "b/a.png", "c.jpg", "c.png"]) == ["a", "b_a", "c_jpg", "c_png"]
    assert result_stems(["a/b.png", "a_b.png"]) == ["a_b_png", "a_b_png_2"]
    assert result_stems(["p.png", "p.jpg", "p_png.png"]) == ["p_png", "p_jpg", "p_png_2"]
    assert result_stems(["A.png", "a.png"]) == ["A_png", "a_png_2"]
    odd = result_stems(["a/b.png", "a_b.png", "a_b_png.png", "a_b_png_2.png"])
    assert odd == ["a_b_png", "a_b_png_3", "a_b_png_4", "a_b_png_2"]


def test_a_model_that_is_not_finite_makes_no_pictures(models, images, tmp_path):
    weights, extra = load_weights(models / "rgb.pt")
    save_weights(tmp_path / "nan.pt", {k: torch.full_like(v, torch.nan) for k, v in weights.items()}, extra)
    for task, flags in {
        "inpaint": ["--input", images, "--mask", "left"],
        "stroke": ["--input", images, "--sigma_start", 0.4],
        "interpolate": ["--between", "0,1", "--frames", 3],
    }.items():
        first = "frame 0" if task == "interpolate" else "a_000.png"
        level = "0.4" if task == "stroke" else "80"
        message = f"^{first}: the model's output at noise level {level} is not finite"
        with pytest.raises(UserError, match=message):
            _run(tmp_path, tmp_path / task, task, *flags, model="nan.pt")
        assert not (tmp_path / task).exists()


# ---- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("paint", [], "--task must be one of"),
        ("inpaint", ["--mask", "box:0,0,9,2"], "leaves the image of 8 x 8"),
        ("inpaint", ["--ts", "0,9,3"], "--ts must not decrease"),
        ("inpaint", ["--ts", "0,18"], "--ts 0,18 leaves the grid"),
        ("inpaint", ["--sigmas", "90,2"], "--sigmas must lie"),
        ("inpaint", ["--sigmas", "5", "--ts", "0,17"], "give one of them"),
        ("stroke", ["--sigma_start", "0.001"], "--sigma_start 0.001 must lie between"),
        ("stroke", ["--sigma_start", "2", "--ts", "3,17"], "give one of them"),
        ("denoise", ["--sigma", "81"], "--sigma 81.0 must lie between"),
        ("superres", ["--factor", "3"], "--factor 3 does not divide"),
        ("superres", ["--factor", "1"], "--factor must be at least 2"),
        ("superres", ["--factor", "16"], "--factor 16 does not divide"),
        ("inpaint", ["--sigmas", "2,5"], "--sigmas must decrease"),
        ("inpaint", ["--sigmas", "2,0.001"], "--sigmas must lie above --sigma_min 0.002"),
        ("inpaint", ["--ts=-1,17"], "--ts must not be negative"),
        ("inpaint", ["--ts", "5"], "--ts needs at least a start and an end"),
        ("stroke", ["--sigma_start", "81"], "--sigma_start 81.0 must lie between"),
        ("stroke", ["--repeat", "0"], "--repeat must be at least 1"),
        ("colorize", ["--factor", "4"], "--factor is for --task superres, not for colorize"),
        ("inpaint", ["--classes", "1"], "--classes needs a class-conditional model"),
        ("inpaint", ["--input", "nowhere"], "--input nowhere: no such file or folder"),
        ("inpaint", ["--num_results", "0"], "--num_results must be at least 1"),
        ("interpolate", [], "--between is missing"),
        ("interpolate", ["--between", "3"], "two seeds or files"),
        ("interpolate", ["--between", "3,nofile.npy"], "--between nofile.npy: neither"),
        ("interpolate", ["--between", "3,4", "--sigmas", "5"], "--ts must begin with 0"),
    ],
)
def test_bad_input_is_one_line(models, images, tmp_path, task, flags, message):
    given = flags if "--input" in flags or task == "interpolate" else ["--input", str(images), *flags]
    with pytest.raises(UserError, match=message) as error:
        _run(models, tmp_path / "out", task, *given)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out/*.png"))


def test_models_that_do_not_fit(models, images, tmp_path):
    with pytest.raises(UserError, match="colorize needs a colour model"):
        _run(models, tmp_path / "o", "colorize", "--input", images, "--classes", "1", model="grey.pt")
    with pytest.raises(UserError, match="--classes is missing"):
        _run(models, tmp_path / "o", "inpaint", "--input", images, model="grey.pt")
    with pytest.raises(UserError, match="--classes is missing"):
        _run(models, tmp_path / "o", "interpolate", "--between", "1,2", model="grey.pt")
    with pytest.raises(UserError, match="--classes must be one label with interpolate"):
        _run(models, tmp_path / "o", "interpolate", "--between", "1,2", "--classes", "1,2", model="grey.pt")
    with pytest.raises(UserError, match="needs a consistency model"):
        _run(
            models,
            tmp_path / "o",
            "inpaint",
            "--input",
            images,
            "--training_mode",
            "progdist",
            model="edm.pt",
        )


def test_other_resolutions_need_resize(models, tmp_path):
    Image.fromarray(np.zeros((20, 12, 3), np.uint8)).save(tmp_path / "big.png")
    with pytest.raises(UserError, match=r"big\.png is 12 x 20, the model makes 8 x 8: --resize"):
        _run(models, tmp_path / "out", "inpaint", "--input", tmp_path / "big.png")
    _run(models, tmp_path / "out", "inpaint", "--input", tmp_path / "big.png", "--resize", "True")
    assert _pixels(tmp_path / "out" / "big_000.png").shape == (SIDE, SIDE, 3)
    assert _pixels(tmp_path / "out" / "full" / "big_000.png").shape == (20, 12, 3)


def test_results_are_pasted_back_at_the_pictures_size():
    original = np.random.default_rng(0).integers(60, 200, (24, 16, 3), dtype=np.uint8)
    square = original[4:20]
    result = torch.rand(3, 8, 8) * 2 - 1
    mask = torch.ones(8, 8)
    mask[:, :3] = 0
    pasted = paste_back(original, result, "inpaint", mask)
    large = torch.nn.functional.interpolate(result[None], (16, 16), mode="bicubic", antialias=True).clamp(
        -1, 1
    )
    assert (pasted[:4] == original[:4]).all() and (pasted[20:] == original[20:]).all()
    assert (pasted[4:20, 6:] == square[:, 6:]).all()
    assert (pasted[4:20, :6] == to_uint8(large)[0].numpy()[:, :6]).all()
    assert (paste_back(original, result, "stroke")[4:20] == to_uint8(large)[0].numpy()).all()
    coloured = from_uint8(paste_back(original, 0.1 * result, "colorize")[None, 4:20])
    assert (luma(coloured) - luma(from_uint8(square[None]))).abs().max() < 0.02
    assert (coloured - luma(coloured)).abs().max() > 0.02


def test_class_folders_name_the_labels(tmp_path):
    for name in ("c", "a"):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(tmp_path / "in" / name / "x.png")
    config = configure(
        EditConfig,
        task="inpaint",
        input=str(tmp_path / "in"),
        image_size=SIDE,
        in_channels=1,
        class_cond=True,
        num_classes=4,
        class_names=tuple("abcd"),
    )
    assert [item.label for item in InputFiles(config).load(range(2))] == [0, 2]


def test_unreadable_images_are_named_and_can_be_skipped(models, images, tmp_path, capsys):
    (images / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(UserError, match=r"b\.png: cannot be read"):
        _run(models, tmp_path / "out", "inpaint", "--input", images)
    meta = _run(
        models,
        tmp_path / "skip",
        "inpaint",
        "--input",
        images,
        "--skip_unreadable",
        "True",
        "--overwrite",
        "True",
    )
    assert [name[-5:] for name in meta["images"]] == ["a.png", "c.png"]
    assert "b.png" in meta["skipped"][0]
    assert "skipped: " in capsys.readouterr().err


def test_nothing_is_overwritten_unasked(models, images, tmp_path):
    flags = ("inpaint", "--input", images / "a.png")
    _run(models, tmp_path / "out", *flags)
    before = (tmp_path / "out" / "a_000.png").read_bytes()
    with pytest.raises(UserError, match=r"a_000\.png is already there: give --overwrite True"):
        _run(models, tmp_path / "out", *flags, "--seed", 5)
    assert (tmp_path / "out" / "a_000.png").read_bytes() == before
    _run(models, tmp_path / "out", *flags, "--seed", 5, "--overwrite", "True")
    assert (tmp_path / "out" / "a_000.png").read_bytes() != before


@pytest.mark.parametrize(("value", "warning"), [(0, "nothing to generate"), (255, "nothing known")])
def test_empty_and_full_masks_warn(models, images, tmp_path, monkeypatch, value, warning):
    lines = []
    monkeypatch.setattr(logger, "log", lines.append)
    mask = tmp_path / "mask.png"
    Image.fromarray(np.full((SIDE, SIDE), value, np.uint8)).save(mask)
    _run(models, tmp_path / "out", "inpaint", "--input", images / "a.png", "--mask", mask)
    assert [line for line in lines if "warning" in line] == [f"warning: --mask {mask} leaves {warning}"]
    change = np.abs(_pixels(tmp_path / "out" / "a_000.png").astype(int) - _pixels(images / "a.png")).max()
    assert change <= 1 if value == 0 else change > 20


def test_masks_of_another_size(models, images, tmp_path):
    Image.fromarray(np.zeros((SIDE, 6), np.uint8)).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask\.png is 6 x 8, the images are 8 x 8"):
        _run(models, tmp_path / "out", "inpaint", "--input", images, "--mask", tmp_path / "mask.png")


def test_script(models, images, tmp_path):
    """The first word is the task; an error is one line and exit code 2."""
    common = ["--model_path", models / "rgb.pt", "--input", images / "a.png", "--out_dir", tmp_path / "out"]
    launch(["scripts/image_edit.py", "inpaint", *common], launcher="python", check=True)
    assert (tmp_path / "out" / "a_000.png").exists()
    again = launch(["scripts/image_edit.py", "inpaint", *common], launcher="python")
    assert again.returncode == 2
    assert again.stderr.strip().splitlines()[-1].startswith("error: ")
