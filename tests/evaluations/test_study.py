"""The study: lengths of runs, resuming, what is measured, and the tables and bars that are made of results."""

import argparse
import gzip
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from cm.commands.cli import parse_config
from cm.config.scripts import SCRIPTS
from cm.errors import UserError
from cm.runtime.liveness import write_status
from evaluations.reports.figures import FIGURES, points
from evaluations.reports.results import load_results
from evaluations.study import edits, levels, measure
from evaluations.study import runner as command
from evaluations.study.measure import (
    Ruler,
    as_rows,
    checkerboard,
    classifier,
    draw,
    nearest,
    prepare,
    search_middle,
)
from evaluations.study.methods import (
    CONSISTENCY,
    MANY,
    STUDIES,
    evaluations_of,
    images_seen,
    preset_of,
    set_flags,
    training_flags,
)
from evaluations.study.report import (
    bars,
    between,
    distances_table,
    figures_of,
    load,
    over_training,
    variations_table,
    write_report,
)
from tests.helpers.eval_files import stripes
from tests.helpers.models import save_consistency_model

FASHION = STUDIES["fashion"]
STUDENTS = [name for name, method in FASHION.methods.items() if method.teacher and not method.figure]


def result(method: str, kind: str, fid: float, **more) -> dict:
    """A measured set as the driver writes it."""
    metrics = {"fid": fid, "kid": 0.001, "precision": 0.5, "recall": 0.4, "accuracy": 0.9}
    run = {"metrics": metrics, "intervals": {"fid": {"std": 0.25}}, "count": 10}
    return {"method": method, "set": kind, "images_seen": 51200, "metrics": metrics, "runs": [run], **more}


def point(method: str, step: int, fid: float) -> dict:
    """A measured checkpoint."""
    return {"method": method, "set": f"step_{step:06d}", "images_seen": 64 * step, "fid": fid}


RESULTS = {
    "edm_heun18": result("edm", MANY, 10.0),
    "edm_nfe1": result("edm", "nfe1", 60.0),
    "cd_nfe1": result("cd", "nfe1", 12.0),
    "cd_nfe2": result("cd", "nfe2", 13.0),
    "cd_step_000200": {"method": "cd", "set": "step_000200", "images_seen": 12800, "fid": 33.0},
    "ct_nfe1": result("ct", "nfe1", 31.0),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_students_see_equally_many_images(name):
    steps = FASHION.methods[name].flags.get("total_training_steps", 800)
    assert steps == 800 or name == "cd_huber_long"
    assert images_seen(FASHION, name) == pytest.approx(steps * 64, rel=0.01)


def test_a_study_of_another_length():
    assert training_flags(FASHION, "cd", 1) == {}
    assert training_flags(FASHION, "sct", 0.25) == {
        "total_training_steps": 200,
        "save_interval": 50,
        "tangent_warmup": 50,
    }
    assert training_flags(FASHION, "pd", 0.5)["distill_steps_per_iter"] == 57
    assert images_seen(FASHION, "cd", 0.25) == 200 * 64


def test_a_variation_is_its_method_with_other_flags():
    assert preset_of(FASHION, "cd_rate") == "fashion_cd"
    assert training_flags(FASHION, "cd_rate", 1) == {"lr": 3e-4}
    assert training_flags(FASHION, "edm_pixels", 0.5)["total_training_steps"] == 500
    found = {**RESULTS, "cd_rate_nfe1": result("cd_rate", "nfe1", 11.0)}
    assert "| CD, rate 3e-4 | 51,200 | 11.00 ± 0.25 | 12.00 |" in variations_table(FASHION, found)
    assert not any("rate" in row for row in distances_table(FASHION, found))


@pytest.mark.parametrize("name", FASHION.methods)
def test_every_training_of_the_study_is_a_configuration(name):
    flags = {"preset": preset_of(FASHION, name), **training_flags(FASHION, name, 0.5)}
    argv = [word for n, v in flags.items() for word in (f"--{n}", str(v))]
    config = parse_config(SCRIPTS[FASHION.methods[name].script], argv)
    assert config.image_size == 28 and config.num_classes == 10


def test_noise_levels_of_a_set():
    assert set_flags(CONSISTENCY["nfe2"], 0.8)["sigmas"] == "80,0.8"
    assert set_flags(CONSISTENCY["nfe4"], 0.8)["sigmas"] == "80,3.2,0.8,0.2"
    assert set_flags(CONSISTENCY["nfe8"], 0.8)["sigmas"] == "80,6.4,3.2,1.6,0.8,0.4,0.2,0.1"
    assert set_flags({"steps": 18}, None) == {"steps": 18}
    assert [evaluations_of(kind) for kind in ("nfe1", "nfe4", MANY)] == [1, 4, 35]


def test_bars_are_ratios_of_distances():
    found = {bar.text: (bar.value, bar.verdict) for bar in bars(FASHION, RESULTS)}
    assert found["CD, one evaluation / teacher, 35"] == (1.2, "yes")
    assert found["CT, one evaluation / teacher, 35"] == (3.1, "no")
    assert found["ECT / CT, one evaluation"] == (None, "-")
    assert found["CD: two evaluations / one"] == (13 / 12, "no")
    assert found["the worst student / the teacher, one evaluation"] == (31 / 60, "no")


def test_tables_and_curves_are_those_of_the_results():
    rows = distances_table(FASHION, RESULTS)
    assert "| EDM teacher | 51,200 | 60.00 ± 0.25 |  |  |  | 10.00 ± 0.25 |" in rows
    assert "| CD | 51,200 | 12.00 ± 0.25 | 13.00 ± 0.25 |  |  |  |" in rows
    assert not any("| sCD" in row for row in rows)
    (curve,) = over_training(FASHION, RESULTS)
    assert (curve.name, curve.x, curve.y) == ("CD", [12800, 51200], [33.0, 12.0])


def test_the_report_leaves_what_is_written_by_hand(tmp_path):
    (tmp_path / "run" / "results").mkdir(parents=True)
    for name, content in RESULTS.items():
        (tmp_path / "run" / "results" / f"{name}.json").write_text(json.dumps(content))
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "study.md").write_text(between("# Title\n\nBefore.", "fashion", "old") + "\nAfter.\n")
    write_report("fashion", FASHION, tmp_path / "run", docs)
    text = (docs / "study.md").read_text()
    assert text.startswith("# Title\n\nBefore.") and text.endswith("\nAfter.\n") and "old" not in text
    assert "12.00 ± 0.25" in text and (docs / "pictures" / "fashion_images.png").exists()
    assert load(tmp_path / "run") == json.loads((docs / "results" / "fashion.json").read_text()) == RESULTS


