"""The evaluator from files to numbers: against the metrics' own functions, over ranks, and its refusals."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cm
from cm.config.rows import METRICS
from cm.errors import UserError
from cm.runtime.claims import Claim
from cm.storage.weights import load_weights, save_weights
from evaluations import evaluator, reference, small_classifier
from evaluations.evaluator import Options, evaluate, parse_metrics, table
from evaluations.features import load_features
from evaluations.fid import frechet_distance
from evaluations.inception_score import inception_score
from evaluations.kid import kernel_distance
from evaluations.npz_io import open_images, open_reference
from evaluations.pipeline import extract, image_batches
from evaluations.precision_recall import precision_recall
from evaluations.protocols import PROTOCOLS, choose_protocol, mismatches
from evaluations.reference import build_reference, inspect
from tests.helpers import golden_data
from tests.helpers.eval_files import stripes, write_classifier, write_npz
from tests.helpers.inception_files import rule_network, write_openai
from tests.helpers.models import save_consistency_model
from tests.helpers.mp import launch, run_ranks

CPU = torch.device("cpu")
DIGITS = PROTOCOLS["classifier"]
ALL = Options(DIGITS, tuple(METRICS), batch_size=16, bootstrap=4)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A reference of 70 images, samples of 50, and the classifier, as paths."""
    folder = tmp_path_factory.mktemp("eval")
    return {
        "ref": str(write_npz(folder / "ref.npz", 70)),
        "samples": str(write_npz(folder / "samples.npz", 50, seed=1)),
        "weights": str(write_classifier(folder / "classifier.pt")),
    }


@pytest.fixture(scope="module")
def network(files):
    return load_features(f"classifier={files['weights']}", "", CPU)


def measure(files, network, options=ALL, **kwargs) -> dict:
    return evaluate(open_reference(files["ref"]), [open_images(files["samples"])], network, options, **kwargs)


def pooled(network, path: str) -> torch.Tensor:
    images = open_images(path)
    return torch.cat([network(torch.tensor(b))["pool"] for b in images.batches(range(images.shape[0]), 32)])


def gaussian(features: torch.Tensor) -> tuple:
    return features.double().mean(0), features.double().T.cov()


def test_values_are_those_of_the_metrics(files, network):
    result = measure(files, network)
    ref, sam = pooled(network, files["ref"]), pooled(network, files["samples"])
    precision, recall = precision_recall(ref, sam, 3)
    expected = {
        "fid": frechet_distance(*gaussian(ref), *gaussian(sam)),
        "inception_score": inception_score(sam, network.classifier),
        "precision": precision,
        "recall": recall,
        "kid": kernel_distance(ref, sam)[0],
    }
    labels = stripes(50, seed=1)[1]
    expected["accuracy"] = float(np.mean((sam @ network.classifier.T).argmax(1).numpy() == labels))
    assert result["metrics"] == pytest.approx(expected, rel=1e-6)
    assert expected["accuracy"] > 0.9
    assert result["not_measured"] == {"sfid": "classifier has no spatial features"}
    assert result["intervals"]["fid"]["replicates"] == 4 and result["comparable"]


def test_a_set_against_itself(files, network):
    images = open_images(files["ref"])
    result = evaluate(open_reference(files["ref"]), [images], network, replace(ALL, bootstrap=0))["metrics"]
    assert result["fid"] == pytest.approx(0, abs=1e-6)
    assert (result["precision"], result["recall"]) == (1, 1)


def test_provenance_and_table(files, network):
    result = measure(files, network)
    assert json.loads(json.dumps(result)) == result
    assert result["samples"]["count"] == 50 and result["samples"]["shape"] == [8, 8, 1]
    for part in (result["samples"], result["reference"], result["features"]):
        assert len(part["sha256"]) == 64
    assert result["protocol"]["name"] == "classifier" and {"cm", "torch", "numpy", "python"} <= set(
        result["versions"]
    )
    text = table(result)
    for line in ("Fréchet distance  ", "Classifier score", "Accuracy", "95 %", "sFID", "50 images"):
        assert line in text


