"""Plans as the command prints them: machines, measurements, configurations, and refusals."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cm.commands.cli import parse_config
from cm.commands.fit import fitted
from cm.config.derived import stored_config
from cm.config.scripts import SCRIPTS, CmTrainConfig, configure
from cm.errors import UserError
from cm.tools.bench.runs import Options, train_config, training
from cm.tools.planning import command, report, run
from cm.tools.planning.devices import DEVICES, GIB, Cluster, cpu, device_named, parse_cluster
from cm.tools.planning.estimate import (
    plan_step,
)
from cm.tools.planning.run import plan_training, read_measured
from cm.tools.planning.step import make_network
from cm.tools.profiling.report import Report, Row
from cm.tools.profiling.timing import interleaved, peak_memory, product_ceiling
from tests.helpers.mp import ROOT

TINY = parse_config(CmTrainConfig, ["--preset", "tiny"])
GPU = Cluster(DEVICES["A100-80"], 8)


@pytest.mark.parametrize("text", ["H200", "8", "8xH300", "0xH100", "x", "8 H100"])
def test_unknown_gpus_are_told_which_there_are(text):
    with pytest.raises(UserError, match=r"--gpus.*H200, L40S"):
        parse_cluster(text)


def test_a_report_calibrates_and_is_checked(tmp_path):
    config = {
        "batch_size": 4,
        "preset": "tiny",
        "training_mode": "consistency_distillation",
        "image_size": 16,
    }
    config |= {"num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1, "attention_resolutions": "8"}
    config |= {"num_head_channels": 16, "loss_norm": "l2"}
    step = plan_step(configure(CmTrainConfig, **config), Cluster(cpu(1e11), 1))
    figures = {"median_ms": 5e3, "cpu_ms": 3e3 * step.time.total, "flops_per_second": 1e10}
    figures |= {"ceiling_flops_per_second": 1e11, "peak_memory_mib": 100.0}
    path = tmp_path / "report.json"
    Report([Row("train/cd", config, figures)], {"threads": 1, "device": "a CPU"}).save(str(path))
    cluster, measured = read_measured(str(path), "1xCPU")
    assert cluster.name == "1xCPU"
    assert measured.slowdown == pytest.approx(3.0)
    [(name, seconds, planned, peak, planned_peak)] = measured.comparison()
    assert (name, peak) == ("train/cd", 100 * 2**20)
    assert planned == pytest.approx(seconds)
    assert planned_peak == step.peak
    with pytest.raises(UserError, match="not what a H100 does"):
        read_measured(str(path), "8xH100")
    Report([], {}).save(str(path))
    with pytest.raises(UserError, match="no row"):
        read_measured(str(path), "1xCPU")


def run_plan(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/plan.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    path = tmp_path / "plan.json"
    result = run_plan(
        "tiny", "digits_cd", "--gpus", "2xL40S", "--price", "2", "--json", str(path), "--microbatch", "2"
    )
    assert result.returncode == 0, result.stderr
    assert "| tiny | 2xL40S | fp32 | 4 | 2 |" in result.stdout
    assert "ASSUMED" in result.stdout
    content = json.loads(path.read_text())
    assert [plan["preset"] for plan in content["plans"]] == ["tiny", "digits_cd"]
    first = content["plans"][0]
    assert first["cost"] == pytest.approx(2 * first["gpu_hours"])
    assert first["gpu_hours"] == pytest.approx(2 * 4 * sum(first["step"]["time"].values()) / 3600)


@pytest.mark.parametrize(
    "name, gib, kind",
    [
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100-80"),
        ("NVIDIA A100-PCIE-40GB", 39.4, "A100-40"),
        ("Tesla V100-SXM2-16GB", 15.8, "V100-16"),
        ("NVIDIA H100 80GB HBM3", 79.2, "H100"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX4090"),
        ("NVIDIA GeForce GT 710", 2.0, ""),
    ],
)
def test_a_gpu_is_known_by_what_its_driver_calls_it(name, gib, kind):
    if kind:
        assert device_named(name, int(gib * GIB)) == kind
    else:
        with pytest.raises(UserError, match="GT 710, is unknown: --gpus says"):
            device_named(name, int(gib * GIB))


def test_without_gpus_the_plan_is_for_this_machine(monkeypatch, capsys):
    monkeypatch.setattr(run, "choose_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(run, "product_ceiling", lambda device, dtype: 1e11)
    monkeypatch.setattr(run, "available", lambda device: 10 * GIB)
    monkeypatch.setattr(sys, "argv", ["plan", "tiny"])
    command.main(*command.parse())
    shown = capsys.readouterr().out
    assert "| tiny | 1xCPU | fp32 | 8 | 8 |" in shown and "just measured: 100 GFLOP/s" in shown
    plan = plan_training("tiny", run.cluster_of("1xcpu"))
    assert plan.fits and plan.cluster.device.memory == 10 * GIB
    expected = plan_training("tiny", Cluster(cpu(1e11), 1))
    assert plan.hours == expected.hours
    # What does not fit into its memory is split, as on a GPU.
    monkeypatch.setattr(run, "available", lambda device: expected.step.memory.total - 1)
    plan = plan_training("tiny", run.cluster_of("1xCPU"))
    assert plan.fits and plan.chosen and plan.step.microbatch == 4


def test_a_plan_of_auto_follows_the_data(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.fromarray(np.full((16, 16), 10 * i, np.uint8)).save(tmp_path / name / f"{i}.png")
    plan = plan_training("auto", Cluster(cpu(1e11), 1), ["--data_dir", str(tmp_path)])
    made = fitted(parse_config(SCRIPTS["edm_train"], ["--preset", "auto", "--data_dir", str(tmp_path)]))
    assert (made.image_size, made.in_channels, made.num_classes) == (16, 1, 2)
    network = sum(p.numel() for p in make_network(made).parameters())
    assert plan.step.memory.student == 4 * network and plan.step.images == 20
    # A file without a preset is what cm train makes of it.
    file = tmp_path / "three.json"
    file.write_text(json.dumps({"data_dir": str(tmp_path), "lr": 1e-3}))
    again = plan_training(str(file), Cluster(cpu(1e11), 1))
    assert (again.step, again.steps) == (plan.step, plan.steps)


def test_bad_input_is_one_line():
    result = run_plan("nothing", "--gpus", "8xH200")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "python -m cm.presets" in result.stderr


def test_a_configuration_has_the_plan_of_its_preset(tmp_path):
    cluster = parse_cluster("1xH200")
    config = parse_config(SCRIPTS["cm_train"], ["--preset", "digits_cd"])
    (tmp_path / "config.json").write_text(json.dumps(stored_config(config)))
    expected = plan_training("digits_cd", cluster)
    for path in (tmp_path, tmp_path / "config.json"):
        found = plan_training(str(path), cluster)
        assert (found.step.peak, found.steps) == (expected.step.peak, expected.steps)
    (tmp_path / "few.yaml").write_text("image_size: 8\nnum_channels: 32\nchannel_mult: '1'\n")
    few = [f"--{n}={v}" for n, v in (("image_size", 8), ("num_channels", 32), ("channel_mult", "1"))]
    pytest.importorskip("yaml")
    found = plan_training(str(tmp_path / "few.yaml"), cluster)
    (tmp_path / "none.json").write_text("{}")
    assert found.step.peak == plan_training(str(tmp_path / "none.json"), cluster, few).step.peak
    with pytest.raises(UserError, match=r"gone\.yaml"):
        plan_training(str(tmp_path / "gone.yaml"), cluster)


def test_a_preset_without_an_end_says_so():
    plan = replace(plan_training("tiny", GPU), steps=0)
    assert "until stopped" in report.text([plan], None, 0.0)


FLAGS = (
    "--image_size 32 --num_channels 64 --channel_mult 1,2,2 --num_res_blocks 2 --attention_resolutions 16,8"
)
CHECKED = {
    "edm": (),
    "cd": (),
    "ct": (),
    "pd": (),
    "cd_lpips": (),
    "checkpointed": ("--use_checkpoint", "True"),
}


@pytest.mark.perf
def test_plans_from_one_measurement_meet_the_others():
    """Calibrated on EDM, every other step's time within 15% and its peak memory within 5%."""
    device = torch.device("cpu")
    ceiling = product_ceiling(device, torch.float32)
    slowdown = None
    misses = []
    for case, extra in CHECKED.items():
        flags = (*FLAGS.split(), "--num_head_channels", "32", "--batch_size", "16", *extra)
        options = Options(device="cpu", flags=flags)
        config = train_config(options, "cd" if extra else case)
        with training(config) as trainer:

            def step(trainer=trainer):
                trainer.run_step(*next(trainer.data))

            seconds = interleaved({"step": step}, device, warmup=1, repeats=3)["step"].undisturbed(device)
            peak = peak_memory(step, device)
        plan = plan_step(config, Cluster(cpu(ceiling), 1))
        slowdown = slowdown or seconds / plan.time.total
        errors = slowdown * plan.time.total / seconds - 1, plan.peak / peak - 1
        print(f"{case}: time {errors[0]:+.1%}, peak memory {errors[1]:+.1%}")
        if abs(errors[0]) > 0.15 or abs(errors[1]) > 0.05:
            misses.append(case)
    assert not misses
