"""The report page: what it shows of one run and of several, in a real browser too; and what it says of bad input."""

import json
import re
import sys
import warnings

import numpy as np
import pytest

from cm.errors import UserError
from cm.tools.findings import find_results
from cm.tools.runs import read_run
from evaluations.reports.run_report import command
from evaluations.reports.run_report.command import differences, main, page, thinned
from evaluations.reports.run_report.curves import _series, curves, short
from tests.helpers.browser import needs_browser, rendered, screenshot
from tests.helpers.run_files import log_row, make_run


def sample(folder, run, *, nfe=1, sampler="onestep", step=20, count=16):
    """Samples beside a run, as image_sample leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {
        "model_path": str(run / "checkpoints" / f"step_{step:06d}" / f"ema_0.99_{step:06d}.pt"),
        "weights": "ema:0.99",
        "config": {"sampler": sampler, "num_samples": count, "preset": "digits_cd"},
        "sigmas": [80.0, 0.002],
        "nfe": nfe,
    }
    (folder / "samples_16x8x8x1.json").write_text(json.dumps(meta))
    (folder / "samples_16x8x8x1.png").write_bytes(b"\x89PNG picture of samples")
    return folder / "samples_16x8x8x1.npz", meta


def measure(npz, meta, fid):
    """A result of the evaluator."""
    result = {
        "metrics": {"fid": fid, "precision": 0.5},
        "protocol": {"name": "adm"},
        "features": {"name": "inception"},
        "samples": {"path": str(npz), "count": 16, "meta": meta},
        "comparable": False,
    }
    npz.with_name("eval.json").write_text(json.dumps(result))


def shown_previews(document):
    """step of every preview that is not hidden."""
    found = re.findall(r'<img data-step="(\d+)" src="[^"]+"[^>]*?( hidden="")?>', document)
    return [int(step) for step, hidden in found if not hidden]


@pytest.fixture
def pair(tmp_path):
    teacher = make_run(tmp_path / "runs" / "teacher", preset="digits_edm", lr=1e-3, previews=["heun18"])
    student = make_run(
        tmp_path / "runs" / "student",
        training_mode="consistency_training",
        preset="digits_ct",
        steps=(5, 15, 20),
        lr=2e-3,
        ended=False,
        previews=["onestep", "twostep"],
    )
    return [read_run(teacher), read_run(student)]


def test_every_column_of_the_log_is_drawn_once(pair):
    for value, row in enumerate(pair[0].rows):
        row |= {"new_term": value, "images_per_sec": 100.0 + value}
    titles = [picture.title for picture in curves(pair)]
    assert titles[:3] == ["Loss", "Loss by noise level: teacher", "Loss by noise level: student"]
    assert "Images per second" in titles and "new_term" in titles
    assert len(set(titles)) == len(titles)
    # never filled, or always the same
    assert not any("memory" in title or "skipped" in title for title in titles)


def test_long_and_empty_logs(tmp_path):
    run = read_run(make_run(tmp_path / "long"))
    run.rows[:] = [log_row(step) for step in range(1, 10_000)]
    assert len(curves([run])[0].uri) < 300_000
    empty = read_run(make_run(tmp_path / "empty", steps=(), ended=False))
    assert curves([empty]) == []
    assert "No row has been logged yet" in page([empty])


def test_numbers_that_are_not_finite_do_not_stop_the_page(tmp_path):
    run = make_run(tmp_path / "run")
    row = log_row(30) | {"loss": None, "skipped": 2}
    with open(run / "progress.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    assert "2 step(s) had numbers that were not finite" in page([read_run(run)])


def test_rows_that_are_not_finite_are_left_out_of_curves_and_counted(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    run.rows[:] = [log_row(step) | {"loss": float("nan") if step % 3 else 1 / step} for step in range(1, 400)]
    run.rows[5]["grad_norm"] = float("inf")
    assert _series(run, "loss")[0] == list(range(3, 400, 3))
    text = page([run])
    assert "267 row(s) of the log hold numbers that are not finite" in text and "NaN" not in text


def test_long_names_are_cut_in_the_middle_and_told_once(tmp_path):
    name = "imagenet64_consistency_distillation_lpips_batch2048_seed17"
    run = read_run(make_run(tmp_path / name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where nothing is left for the plot
        text = page([run, read_run(make_run(tmp_path / "b"))])
    assert short(name) == f"imagenet64…{name[-19:]}" and len(short(name)) == 30
    assert f"<h1>{short(name)}, b</h1>" in text and f"</span>{name}</h3>" in text


def test_samples_and_results_are_found_by_the_weights_they_name(pair, tmp_path):
    teacher, student = pair
    npz, meta = sample(tmp_path / "runs" / "one", student.path)
    measure(npz, meta, 5.25)
    sample(tmp_path / "runs" / "deep" / "two", student.path, nfe=2, sampler="multistep")
    sample(tmp_path / "elsewhere", student.path, nfe=3)
    search = {
        "ts": [0, 10, 17],
        "sigmas": [80.0],
        "fid": 4.5,
        "nfe": 2,
        "protocol": "digits",
    }
    (tmp_path / "runs" / "search_result.json").write_text(json.dumps(meta | search))
    (tmp_path / "runs" / "torn.json").write_text("{")
    assert find_results(teacher) == []
    one, two, found = sorted(find_results(student), key=lambda f: (f.nfe, f.protocol))
    assert (one.metrics, one.protocol, one.count, one.comparable) == (
        {"fid": 5.25, "precision": 0.5},
        "adm",
        16,
        False,
    )
    assert one.picture is not None and one.step == 20 and one.weights == "ema:0.99"
    assert two.metrics == {} and two.sampler == "multistep" and two.picture is not None
    assert found.metrics == {"fid": 4.5} and found.protocol == "digits" and "search" in found.sampler
    assert [f.nfe for f in find_results(student, [tmp_path])] == [1, 2, 2, 3]
    html = page(pair)
    assert "FID against network evaluations" in html and "5.25" in html and "not comparable" in html


def test_results_of_a_run_that_was_moved_are_found(tmp_path):
    sample(tmp_path / "runs" / "one", tmp_path / "before" / "student")
    run = make_run(tmp_path / "runs" / "student")
    assert [f.nfe for f in find_results(read_run(run))] == [1]
    # another run of the same name that is still where it was
    other = make_run(tmp_path / "before" / "student") / "checkpoints" / "step_000020"
    (other / "ema_0.99_000020.pt").write_text("")
    assert find_results(read_run(run)) == []


def test_results_of_the_quick_start_are_read(tmp_path):
    run = make_run(tmp_path / "cd")
    npz, meta = sample(tmp_path / "samples" / "cd_onestep", run)
    row = {
        "nfe": 1,
        "images": 16,
        "samples": str(npz),
        "model_path": meta["model_path"],
        "accuracy": 0.9,
        "fid": 0.1,
    }
    (tmp_path / "report.json").write_text(json.dumps({"CD, one step": row}))
    (found,) = find_results(read_run(run))
    assert (found.metrics, found.sampler) == ({"accuracy": 0.9, "fid": 0.1}, "onestep") and found.picture


def test_differences_of_configurations(pair):
    rows, some = map(dict, differences(pair))
    assert rows["lr"] == [1e-3, 2e-3] and rows["training_mode"] == ["edm", "consistency_training"]
    assert "out_dir" not in rows and "ema_rate" not in rows
    assert some["p_mean"][1] is None and some["start_ema"][0] is None and not set(some) & set(rows)
    assert differences([pair[0], pair[0]]) == ([], [])


def test_previews_are_thinned_out_evenly():
    assert thinned(range(5), 9) == [0, 1, 2, 3, 4]
    assert thinned(range(101), 5) == [0, 25, 50, 75, 100]


def test_the_page_needs_nothing_from_outside(pair, tmp_path):
    sample(tmp_path / "runs" / "one", pair[1].path)
    html = page(pair)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html) and "http" not in re.sub(
        r"data:[^\"]+", "", html
    )
    assert html.count("data-step=") == 2 + 2 * 3
    for text in ("digits_edm", "no measure of quality", "python 3.11.0", "step_000020", "run directory: x"):
        assert text in html


def test_the_command_writes_one_file(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([str(pair[0].path)])
    main([str(run.path) for run in pair])
    assert (pair[0].path / "report.html").is_file() and (tmp_path / "report.html").is_file()
    assert capsys.readouterr().out.count("report: ") == 2


def test_bad_input_is_one_line(pair, tmp_path, monkeypatch):
    twin = make_run(tmp_path / "copy" / "teacher")
    for argv, message in {
        (str(tmp_path / "nothing"),): "no such folder",
        (str(tmp_path / "runs"),): "no run directory.*the runs in it",
        (str(pair[0].path), str(twin)): "have one name",
        (str(pair[0].path), "--out", str(tmp_path / "no" / "p.html")): "there is no folder",
        (str(pair[0].path), "--previews", "1"): "at least 2",
    }.items():
        with pytest.raises(UserError, match=message):
            main(list(argv))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"jinja2.*\[plots\]"):
        page(pair)


def test_flags_of_a_plugin_that_is_not_loaded_are_shown(pair):
    pair[0].config["noise_sampler"] = pair[0].config["schedule_sampler"] = "of_a_plugin"
    chosen, _ = command.configuration(pair[0])
    assert ("schedule_sampler", "of_a_plugin") in chosen


@needs_browser
def test_in_a_browser_the_slider_changes_the_previews(pair, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page(pair))
    assert shown_previews(rendered(path.as_uri())) == [20, 20, 20]
    # The teacher has steps 10 and 20, the student 5, 15 and 20: each shows its newest one up to the step.
    assert shown_previews(rendered(f"{path.as_uri()}#step=15")) == [10, 15, 15]
    moved = "<script>slider.value = 0; slider.dispatchEvent(new Event('input'));</script></body>"
    path.write_text(path.read_text().replace("</body>", moved))
    document = rendered(path.as_uri())
    assert shown_previews(document) == [10, 5, 5] and ">step 5</output>" in document


@needs_browser
def test_in_a_browser_the_page_shows_its_pictures(pair, tmp_path):
    from PIL import Image

    path = tmp_path / "page.html"
    path.write_text(page(pair))
    screenshot(path.as_uri(), tmp_path / "page.png", 1000, 1400)
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3)
    curve = (np.abs(pixels.astype(int) - [0x00, 0x72, 0xB2]).sum(1) < 30).sum()
    assert curve > 500, "no curve is seen"