def test_several_sets_of_samples_give_a_range(files, network, tmp_path):
    more = [files["samples"], str(write_npz(tmp_path / "b.npz", 40, seed=2)), files["ref"]]
    options = replace(ALL, bootstrap=0, metrics=("fid", "accuracy"))
    images = [open_images(p) for p in more]
    result = evaluate(open_reference(files["ref"]), images, network, options, seeds=3)
    values = [run["metrics"]["fid"] for run in result["runs"]]
    summary = result["summary"]["fid"]
    assert summary == pytest.approx(
        {"mean": np.mean(values), "min": min(values), "max": max(values), "std": np.std(values, ddof=1)}
    )
    assert result["metrics"]["fid"] == summary["mean"] and len(result["models"]) == 1
    assert f"{summary['mean']:.4f} ({summary['min']:.4f} to {summary['max']:.4f})" in table(result)
    with pytest.raises(UserError, match="--seeds 2: 3 sets"):
        evaluate(open_reference(files["ref"]), images, network, options, seeds=2)


def described(path, model, seed, nfe) -> str:
    """Samples with the metadata of a model's run."""
    write_npz(path, 30, seed=seed)
    meta = {"model_path": f"{model}/checkpoints/step_1/ema.pt", "model_sha256": model, "nfe": nfe}
    meta["config"] = {"seed": seed, "out_dir": str(path), "sampler": "heun", "steps": 18}
    path.with_suffix(".json").write_text(json.dumps(meta))
    return str(path)


def test_models_are_compared_in_one_table(files, network, tmp_path):
    paths = [
        described(tmp_path / f"{m}{s}.npz", f"runs/{m}", s, n) for m, s, n in (("a", 1, 35), ("b", 1, 1))
    ]
    paths += [described(tmp_path / "a2.npz", "runs/a", 2, 35), files["samples"]]
    options = replace(ALL, bootstrap=0, metrics=("fid",))
    result = evaluate(open_reference(files["ref"]), [open_images(p) for p in paths], network, options)
    found = [(m["name"], m["sampler"], m["nfe"], m["seeds"]) for m in result["models"]]
    assert found == [
        ("a", "heun 18", 35, 2),
        ("b", "heun 18", 1, 1),
        (Path(files["samples"]).name, "", None, 1),
    ]
    runs = [run["metrics"]["fid"] for run in result["runs"]]
    assert result["models"][0]["metrics"]["fid"] == pytest.approx((runs[0] + runs[2]) / 2)
    assert "metrics" not in result  # a mean over models says nothing
    lines = table(result).splitlines()[-4:]
    assert lines[0].split() == ["model", "sampler", "NFE", "images", "Fréchet", "distance"]
    assert lines[2].endswith(f"{runs[1]:.4f}")


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


