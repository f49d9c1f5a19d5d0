"""The benchmarks measure what they say: phases, memory, shares, rows and their files."""

import json

import pytest
import torch
import torch.nn.functional as F

from cm.config.derived import compares_by_lpips, training_mode
from cm.config.registry import resolve
from cm.config.rows import OBJECTIVES
from cm.config.scripts import changed
from cm.errors import UserError
from cm.tools.bench import network, optimizer
from cm.tools.bench.command import SUITES
from cm.tools.bench.runs import TINY_CASES, Options, train_cases, train_config, training
from cm.tools.bench.train import bench_train, overhead_share
from cm.tools.planning.step import step_flops
from cm.tools.profiling.kernels import is_filter, time_shares
from cm.tools.profiling.report import Report, Row, compare, environment, load_report
from cm.tools.profiling.timing import PhaseClock, Timing, beside_peers, interleaved, peak_memory
from cm.training.factory import create_objective
from cm.training.memory import bytes_per_image
from tests.helpers.mp import run_ranks

CPU = torch.device("cpu")
TIMES = {"median_ms", "q25_ms", "q75_ms", "cpu_ms", "repeats"}


def once(*cases, **options):
    return Options(device="cpu", cases=cases, warmup=0, repeats=1, **options)


@pytest.mark.parametrize(
    ("case", "phases"),
    [
        ("cd", {"teacher", "target"}),
        ("cont_cd", {"teacher"}),
        ("ctm", {"teacher", "target"}),
        ("meanflow", set()),
    ],
)
def test_phases_of_a_training_step(case, phases):
    (row,) = bench_train(once(case))
    assert row.name == f"train/{case}"
    assert row.figures.keys() >= TIMES | {"images_per_second", "peak_memory_mib", "share_of_ceiling"}
    times = row.figures["phases_ms"]
    assert times.keys() >= phases | {"student", "backward", "optimizer", "ema", "draw", "data wait", "other"}
    own = sum(time for name, time in times.items() if name not in ("step", "log"))
    assert own == pytest.approx(times["step"], abs=0.01)
    assert all(time >= 0 for time in times.values())
    assert 0 < row.figures["overhead_share"] == overhead_share(times) < 1


def test_overhead_is_what_is_no_networks_and_no_distances():
    times = {"student": 4.0, "target": 1.0, "teacher": 2.0, "distance": 1.0, "backward": 8.0}
    times |= {"optimizer": 2.0, "data wait": 1.0, "other": 0.5, "log": 0.5, "step": 19.5}
    assert overhead_share(times) == pytest.approx(4 / 20)


def test_every_objective_has_a_case():
    options = Options(device="cpu")
    modes = {case: training_mode(train_config(options, case)) for case in train_cases(options)}
    assert modes["cont_cd"] == "continuous_distillation" and modes["cont_ct"] == "continuous_training"
    assert train_config(options, "cd_euler").ode_solver == "euler"
    assert modes.keys() == TINY_CASES.keys()
    assert set(modes.values()) == {name for name, row in OBJECTIVES.items() if row.draws}


def test_rows_say_which_objectives_compare_images():
    """LPIPS is planned for, and given weights, where it is computed."""
    options = Options(device="cpu")
    for case in train_cases(options):
        config = train_config(options, case)
        compares = create_objective(config).distance is not None
        assert compares == OBJECTIVES[training_mode(config)].compares, case
        assert compares_by_lpips(config) == (case == "cd_lpips")
    flow = train_config(Options(device="cpu", flags=("--loss_norm", "lpips")), "meanflow")
    assert not compares_by_lpips(flow) and "distance" not in step_flops(flow)
    assert bytes_per_image(flow) == bytes_per_image(changed(flow, loss_norm="l2"))


def test_phase_clock_adds_up_calls():
    clock = PhaseClock(CPU)
    wait = clock.wrap("wait", lambda seconds: torch.zeros(1))
    wait(0)
    with clock.phase("all"):
        wait(0)
        wait(0)
    times = clock.read()
    assert times.keys() == {"wait", "all"} and min(times.values()) > 0
    assert clock.read() == {}


def test_ratios_to_the_fastest_peer():
    """By medians, and turn by turn: a machine that slows down for all alike changes the second only within a turn."""
    times = {"cm": [1.0, 4.0, 9.0], "slow": [9.0, 9.0, 9.0], "fast": [2.0, 5.0, 10.0]}
    found = beside_peers({name: Timing(seconds, seconds) for name, seconds in times.items()})
    assert found["best_peer"] == "fast" and found["peers"].keys() == {"slow", "fast"}
    assert found["ratio_to_best_peer"] == found["cpu_ratio_to_best_peer"] == 0.8
    # 0.5, 0.8 and 0.9, each twice
    assert found["ratio_by_turn"] == pytest.approx([0.575, 0.8, 0.875])


