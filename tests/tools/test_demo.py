"""The page to try a model: what its buttons do, alone and in a real browser; a mask is respected to the pixel."""

import io
import sys
import time
import urllib.request
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image

from cm.config.scripts import SampleConfig, changed, configure
from cm.errors import UserError
from cm.models.pretrained import load_pretrained
from cm.tools import demo
from cm.tools.demo import IN_TURN, Tried, fitted, page, serve
from tests.helpers.browser import browser, eventually, needs_driver
from tests.helpers.models import save_consistency_model

ports = count(7900)


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_consistency_model(path, in_channels=1, class_cond=True, num_classes=3)
    return Tried(load_pretrained(configure(SampleConfig, model_path=str(path))))


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    path = tmp_path_factory.mktemp("colour") / "model.pt"
    save_consistency_model(path)
    return Tried(load_pretrained(configure(SampleConfig, model_path=str(path))))


@pytest.fixture
def served(tried):
    pytest.importorskip("gradio", reason="gradio is not installed: pip install '.[demo]'")
    blocks = page(tried)
    yield serve(blocks, "127.0.0.1", next(ports), wait=False)
    blocks.close()


def tiles(picture) -> np.ndarray:
    """The images (n, side, side, channels) of a row, at the model's size."""
    pixels = np.asarray(picture)
    side = pixels.shape[0] - 4  # lines of two pixels around
    cell = side // 8
    starts = range(2, pixels.shape[1] - 2, side + 2)
    return np.stack(
        [pixels[2 + cell // 2 : 2 + side : cell, x + cell // 2 : x + side : cell] for x in starts]
    )


def test_one_two_and_four_steps_stand_side_by_side(tried):
    assert tried.columns == ["1 step", "2 steps", "4 steps"]
    first, again = tried.draw(3, 1, 4), tried.draw(3, 1, 4)
    assert len(first) == 3 and all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(first, again))
    assert (np.asarray(tried.draw(4, 1, 4)[0]) != np.asarray(first[0])).any()


def test_one_step_is_the_consistency_function_of_the_noise(tried):
    noise = demo.IndexedGenerator(5, "demo")
    noise.set_rows(range(2))
    x = 80.0 * noise.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = tried.model.denoise(torch.tensor([2, 2]))(x, torch.full((2,), 80.0))
    assert torch.allclose(tried.sample(1, 5, 2, 2), expected, atol=1e-4)


def test_classes_in_turn_or_one_of_them(tried):
    assert tried._labels(IN_TURN, 5).tolist() == [0, 1, 2, 0, 1]
    assert tried._labels(2, 2).tolist() == [2, 2]


def test_a_teacher_is_drawn_by_heun_and_edits_nothing(tmp_path):
    save_consistency_model(tmp_path / "m.pt", training_mode="progdist")
    model = load_pretrained(configure(SampleConfig, model_path=str(tmp_path / "m.pt")))
    teacher = Tried(replace(model, config=changed(model.config, training_mode="edm")))
    assert teacher.columns[-1] == "Heun, 18 points, 35 evaluations" and not teacher.consistency
    assert len(teacher.draw(0, IN_TURN, 1)) == 3


@pytest.mark.parametrize(
    ("mode", "steps"), [("progdist", {"start_scales": 1}), ("multistep_training", {"segments": 2})]
)
def test_a_model_for_a_few_steps_is_drawn_by_its_own_sampler(tmp_path, mode, steps):
    save_consistency_model(tmp_path / "m.pt", training_mode=mode, **steps)
    few = Tried(load_pretrained(configure(SampleConfig, model_path=str(tmp_path / "m.pt"))))
    n = few.model.config.steps
    assert few.columns == [f"{n} step{'s' * (n > 1)}"] and not few.consistency
    calls = []
    with torch.no_grad():
        few.model.denoiser.net.register_forward_hook(lambda *_: calls.append(1))
        assert few.sample(n, 0, IN_TURN, 1).shape == (1, 3, 8, 8)
    assert len(calls) == n


@pytest.mark.parametrize("zoom", [1, 5])
def test_pixels_that_are_not_painted_stay(tried, zoom):
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8).repeat(3, 2)
    painted = np.zeros((8 * zoom, 8 * zoom), bool)
    painted[3 * zoom, 4 * zoom] = painted[-1, 0] = True  # one dot is enough
    picture = small.repeat(zoom, 0).repeat(zoom, 1)
    seen, *results = tiles(tried.complete(picture, painted, 0, seed=1))[..., 0]
    known = np.ones((8, 8), bool)
    known[3, 4] = known[7, 0] = False
    assert len(results) == demo.RESULTS
    assert all((result[known] == small[..., 0][known]).all() for result in [seen, *results])
    assert len({tuple(result[~known]) for result in results}) > 1


