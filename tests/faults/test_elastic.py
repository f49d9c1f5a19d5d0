"""torchrun --max-restarts: after a killed worker the run goes on by itself, to the weights of a quiet run."""

import json

import numpy as np
import pytest
import torch

from cm.commands.cli import parse
from cm.commands.train import run_train
from cm.config.scripts import CmTrainConfig
from cm.storage.weights import load_weights
from tests.helpers.models import TINY_FLAGS
from tests.helpers.mp import launch, run_ranks

FLAGS = (
    f"{TINY_FLAGS}--global_batch_size 4 --num_workers 0 --log_interval 1 --save_interval 2 --ema_rate 0.9 --lr 1e-3 "
    "--total_training_steps 6 --preview_count 0 --training_mode consistency_training --loss_norm l2 --start_ema 0.5 "
    "--weight_schedule uniform --start_scales 4 --device cpu"
)


def flags(data, run):
    return [*FLAGS.split(), "--data_dir", str(data), "--out_dir", str(run)]


def quiet(data, run):
    run_train(parse(CmTrainConfig, flags(data, run)))


@pytest.mark.mpi
@pytest.mark.slow
def test_a_killed_worker_is_started_anew_and_goes_on(tmp_path):
    data = tmp_path / "images.npz"
    np.savez(data, arr_0=np.random.RandomState(0).randint(0, 256, (12, 8, 8, 3), dtype=np.uint8))
    done = launch(
        ["tests/helpers/elastic_program.py", *flags(data, tmp_path / "killed")],
        launcher="torchrun",
        options=("--max-restarts", "1"),
        timeout=240,
        check=True,
    )
    run_ranks("tests.faults.test_elastic:quiet", 2, data, tmp_path / "quiet", timeout=120)
    killed, undisturbed = (
        load_weights(tmp_path / name / "checkpoints" / "step_000006" / "model000006.pt")[0]
        for name in ("killed", "quiet")
    )
    assert killed.keys() == undisturbed.keys()
    assert all(torch.equal(killed[name], undisturbed[name]) for name in killed)
    rows = (tmp_path / "killed" / "progress.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert "exitcode: -9" in done.stderr