def test_interleaved_calls_in_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = interleaved(runs, CPU, warmup=1, repeats=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert timings["a"].summary().keys() == TIMES and len(timings["b"].cpu_seconds) == 3


def test_peak_memory_counts_what_lives_at_once():
    def run():
        first = torch.zeros(1_000_000)
        second = torch.zeros(500_000)
        del first
        third = torch.zeros(250_000)
        del second, third

    assert peak_memory(run, CPU) == 4 * 1_500_000


def test_time_shares():
    x, weight, filters = torch.randn(2, 16, 32, 32), torch.randn(16, 16, 3, 3), torch.randn(16, 1, 4, 4)
    convolution = time_shares(lambda: F.conv2d(x, weight), CPU)
    assert convolution["non_convolution_share"] < 0.5 and convolution["resampling_share"] == 0
    filtering = time_shares(lambda: F.conv2d(x, filters, groups=16), CPU)
    assert filtering["resampling_share"] == pytest.approx(1 - filtering["non_convolution_share"])
    assert time_shares(lambda: x @ x, CPU)["non_convolution_share"] == 1


def test_filters_have_a_kernel_per_channel():
    assert is_filter([16, 1, 4, 4])
    assert not any(map(is_filter, ([16, 16, 3, 3], [16, 1, 1, 1], [16, 1, 4], [])))


def test_rows_of_networks(monkeypatch):
    tiny = {"image_size": 8, "num_channels": 32, "channel_mult": "1,1", "num_res_blocks": 1}
    monkeypatch.setattr(network, "SIZES", {"8px": (2, {**tiny, "attention_resolutions": "4"})})
    monkeypatch.setattr(network, "CIFAR10", {**tiny, "attention_resolutions": "4"})
    rows = {row.name: row for row in network.bench_network(once("8px", "ddpmpp"))}
    assert list(rows) == [
        f"network/{case}/{kind}" for case in ("8px", "ddpmpp") for kind in ("forward", "step")
    ]
    figures = rows["network/8px/step"].figures
    assert figures.keys() >= TIMES | {
        "ratio_to_best_peer",
        "cpu_ratio_to_best_peer",
        "memory_ratio_to_best_peer",
    }
    assert "plain" in figures["peers"] and figures["best_peer"] in figures["peers"]
    row = rows["network/ddpmpp/step"]
    assert 0 < row.figures["non_convolution_share"] < 1 and "FIR" in row.config["convolution"]


def test_contestants_agree():
    config = network.configure(
        network.SampleConfig, image_size=8, num_channels=64, channel_mult="1,1", num_res_blocks=1,
        attention_resolutions="4", use_scale_shift_norm=True, resblock_updown=True, in_channels=3,
    )  # fmt: skip
    x, times = network.make_inputs(config, 2, CPU)
    outputs = [call(x, times) for _, call in network.make_contestants(config, CPU).values()]
    assert len(outputs) >= 2
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("suite", [name for name in SUITES if name not in ("edit", "data")])
def test_unknown_cases_are_refused(suite):
    with pytest.raises(UserError, match="--case nosuch: choose from"):
        resolve(SUITES[suite])(once("nosuch"))


def two_ranks():
    with training(train_config(once("edm"), "edm")) as trainer:
        (row,) = bench_train(once("edm"))
        return sum(p.numel() for p in trainer.model.parameters()), row


@pytest.mark.mpi
def test_communication_of_two_ranks():
    """A ring of two: each sends half of its gradients to be summed, and half of the sums."""
    for parameters, row in run_ranks("tests.tools.test_bench:two_ranks", 2):
        found = row.figures["communication"]
        assert found["bytes_per_rank"] == 4 * parameters
        assert found["all_reduce_ms"] > 0
        assert 0 <= found["overlap"] <= 1
    assert "train/edm: each rank sends" in Report([row]).table().splitlines()[-1]


def test_report_files(tmp_path):
    rows = [
        Row(name, {"batch": 2}, {"median_ms": ms, "peak_memory_mib": 8.0})
        for name, ms in (("a", 2.0), ("b", 3.0))
    ]
    before, after = str(tmp_path / "before.json"), str(tmp_path / "sub" / "after.json")
    Report(rows, environment(CPU)).save(before)
    Report([Row("a", {}, {"median_ms": 1.0, "peak_memory_mib": 4.0})], environment(CPU)).save(after)
    assert load_report(before).rows == rows
    table = compare(before, after)
    assert "| a | 2 | 1 | 0.500 | 0.500 |" in table and "| b |" not in table
    known = load_report(before).environment
    assert (
        known.keys() >= {"date", "commit", "versions", "device", "threads"} and "torch" in known["versions"]
    )
    assert Report(rows).table().count("\n") == 3


def test_files_that_cannot_be_compared(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path in paths:
        Report([Row(path, {}, {"median_ms": 1.0})], {}).save(path)
    with pytest.raises(UserError, match="no row in common"):
        compare(*paths)
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"rows": 3}))
    with pytest.raises(UserError, match="is not a report"):
        load_report(str(broken))


def test_optimizers_are_compared_on_the_same_weights(monkeypatch):
    flags = network.SIZES["16px"][1]
    monkeypatch.setattr(optimizer, "SIZE", "16px")
    monkeypatch.setitem(optimizer.UPDATES, "30m", "16px")
    monkeypatch.setitem(network.SIZES, "16px", (2, flags))
    update, step = optimizer.bench_optimizer(once("30m", "edm"))
    assert update.config["parameters"] == step.config["parameters"] > 1e6 and step.config["batch_size"] == 2
    for row in (update, step):
        assert row.figures.keys() >= TIMES and row.figures["peers"].keys() == optimizer.MAKERS.keys() - {"cm"}
    assert step.figures["update"]["median_ms"] < step.figures["median_ms"]
    assert -1 < step.figures["fused_would_save"] < 1
