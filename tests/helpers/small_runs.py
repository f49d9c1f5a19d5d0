"""Small runs from flags to results in one process, for the tests of the systems."""

import json
from pathlib import Path

import numpy as np
import pytest

from cm.commands.cli import parse
from cm.commands.sample import run_image_sample
from cm.commands.train import run_train
from cm.config.scripts import SampleConfig
from cm.errors import UserError

MODEL = [
    "--image_size", "8", "--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1", "--num_heads", "2",
    "--num_head_channels", "16", "--attention_resolutions", "8",
]  # fmt: skip
TRAIN = [
    "--global_batch_size", "6", "--num_workers", "0", "--log_interval", "1", "--ema_rate", "0.9", "--lr", "1e-3",
    "--total_training_steps", "2", "--save_interval", "2",
]  # fmt: skip


def train(cls, data_dir, out, *extra):
    run_train(parse(cls, [*MODEL, *TRAIN, "--data_dir", data_dir, "--out_dir", str(out), *extra]))
    return str(out)


def sample(model, out, *extra, steps=4):
    argv = ["--model_path", model, "--num_samples", "3", "--steps", str(steps), "--out_dir", str(out), *extra]
    run_image_sample(parse(SampleConfig, argv))
    with np.load(next(Path(out).glob("*.npz"))) as arrays:
        images, labels = arrays["arr_0"], arrays.get("arr_1")
    return images, labels, json.loads(next(Path(out).glob("*.json")).read_text())


def refuses(match, run):
    with pytest.raises(UserError, match=match) as error:
        run()
    assert "\n" not in str(error.value)
