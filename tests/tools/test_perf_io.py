"""Bars of data, noise, checkpoints, start-up, editing and evaluation; processor time where one process does the work.

python -m pytest -m perf tests/tools/test_perf_io.py
"""

import pytest
import torch

from cm.tools.bench.checkpoint import bench_checkpoint
from cm.tools.bench.data import bench_data
from cm.tools.bench.runs import Options
from cm.tools.bench.sample import bench_edit, bench_sample
from cm.tools.bench.startup import SCRIPTS, bench_startup
from cm.tools.bench.train import bench_train
from evaluations.bench import bench_frechet, bench_precision_recall

pytestmark = pytest.mark.perf
CPU = torch.device("cpu")


def figures(rows):
    return {row.name: row.figures for row in rows}


def test_data_per_core():
    rows = figures(bench_data(Options()))
    for name in ("data/jpeg", "data/store64", "data/jpeg_store64"):
        assert rows[name]["images_per_second"] >= rows[name]["bar_images_per_second"], name
    # Decoding files costs what Pillow costs; the store is what a run should read.
    for name in ("data/store64", "data/jpeg_store64"):
        assert rows[name]["ratio_to_best_peer"] <= 1 / 1.5, name


@pytest.mark.parametrize("preset", ["digits_edm", "digits_cd", "digits_ct"])
def test_data_wait_in_the_quick_start(preset):
    (row,) = bench_train(Options(preset=preset, device="cpu", flags=("--batch_size", "64")))
    assert row.figures["phases_ms"]["data wait"] < 0.02 * row.figures["phases_ms"]["step"]


def test_noise_of_a_batch_costs_the_same_for_any_number_of_samples():
    rows = figures(bench_sample(Options(cases=("noise",), device="cpu")))
    assert all(f["ratio_to_fewest"] < 1.5 for f in rows.values())


@pytest.mark.parametrize("flags", [(), ("--num_channels", "128")], ids=["tiny", "larger"])
def test_a_save_stalls_the_loop_by_less_than_a_step(flags):
    rows = figures(bench_checkpoint(Options(device="cpu", flags=flags)))
    assert rows["checkpoint/stall"]["steps"] < 1


def test_startup():
    rows = figures(bench_startup(Options(cases=("cm", *(f"help_{name}" for name in SCRIPTS)))))
    assert all(rows[f"startup/help_{name}"]["median_ms"] < 1000 for name in SCRIPTS)
    assert rows["startup/cm"]["beyond_cpu_ms"] < 300


def test_editing_operators_beside_a_network_at_256_pixels():
    rows = bench_edit(
        Options(preset="bedroom256_cd_lpips", device="cpu", repeats=1, flags=("--batch_size", "1"))
    )
    assert len(rows) == 3 and all(row.figures["share_of_network"] < 0.02 for row in rows)


def test_metrics_beside_their_arithmetic():
    (frechet,) = bench_frechet(Options(repeats=3), CPU)
    assert frechet.figures["ratio_to_best_peer"] < 1 / 4
    (recall,) = bench_precision_recall(Options(repeats=1), CPU)
    assert recall.figures["ratio_to_best_peer"] < 2