def test_pictures_of_any_size_are_fitted():
    picture = np.zeros((6, 10, 3), np.uint8)
    picture[:, 2:8] = np.arange(6).repeat(3).reshape(6, 3)[None] * 10  # the central square
    assert (fitted(picture, 6)[0, :, 0] == np.arange(6) * 10).all()
    assert (fitted(picture, 3)[0, :, 0] == [5, 25, 45]).all()


def test_enlarging_keeps_the_means_and_colouring_the_luma(colour):
    picture = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = colour.fit(picture)
    rows = tiles(colour.edit(demo.superres(4), image, IN_TURN, 0)).astype(float)
    means = rows.reshape(5, 2, 4, 2, 4, 3).mean((2, 4))
    assert (
        np.abs(means[1:] - picture.reshape(2, 4, 2, 4, 3).mean((1, 3))).max() < 16
    )  # clamped at white and black
    seen, *results = tiles(colour.edit(demo.colorize(), image, IN_TURN, 0)).astype(int)
    assert (seen[..., 0] == seen[..., 1]).all() and len(results) == demo.RESULTS


def test_what_the_page_says_of_a_model(tried, colour):
    assert tried.title == "consistency distillation: grey, 8 x 8, 3 classes"
    assert colour.title == "consistency distillation: colour, 8 x 8"
    assert tried.class_choices == [("in turn", IN_TURN), ("0", 0), ("1", 1), ("2", 2)]
    named = replace(tried.model, config=changed(tried.model.config, class_names=("cat", "dog", "owl")))
    assert Tried(named).class_choices[1:] == [("cat", 0), ("dog", 1), ("owl", 2)]


def test_an_empty_seed_is_the_first_one(tried):
    assert torch.equal(tried.sample(1, None, 0, 2), tried.sample(1, 0, 0, 2))


def test_an_edit_without_a_picture_is_said_on_the_page():
    class Page:
        """Where gradio's error would be."""

        class Error(Exception):
            def __init__(self, message, **kwargs):
                super().__init__(message)

    with pytest.raises(Page.Error, match="first load a picture"):
        demo.given(Page, None)


def test_without_gradio_one_line_names_the_extra(tried, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"gradio.*\[demo\]"):
        page(tried)


def test_a_port_in_use_is_one_line(served, tried):
    port = int(served.rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=f"--port {port}") as error:
        serve(page(tried), "127.0.0.1", port, wait=False)
    assert "\n" not in str(error.value)


def test_the_page_is_for_this_machine_only(served):
    assert served.startswith("http://127.0.0.1:")


def picture_at(url: str) -> Image.Image:
    with urllib.request.urlopen(url) as answer:
        return Image.open(io.BytesIO(answer.read()))


@needs_driver
def test_in_a_browser_a_click_draws_and_a_painted_mask_is_respected(served, tried):
    loaded = "const i = document.querySelector('{} img'); return i && i.naturalWidth && i.src"
    with browser() as window:
        window.open(served)
        first = window.until(loaded.format("#drawn2"))
        window.run(
            "const seed = document.querySelector('input[aria-label=seed]');"
            "seed.value = 7; seed.dispatchEvent(new Event('input', {bubbles: true}))"
        )
        window.click("#draw")
        second = eventually(lambda: (now := window.run(loaded.format("#drawn2"))) != first and now)
        assert (np.asarray(picture_at(first)) != np.asarray(picture_at(second))).any()
        assert (np.asarray(picture_at(second)) == np.asarray(tried.draw(7, IN_TURN, 16)[2])).all()
        window.click("button[role=tab]:nth-of-type(2)")
        window.click("#fresh")
        x, y, width, height = window.until(
            "const all = [...document.querySelectorAll('canvas')].map(c => c.getBoundingClientRect());"
            "const r = all.find(r => r.width > 0); return r && [r.x, r.y, r.width, r.height]"
        )
        time.sleep(2)  # the picture comes to the canvas without a sign that one could wait for
        middle, step = (x + width / 2, y + height / 2), height / 10
        window.drag([middle, (middle[0] + step, middle[1] + step), (middle[0], middle[1] + 2 * step)])
        window.click("#complete")
        seen, *results = tiles(picture_at(window.until(loaded.format("#completed"))))[..., 0]
        unknown = seen == 127
        assert 0 < unknown.sum() < 40, "nothing, or too much, was painted"
        assert all((result[~unknown] == seen[~unknown]).all() for result in results)
        assert any((result[unknown] != results[0][unknown]).any() for result in results[1:])
        window.click("button[role=tab]:nth-of-type(3)")
        window.click("#enlarge")  # there is no picture yet
        window.until("return document.body.innerText.includes('first load a picture')")
        assert window.console() == []