def test_figures_are_drawn_from_a_study(tmp_path):
    """Points of its runs, and Figure 4 from its students' sample sets; nothing else is read from a damaged file."""
    (tmp_path / "run" / "results").mkdir(parents=True)
    steps = {
        f"fig3a_{n}_step_{s:06d}": point(f"fig3a_{n}", s, s / 10) for n in ("l1", "l2") for s in (50, 100)
    }
    sets = {f"{m}_nfe{n}": result(m, f"nfe{n}", 10.0 / n) for m in ("cd", "pd") for n in (1, 2)}
    for name, content in {**sets, **steps, "provenance": {}, "floor": {}}.items():
        (tmp_path / "run" / "results" / f"{name}.json").write_text(json.dumps(content))
    lines = figures_of("fashion", load(tmp_path / "run"), tmp_path)
    assert [line for line in lines if line.startswith("![")] == [
        f"![{FIGURES[f].title}](pictures/fashion_figure{f}.png)" for f in ("3a", "4")
    ]
    assert (
        lines[-1].startswith("Not measured for the figures: fig3b_euler_n9, NFE 1,")
        and "cd, NFE 4" in lines[-1]
    )
    (tmp_path / "docs").mkdir()
    together = tmp_path / "docs" / "fashion.json"
    together.write_text(json.dumps(load(tmp_path / "run")))
    curves = FIGURES["3a"].curves["fashion"], FIGURES["4"].curves["fashion"]
    read = load_results(tmp_path / "docs")
    assert [(x, m.metrics["fid"]) for x, m in points("step", curves[0][1], read)] == [(50, 5.0), (100, 10.0)]
    assert [(x, m.metrics["fid"]) for x, m in points("nfe", curves[1][0], read)] == [(1, 10.0), (2, 5.0)]
    together.write_text(json.dumps({**load(tmp_path / "run"), "x": {"method": "x", "set": "step_000050"}}))
    with pytest.raises(UserError, match=r"fashion\.json: x: fid"):
        load_results(tmp_path / "docs")


