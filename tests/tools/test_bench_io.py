"""Benchmarks of data, checkpoints, start-up, noise and evaluation: which rows there are, and what they hold."""

import pytest
import torch

from cm.tools.bench import host
from cm.tools.bench.checkpoint import bench_checkpoint
from cm.tools.bench.data import bench_data
from cm.tools.bench.runs import Options
from cm.tools.bench.sample import NOISE_COUNTS, NOISE_KINDS, bench_edit, bench_sample
from cm.tools.bench.startup import bench_startup
from evaluations.bench import bench_frechet, bench_precision_recall

ONCE = {"warmup": 0, "repeats": 1, "device": "cpu"}
CPU = torch.device("cpu")
TIMES = {"median_ms", "q25_ms", "q75_ms", "cpu_ms", "repeats"}


def by_name(rows):
    assert all(row.figures.keys() >= TIMES for row in rows)
    return {row.name: row for row in rows}


def test_data_rows_say_what_is_read_and_what_the_bar_is():
    rows = by_name(bench_data(Options(**ONCE), count=2))
    assert set(rows) == {"data/jpeg", "data/png64", "data/store64", "data/jpeg_store64"}
    for row in rows.values():
        f = row.figures
        plain = f["peers"]["plain"]
        assert f["images_per_second"] == pytest.approx(2e3 / f["cpu_ms"], rel=1e-3)
        assert f["ratio_to_best_peer"] == pytest.approx(f["cpu_ms"] / plain["cpu_ms"], rel=1e-3)
        assert row.config["cores"] == 1
    bars = {name: row.figures["bar_images_per_second"] for name, row in rows.items()}
    assert bars["data/jpeg"] == bars["data/jpeg_store64"] == 375 and bars["data/store64"] == 2500
    # Photographs that are read from a store are not called JPEG, and their peer still decodes them.
    assert rows["data/jpeg_store64"].config["reads"].startswith("its store, prepared once")
    assert rows["data/jpeg_store64"].config["peer_reads"] == "photos"


def test_checkpoint_rows_stand_beside_a_step():
    rows = by_name(bench_checkpoint(Options(**ONCE)))
    assert set(rows) == {f"checkpoint/{name}" for name in ("stall", "write", "load", "step_while_writing")}
    for row in rows.values():
        f = row.figures
        assert f["steps"] == pytest.approx(f["median_ms"] / f["step_ms"], rel=1e-3)
        # Weights, one average, the optimizer's two moments: four times 827,491 numbers of 4 bytes, and little more.
        assert 0 < f["bytes"] / (4 * 4 * 827_491) - 1 < 0.05
        assert row.config["async_save"] is True  # the default
    assert rows["checkpoint/stall"].figures["median_ms"] <= rows["checkpoint/write"].figures["median_ms"]


def test_startup_rows_are_beyond_their_base():
    rows = by_name(bench_startup(Options(cases=("help_image_sample",), **ONCE)))
    assert set(rows) == {"startup/python", "startup/help_image_sample"}
    f, base = rows["startup/help_image_sample"].figures, rows["startup/python"].figures
    assert f["beyond_ms"] == pytest.approx(f["median_ms"] - base["median_ms"], abs=0.01)
    assert f["beyond_cpu_ms"] == pytest.approx(f["cpu_ms"] - base["cpu_ms"], abs=0.01)
    assert base["cpu_ms"] > 0  # the processor time of the program, not of the benchmark


def test_noise_rows_for_few_and_for_many_samples():
    rows = by_name(bench_sample(Options(cases=("noise",), **ONCE)))
    assert set(rows) == {f"noise/{kind}_{count}" for kind in NOISE_KINDS for count in NOISE_COUNTS}
    assert all(
        rows[f"noise/{kind}_{NOISE_COUNTS[0]}"].figures["ratio_to_fewest"] == 1 for kind in NOISE_KINDS
    )


def test_host_rows_are_shares_of_expected_steps(monkeypatch):
    monkeypatch.setattr(host, "BATCH", 4)
    rows = {row.name: row.figures for row in host.bench_host(Options(**ONCE))}
    assert list(rows) == [f"host/{case}" for case in host.CASES]
    for found in rows.values():
        assert found["cpu_ms"] > 0
        assert found["share_of_step"]["cifar10_ddpmpp"] == pytest.approx(
            found["cpu_ms"] / 180, rel=0.01, abs=1e-6
        )


def test_edit_rows_are_shares_of_the_network():
    rows = by_name(bench_edit(Options(**ONCE)))
    assert set(rows) == {"edit/inpaint", "edit/superres", "edit/colorize"}
    for row in rows.values():
        f = row.figures
        assert f["share_of_network"] == pytest.approx(f["median_ms"] / f["network_ms"], rel=0.01)


def test_evaluation_rows_name_their_peer():
    (frechet,) = bench_frechet(Options(**ONCE), CPU, features=8)
    (recall,) = bench_precision_recall(Options(**ONCE), CPU, count=20, features=8)
    assert frechet.figures["best_peer"] == "scipy.linalg.sqrtm"
    assert recall.figures["best_peer"] == "matrix products"
    for row in by_name([frechet, recall]).values():
        f = row.figures
        peer = f["peers"][f["best_peer"]]
        assert f["ratio_to_best_peer"] == pytest.approx(f["median_ms"] / peer["median_ms"], rel=0.01)
