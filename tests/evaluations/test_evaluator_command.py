"""The evaluator's command lines and refusals, and the classifier that it trains of the reference's own labels."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import cm
from cm.config.rows import METRICS
from cm.errors import UserError
from cm.runtime.claims import Claim
from cm.storage.weights import load_weights, save_weights
from evaluations import evaluator, reference, small_classifier
from evaluations.evaluator import parse_metrics
from evaluations.features import load_features
from evaluations.npz_io import open_images
from tests.helpers.eval_files import write_npz
from tests.helpers.evaluation import ALL, CPU, DIGITS, measure
from tests.helpers.mp import launch

# --- a classifier of the reference's own labels -------------------------------------------------------


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty cache, and no way to a download. The list of classifiers that were trained."""
    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path / "cache"))

    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(small_classifier, "EPOCHS", 12)
    trained, train = [], small_classifier.train_classifier
    monkeypatch.setattr(
        small_classifier, "train_classifier", lambda *a, **k: trained.append(k["epochs"]) or train(*a, **k)
    )
    return trained


def test_labels_of_the_reference_stand_in_for_inception_and_say_so(
    files, offline, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "r.json"
    for asked in ((), ("--features", "classifier")):
        call(monkeypatch, evaluator.main, files["ref"], files["samples"], *asked, "--out", out)
        said, result = capsys.readouterr().out, json.loads(out.read_text())
        assert ("no route" in said) == (not asked)
        assert re.search(r"a small classifier of .*ref\.npz, which reads \d", said)
        assert "Fréchet distance" in said and "FID" not in said.replace("sFID", "")
        assert result["protocol"]["name"] == result["features"]["name"] == "classifier"
        assert result["metrics"]["accuracy"] > 0.5
    assert offline == [12]  # kept for the second time
    found = cm.evaluate(files["samples"], files["ref"], batch_size=64)
    assert found == pytest.approx(result["metrics"]) and offline == [12]


@pytest.mark.parametrize(
    "what, asked, message",
    [
        ("labels", (), "no route"),
        ("statistics", (), "no route"),
        ("", ("--protocol", "adm"), "no route.*what needs no download: --features classifier"),
        (
            "labels",
            ("--features", "classifier"),
            r"r\.npz has no labelled images.*--features classifier=FILE",
        ),
        ("", ("--features", "classifier", "--protocol", "small"), "small needs the file of a classifier"),
    ],
)
def test_nothing_stands_in_where_it_is_not_meant(files, offline, tmp_path, monkeypatch, what, asked, message):
    arrays = dict(np.load(files["ref"]))
    if what == "labels":
        del arrays["arr_1"]
    elif what == "statistics":
        arrays |= {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(UserError, match=message):
        call(monkeypatch, evaluator.main, tmp_path / "r.npz", files["samples"], *asked)
    assert offline == []


def test_a_large_set_is_thinned_evenly(files, monkeypatch):
    images = open_images(files["ref"])
    monkeypatch.setattr(small_classifier, "MOST_VALUES", 30 * 64)
    pixels, labels = small_classifier.labelled_pixels(images)
    expected = np.load(files["ref"])
    assert np.array_equal(pixels, expected["arr_0"][::3]) and np.array_equal(labels, expected["arr_1"][::3])


# --- bad input and the command line ----------------------------------------------------------------


def test_statistics_of_another_dimension(files, network, tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(63), sigma=np.eye(63))
    with pytest.raises(UserError, match=r"s\.npz: pool statistics have 63 dimensions, classifier gives 64"):
        measure({**files, "ref": str(tmp_path / "s.npz")}, network)


def test_images_of_another_size(files, network, tmp_path):
    other = str(write_npz(tmp_path / "o.npz", 8, size=16))
    with pytest.raises(UserError, match=r"16x16x1.*trained on 8x8x1"):
        measure({"ref": other, "samples": other}, network)


def test_too_few_samples_for_neighbours(files, network, tmp_path):
    few = str(write_npz(tmp_path / "few.npz", 3))
    with pytest.raises(UserError, match=r"few\.npz: k = 3 needs more than 3"):
        measure({**files, "samples": few}, network, replace(ALL, bootstrap=0))


def test_features_that_are_not_finite(files, tmp_path):
    state, meta = load_weights(files["weights"])
    state["hidden.bias"] = state["hidden.bias"] * float("nan")
    save_weights(tmp_path / "nan.pt", state, meta)
    broken = load_features(f"classifier={tmp_path / 'nan.pt'}", "", CPU)
    with pytest.raises(UserError, match=r"ref\.npz: classifier gives features that are NaN"):
        measure(files, broken)


def test_unknown_metric():
    assert parse_metrics("", DIGITS) == DIGITS.metrics and parse_metrics("all", DIGITS) == tuple(METRICS)
    assert parse_metrics("kid, fid", DIGITS) == ("kid", "fid")
    with pytest.raises(UserError, match=r"--metrics must be one of .* got .clip"):
        parse_metrics("fid,clip", DIGITS)


def call(monkeypatch, main, *argv) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])
    main()