def test_errors_along_a_trajectory():
    """Where every image is black, trajectories are straight lines to it; speckle is what a mean takes away."""
    sigmas = torch.tensor([80.0, 3.0, 0.5, 0.0])
    made = levels.trajectory(lambda x, _: torch.full_like(x, -1.0), (1, 4, 4), sigmas)
    noise = made[0] / 80
    for sigma, x in zip(sigmas[:-1], made):
        assert torch.allclose(x, (noise * 80 + 1) * sigma / 80 - 1, atol=1e-3)
    assert torch.allclose(made[-1], torch.full_like(noise, -1.0), atol=1e-5)
    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    assert levels.fine(checks[None, None, :, :]) == pytest.approx(8 / 9, rel=0.1)
    assert levels.fine(torch.zeros(1, 1, 8, 8)) == 0


def test_errors_are_measured_down_to_the_lowest_level_of_a_student(tiny, tmp_path, monkeypatch):
    _, run = tiny
    model = run / "cd" / "checkpoints" / "step_000800" / "model.pt"
    for name, value in {"COUNT": 2, "STEPS": 5, "SHOWN": (0, 2, 4)}.items():
        monkeypatch.setattr(levels, name, value)
    every = levels.errors_by_level(model, model, tmp_path / "trajectory.npz")
    assert len(every["levels"]) == 5 and every["levels"][-1]["distance"] < 0.01
    monkeypatch.setattr(levels, "lowest_level", lambda _: 1.0)
    fewer = levels.errors_by_level(model, model, tmp_path / "trajectory.npz")
    assert fewer["levels"] == every["levels"][:3]
    table = levels.levels_table({"a": fewer, "b": every}, {"a": "A", "b": "B"})
    assert table[0] == "| model | from 80 | from 2.5 | from 0.002 |" and table[2].endswith(" |  |")


def test_a_pattern_of_patches_is_seen():
    images = np.full((2, 4, 4, 1), 100, np.uint8)
    images[:, ::2, ::2] += 6
    images[:, 1::2, 1::2] += 6
    assert checkerboard(images) == 6 and checkerboard(255 - images) == -6
    assert checkerboard(np.arange(32, dtype=np.uint8).reshape(2, 4, 4, 1)) == 0  # a plane


def test_nearest_images():
    a, b = np.zeros((1, 2, 2, 1), np.uint8), np.full((3, 2, 2, 1), 255, np.uint8)
    b[1] = 51
    assert nearest(as_rows(a), as_rows(b)).tolist() == pytest.approx([0.2])