def test_models_are_drawn_before_they_are_measured(files, tmp_path, monkeypatch, capsys):
    model = tmp_path / "m.pt"
    save_consistency_model(model, in_channels=1)
    argv = ["x", files["ref"], str(model), files["samples"], "--features", f"classifier={files['weights']}"]
    argv += [
        "--seeds",
        "2",
        "--num_samples",
        "4",
        "--metrics",
        "fid",
        "--sampler",
        "onestep",
        "--grid_images",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    evaluator.main()
    result = json.loads((tmp_path / f"m_vs_{Path(files['ref']).stem}.json").read_text())
    assert [m["seeds"] for m in result["models"]] == [2, 1] and result["models"][0]["nfe"] == 1
    assert [run["samples"]["count"] for run in result["runs"]] == [4, 4, 50]
    assert result["runs"][0]["samples"]["sha256"] != result["runs"][1]["samples"]["sha256"]
    assert len(list(tmp_path.glob("samples/*/samples_4x8x8x1.npz"))) == 2
    monkeypatch.setattr(
        sys, "argv", [*argv, "--out_dir", str(tmp_path / "elsewhere")]
    )  # of a run one cannot write to
    evaluator.main()
    assert len(list(tmp_path.glob("elsewhere/samples/*/samples_4x8x8x1.npz"))) == 2
    monkeypatch.setattr(sys, "argv", ["x", files["ref"], files["samples"], "--sampler", "onestep"])
    with pytest.raises(SystemExit):
        evaluator.main()
    assert "--sampler: unknown flag" in capsys.readouterr().err


def test_a_built_reference_gives_the_numbers_of_its_images(files, network, tmp_path):
    out = str(tmp_path / "built.npz")
    meta = build_reference(open_images(files["ref"]), network, DIGITS, out, num_images=20, batch_size=9)
    assert (meta["count"], meta["images"], meta["shape"]) == (70, 20, [8, 8, 1])
    whole = measure(files, network)["metrics"]["fid"]
    built = measure({**files, "ref": out}, network)
    assert built["metrics"]["fid"] == pytest.approx(whole, rel=1e-6)
    found = inspect(out)
    assert found["images_for_precision_and_recall"] == 20 and found["meta"]["source_sha256"]
    assert found["arrays"] == {"mu": [64], "sigma": [64, 64], "arr_0": [20, 8, 8, 1]}
    stored = open_reference(out).images
    pixels = np.concatenate(list(stored.batches(range(20), 20)))
    known = {image.tobytes() for image in stripes(70)[0]}
    assert {image.tobytes() for image in pixels} <= known


def test_statistics_alone_leave_out_what_needs_images(files, network, tmp_path):
    mu, sigma = gaussian(pooled(network, files["ref"]))
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma)
    result = measure({**files, "ref": str(tmp_path / "stats.npz")}, network)
    assert set(result["metrics"]) == {"fid", "inception_score", "accuracy"}
    assert "no images" in result["not_measured"]["precision"]
    assert result["metrics"]["fid"] == pytest.approx(measure(files, network)["metrics"]["fid"], rel=1e-6)


