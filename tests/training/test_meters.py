"""What a row of the log says beside the losses: speed, time lost on data, memory; and the summary of a network."""

import json
import time

import pytest
import torch
from torch import nn

from cm.diffusion.denoiser import Denoiser
from cm.diffusion.noise_levels import LogNormalSampler
from cm.diffusion.precond import EDMPrecond
from cm.objectives.base import Roles
from cm.objectives.edm import EDMObjective
from cm.runtime import logger
from cm.storage.saver import Saver
from cm.training import meters
from cm.training.learning_rate import LearningRate
from cm.training.meters import MEASURED, RunClock, module_summary, peak_memory_mib
from cm.training.options import BatchSize, Optimization, Reports
from cm.training.trainer import Trainer
from tests.helpers.models import tiny_unet


@pytest.fixture
def now(monkeypatch):
    """The time in seconds, in a list, that the clock reads."""
    seconds = [100.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: seconds[0])
    return seconds


def test_the_clock_counts_steps_and_waiting_since_the_last_lap(now):
    clock = RunClock(step=10, saved_step=-1)
    for _ in range(2):
        with clock.waiting():
            now[0] += 1.5
        now[0] += 0.5
    assert clock.lap(12) == (2 / 4, 3 / 4)
    now[0] += 5
    assert clock.lap(13) == (1 / 5, 0)
    assert clock.first_step == 10


def test_memory_is_the_largest_so_far():
    before = peak_memory_mib(torch.device("cpu"))
    held = torch.ones(64, 2**18)  # 64 MiB
    after = peak_memory_mib(torch.device("cpu"))
    del held
    assert 20 < before <= after == pytest.approx(peak_memory_mib(torch.device("cpu")), rel=0.01)
    assert after < 2**20  # MiB, not bytes


def test_a_summary_has_a_line_per_block_and_their_sum():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.act = nn.Linear(100, 50), nn.Sequential(nn.Linear(50, 2)), nn.ReLU()
            self.scale = nn.Parameter(torch.ones(7))

    assert module_summary(Net()).splitlines() == [
        "Net      5,159 parameters",
        "  first  5,050 parameters",
        "  last     102 parameters",
        "  (own)      7 parameters",
    ]


def test_rows_of_the_log_have_them(tmp_path):
    def slow():
        while True:
            time.sleep(0.02)
            yield torch.zeros(2, 1, 8, 8), {}

    logger.configure(tmp_path, ["json"])
    trainer = Trainer(
        roles=Roles(Denoiser(tiny_unet(), EDMPrecond())),
        objective=EDMObjective(LogNormalSampler(), lambda t, r=None: torch.ones_like(t)),
        data=slow(),
        batch=BatchSize(2),
        optimization=Optimization(LearningRate(1e-3), ema_rate="0.9"),
        saver=Saver(tmp_path),
        reports=Reports(log_interval=2, save_interval=-1),
        total_steps=4,
    )
    trainer.run_loop()
    logger.reset()
    rows = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert row.keys() >= {
            "loss",
            "grad_norm",
            "param_norm",
            "samples",
            "lr",
            "skipped",
            *MEASURED,
        }
        assert 0 < row["data_wait"] < 1 and row["peak_memory_mib"] > 20
        seconds = 4 / row["images_per_sec"]
        assert row["data_wait"] * seconds == pytest.approx(0.04, rel=0.5)