def idx(path, array: np.ndarray) -> None:
    """An IDX file of bytes, compressed."""
    head = struct.pack(f">2xBB{array.ndim}I", 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A study of stripes of 8 pixels with an untrained student, ready to be measured; (study, run)."""
    folder = tmp_path_factory.mktemp("study")
    for part, count in (("train", 256), ("t10k", 60)):
        images, labels = stripes(count, seed=count)
        idx(folder / f"{part}-images-idx3-ubyte.gz", images[..., 0])
        idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    study = replace(FASHION, data=str(folder), epochs=4)
    run = folder / "run"
    run.mkdir()
    prepare(study, folder, run)
    for step in (200, 800):
        path = run / "cd" / "checkpoints" / f"step_{step:06d}"
        path.mkdir(parents=True)
        save_consistency_model(path / "model.pt", in_channels=1, class_cond=True, num_classes=4)
    return study, run


def runner(tiny, **changes) -> command.Runner:
    """A start of the tiny study."""
    study, run = tiny
    flags = {"run": run, "data": "", "scale": 1.0, "samples": 40, "seeds": 2, "only": "cd", "budget": 10.0}
    return command.Runner(study, argparse.Namespace(**flags | changes))


def test_the_data_and_the_classifier_are_made_once(tiny):
    study, run = tiny
    meta = classifier(study, run)
    assert meta["test_images"] == 60 and meta["test_accuracy"] > 0.9 and meta["train_images"] == 256
    before = (run / "classifier.pt").stat().st_mtime_ns
    assert classifier(study, run) == meta and (run / "classifier.pt").stat().st_mtime_ns == before


def test_samples_are_drawn_with_their_classes_and_measured(tiny, monkeypatch):
    _, run = tiny
    start = runner(tiny)
    model = run / "cd" / "checkpoints" / "step_000800" / "model.pt"
    monkeypatch.setattr(start, "model_of", lambda *_: model)
    found = start.sample_set("cd", "nfe1", {"sampler": "onestep"})
    assert found["images_seen"] == 51200 and len(found["runs"]) == 2
    assert set(found["metrics"]) == {"fid", "kid", "precision", "recall", "accuracy"}
    fids = [r["metrics"]["fid"] for r in found["runs"]]
    assert found["metrics"]["fid"] == pytest.approx(np.mean(fids)) and found["fid_range"] == [
        min(fids),
        max(fids),
    ]
    assert found["neighbours"]["samples"] > found["neighbours"]["test"] > 0
    with np.load(run / "samples" / "cd" / "nfe1_seed0.npz") as arrays:
        assert arrays["arr_0"].shape == (40, 8, 8, 1) and arrays["arr_1"][:6].tolist() == [0, 1, 2, 3, 0, 1]
    # The training images themselves are far nearer.
    assert start.ruler.floor(40)["metrics"]["fid"] < 0.2 * found["metrics"]["fid"]


def test_edits_are_measured_beside_what_needs_no_model(tiny, monkeypatch):
    _, run = tiny
    monkeypatch.setattr(edits, "IMAGES", 12)
    monkeypatch.setattr(edits, "PAIRS", 10)
    tasks = [edit for edit in edits.EDITS if edit.flags["task"] in ("superres", "denoise")]
    monkeypatch.setattr(edits, "EDITS", tasks)
    model = run / "cd" / "checkpoints" / "step_000800" / "model.pt"
    found = edits.measure_edits(model, run / "test.npz", runner(tiny).ruler.few, run)
    sharper, noisy = (found["tasks"][edit.title] for edit in tasks)
    assert list(sharper) == ["nearest pixel", "bicubic", edits.MODEL]
    assert list(noisy) == ["the noisy input", edits.MODEL]
    # Half a unit of noise where it is not clipped to [-1, 1]; half of it is.
    assert noisy["the noisy input"]["psnr"] == pytest.approx(20 * np.log10(2 / 0.5) + 3, abs=1.5)
    assert found["images"] == 12 and list(found["interpolation"])[1] == "half-way"
    table = edits.edits_table({"cd": found}, {"cd": "CD"})
    assert len(table) == 2 + 3 + 2 and table[4].startswith("|  | CD | ")
    assert len(edits.interpolation_table({"cd": found}, {"cd": "CD"})) == 2 + 3


def test_the_level_of_two_steps_is_the_best_of_those_tried(tiny, monkeypatch):
    _, run = tiny
    distances = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(measure, "SEARCH_COUNT", 4)
    monkeypatch.setattr(Ruler, "to_train", lambda *_: next(distances))
    model = run / "cd" / "checkpoints" / "step_000800" / "model.pt"
    found = search_middle(Ruler(run), model, (0.2, 0.8, 3.2), run / "search")
    assert found == {"middle": 0.8, "tried": {"0.2": 3.0, "0.8": 1.0, "3.2": 2.0}}


def test_samples_that_are_there_are_not_drawn_again(tiny, tmp_path):
    _, run = tiny
    model = run / "cd" / "checkpoints" / "step_000800" / "model.pt"
    draw(model, {"sampler": "onestep"}, 10, 0, tmp_path / "a.npz")
    draw(tmp_path / "gone.pt", {"sampler": "onestep"}, 10, 0, tmp_path / "a.npz")
    draw(model, {"sampler": "onestep"}, 3, 0, tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as many, np.load(tmp_path / "b.npz") as few:
        assert np.array_equal(many["arr_0"][:3], few["arr_0"])


def test_results_are_made_once_and_only_while_there_is_time(tiny):
    start = runner(tiny)
    assert start.once("x", lambda: {"a": 1}) == {"a": 1}
    late = runner(tiny, budget=0.0)
    assert late.once("x", lambda: {"a": 2}) == {"a": 1}
    with pytest.raises(command.OutOfTime):
        late.once("y", lambda: {"a": 2})


def test_one_folder_holds_results_of_one_kind(tiny):
    start = runner(tiny)
    start.check({"scale": 1.0, "samples": 40, "seeds": 2})
    with pytest.raises(UserError, match=r"--samples 40: .* has results with 10000; give another --run"):
        start.check({"scale": 1.0, "samples": 10000, "seeds": 2})


def test_a_finished_training_is_not_started_again(tiny, monkeypatch):
    _, run = tiny
    calls = []

    def record(argv, **_):
        calls.append(argv)
        return argparse.Namespace(returncode=75)

    monkeypatch.setattr(command.subprocess, "run", record)
    start = runner(tiny, scale=0.5)
    with pytest.raises(command.OutOfTime):
        start.train("cd")
    line = " ".join(calls[0])
    assert "scripts/cm_train.py --preset fashion_cd" in line and "--total_training_steps 400" in line
    assert f"--teacher_model_path {run / 'edm'}" in line
    (run / "edm").mkdir()
    write_status(run / "edm", "finished", exit_code=0)
    start.train("edm")
    assert len(calls) == 1