def test_images_under_usual_names_and_a_mistake_before_anything_is_drawn(
    files, tmp_path, monkeypatch, capsys
):
    for name in ("ref", "samples"):
        arrays = np.load(files[name])
        np.savez(tmp_path / f"{name}.npz", x_train=arrays["arr_0"], y_train=arrays["arr_1"])
    argv = [tmp_path / "ref.npz", tmp_path / "samples.npz", "--features", f"classifier={files['weights']}"]
    call(monkeypatch, evaluator.main, *argv, "--out", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())["metrics"]
    network = load_features(f"classifier={files['weights']}", "", CPU)
    assert found == pytest.approx(measure(files, network, replace(ALL, metrics=DIGITS.metrics))["metrics"])
    monkeypatch.setattr(evaluator, "to_measure", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match=r"--metrics must be one of.*did you mean fid"):
        call(monkeypatch, evaluator.main, *argv, "--metrics", "fidd")


def test_command_lines(files, tmp_path, monkeypatch, capsys):
    out, spec = tmp_path / "ref.npz", f"classifier={files['weights']}"
    call(monkeypatch, reference.main, files["ref"], out, "--features", spec, "--num_images", "30")
    assert "70 images" in capsys.readouterr().out
    with pytest.raises(UserError, match="is already there: give --overwrite True"):
        call(monkeypatch, reference.main, files["ref"], out, "--features", spec)
    call(monkeypatch, reference.main, "--inspect", out)
    assert json.loads(capsys.readouterr().out)["meta"]["protocol"] == "classifier"
    result = tmp_path / "result.json"
    argv = [out, files["samples"], "--features", spec, "--protocol", "classifier", "--out", result]
    call(monkeypatch, evaluator.main, *argv)
    assert "Accuracy" in capsys.readouterr().out
    assert json.loads(result.read_text())["protocol"]["name"] == "classifier"
    with pytest.raises(UserError, match="--bootstrap 1"):
        call(monkeypatch, evaluator.main, *argv, "--bootstrap", "1")
    with pytest.raises(UserError, match="no file or folder"):
        call(monkeypatch, evaluator.main, "nowhere.npz", files["samples"])
    with pytest.raises(UserError, match="not both"):
        call(monkeypatch, evaluator.main, *argv, "--inception_path", "x.pt")
    with pytest.raises(UserError, match=r"must end in \.npz"):
        call(monkeypatch, reference.main, files["ref"], tmp_path / "ref.npy", "--features", spec)


def test_reference_without_images_and_flags_out_of_range(files, tmp_path, monkeypatch, capsys):
    out, spec = tmp_path / "new" / "ref.npz", f"classifier={files['weights']}"
    argv = [files["ref"], out, "--features", spec]
    call(monkeypatch, reference.main, *argv, "--num_images", "0")
    assert "arr_0" not in np.load(out).files
    call(monkeypatch, evaluator.main, out, files["samples"], "--features", spec, "--metrics", "fid")
    assert "Fréchet distance" in capsys.readouterr().out
    for flag, value in {
        "--num_images": "-1",
        "--seed": "-1",
        "--image_size": "-4",
        "--batch_size": "0",
    }.items():
        with pytest.raises(SystemExit):
            call(monkeypatch, reference.main, *argv, flag, value)
        assert f"argument {flag}: must be at least" in capsys.readouterr().err
    with pytest.raises(UserError, match="--num_images 1"):
        call(monkeypatch, reference.main, *argv, "--num_images", "1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(files, monkeypatch):
    argv = [
        files["ref"],
        files["samples"],
        "--features",
        f"classifier={files['weights']}",
        "--device",
        "cuda",
    ]
    with pytest.raises(UserError, match="--device cuda: torch sees no CUDA device"):
        call(monkeypatch, evaluator.main, *argv)


def test_the_place_is_tried_before_the_work_and_the_table_is_shown_whatever_happens(
    files, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluator, "measuring", lambda *_: pytest.fail("too late"))
    argv = [files["ref"], files["samples"], "--features", f"classifier={files['weights']}"]
    with pytest.raises(UserError, match=r"--out .* is a folder"):
        call(monkeypatch, evaluator.main, *argv, "--out", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file cannot be written"):
        call(monkeypatch, evaluator.main, *argv, "--out", tmp_path / "file" / "x.json")
    with (
        Claim(tmp_path / "x.json"),
        pytest.raises(UserError, match=r"x\.json is being written by process"),
    ):
        call(monkeypatch, evaluator.main, *argv, "--out", tmp_path / "x.json")
    monkeypatch.undo()
    monkeypatch.setattr(evaluator, "save_json", lambda *_: (_ for _ in ()).throw(UserError("disk full")))
    with pytest.raises(UserError, match="disk full"):
        call(monkeypatch, evaluator.main, *argv, "--out", tmp_path / "x.json")
    assert "Accuracy" in capsys.readouterr().out


@pytest.mark.mpi
def test_an_error_is_one_line_and_exit_code_2(files, tmp_path):
    bad = tmp_path / "bad.npz"
    np.savez(bad, arr_0=np.zeros((4, 8, 8, 3), np.float32))
    argv = ["-m", "evaluations.evaluator", files["ref"], bad, "--features", f"classifier={files['weights']}"]
    done = launch(argv, n=2)
    assert done.returncode == 2 and done.stderr.count("error:") == 1
    assert "bad.npz: arr_0 is float32" in done.stderr and "Traceback" not in done.stderr
