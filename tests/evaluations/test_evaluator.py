"""The evaluator from files to numbers: against the metrics' own functions, over ranks, and its refusals."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cm.errors import UserError
from evaluations import evaluator
from evaluations.evaluator import Options, evaluate, table
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
from tests.helpers.eval_files import stripes, write_npz
from tests.helpers.evaluation import ALL, CPU, DIGITS, measure
from tests.helpers.inception_files import rule_network, write_openai
from tests.helpers.models import save_consistency_model
from tests.helpers.mp import run_ranks


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