def test_inception_metrics_from_golden_features(tmp_path):
    g = golden_data.load("evaluation")
    images = g["inception/r32/images_nhwc"]
    np.savez(tmp_path / "ref.npz", arr_0=images)
    np.savez(tmp_path / "samples.npz", arr_0=images[:, :, ::-1].copy())
    network = load_features(f"inception={write_openai(tmp_path / 'i.pt')}", "", CPU)
    ref, samples = open_reference(str(tmp_path / "ref.npz")), open_images(str(tmp_path / "samples.npz"))
    options = Options(
        PROTOCOLS["adm"], ("inception_score",)
    )  # a Fréchet distance in 2048 dimensions takes seconds
    result = evaluate(ref, [samples], network, options, strict=False)
    pool, _ = rule_network()(g.tensor("inception/r32/images_nhwc").flip(2).permute(0, 3, 1, 2).float())
    score = inception_score(pool, rule_network().output.weight)
    assert result["metrics"]["inception_score"] == pytest.approx(score, rel=1e-6)
    assert not result["comparable"] and "50,000 samples" in result["notes"][0]
    extracted = extract(image_batches(ref.images, 2), network, kinds=network.dims, keep=False, source="ref")
    for kind, key in (("pool", "pool_3"), ("spatial", "spatial")):
        mean, covariance = extracted.gaussian(kind)
        golden = g[f"inception/r32/{key}"]
        np.testing.assert_allclose(mean, golden.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(covariance.diag(), golden.var(0, ddof=1), rtol=1e-3, atol=1e-5)


# --- ranks ---------------------------------------------------------------------------------------


def measure_on_rank(files: dict) -> dict:
    network = load_features(f"classifier={files['weights']}", "", CPU)
    result = measure(files, network)
    batches = [rows for rows, _ in image_batches(open_images(files["samples"]), 16)]
    out = files["samples"] + ".ref.npz"
    meta = build_reference(open_images(files["ref"]), network, DIGITS, out, num_images=20, batch_size=9)
    return {"result": result, "batches": batches, "meta": meta}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_give_the_same_numbers(files, network, world_size, tmp_path):
    alone = measure(files, network)
    ranks = run_ranks("tests.evaluations.test_evaluator:measure_on_rank", world_size, files)
    covered = sorted(row for r in ranks for rows in r["batches"] for row in rows)
    assert covered == list(range(50))
    for rank in ranks:
        assert rank["result"]["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)
        assert rank["result"]["intervals"]["fid"] == pytest.approx(alone["intervals"]["fid"], rel=1e-5)
    together = open_reference(files["samples"] + ".ref.npz")
    build_reference(open_images(files["ref"]), network, DIGITS, str(tmp_path / "r.npz"), num_images=20)
    single = open_reference(str(tmp_path / "r.npz"))
    np.testing.assert_allclose(together.statistics["pool"][1], single.statistics["pool"][1], atol=1e-12)
    pixels = [next(iter(r.images.batches(range(20), 20))) for r in (together, single)]
    assert np.array_equal(*pixels)


# --- protocols -----------------------------------------------------------------------------------


def test_the_protocol_follows_name_reference_or_network(files, network, tmp_path):
    plain = open_reference(files["ref"])
    assert choose_protocol("cifar10", "", plain) == (PROTOCOLS["cifar10"], True)
    assert choose_protocol("", "", plain) == (PROTOCOLS["adm"], False)
    assert choose_protocol("", "digits=x.pt", plain) == (DIGITS, False)
    assert choose_protocol("", "", replace(plain, meta={"protocol": "cifar10"})) == (
        PROTOCOLS["cifar10"],
        False,
    )
    with pytest.raises(UserError, match="--protocol tf"):
        choose_protocol("tf", "", plain)


MISMATCHES = {
    "made for protocol adm.*measured by classifier": {"protocol": "adm"},
    "features of inception.*measured by classifier": {"features": "inception"},
    "classifier weights 000000000000.*measured with": {"features_sha256": "0" * 64},
    r"used transform 'bicubic'.*get 'none": {"transform": "bicubic"},
    r"is 16x16.*are 8x8": {"shape": [16, 16, 1]},
}


@pytest.mark.parametrize("message", MISMATCHES)
def test_a_mismatch_names_both_sides(files, network, message):
    ref = replace(open_reference(files["ref"]), meta=MISMATCHES[message])
    samples = open_images(files["samples"])
    with pytest.raises(UserError, match=message) as error:
        evaluate(ref, [samples], network, ALL)
    assert files["ref"] in str(error.value) and files["samples"] in str(error.value)
    forced = evaluate(ref, [samples], network, replace(ALL, bootstrap=0), force=True)
    assert not forced["comparable"] and len(forced["notes"]) == 1 and "fid" in forced["metrics"]


def test_a_strict_protocol_counts_samples(files, network):
    counted = replace(DIGITS, num_samples=60)
    ref, samples = open_reference(files["ref"]), open_images(files["samples"])
    errors, notes = mismatches(counted, ref, samples, network, strict=True)
    assert len(errors) == 1 and "60 samples" in errors[0] and "50" in errors[0] and not notes
    errors, notes = mismatches(counted, ref, samples, network, strict=False)
    assert not errors and "not comparable" in notes[0]


def test_other_quantisation_and_other_network_are_errors(files, network):
    ref, samples = open_reference(files["ref"]), open_images(files["samples"])
    samples.meta = {"quantisation": "round"}
    assert "truncate" in mismatches(DIGITS, ref, samples, network, True)[0][0]
    samples.meta = None
    assert "adm uses inception" in mismatches(PROTOCOLS["adm"], ref, samples, network, False)[0][0]


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
