"""Runs written before the code was cut into packages go on, and are sampled, as they were then."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cm.commands.cli import parse
from cm.commands.sample import run_image_sample
from cm.commands.train import run_train
from cm.config.scripts import CmTrainConfig, EdmTrainConfig, SampleConfig
from cm.runtime import logger
from cm.storage.weights import load_weights

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_before_packages"
COMMON = (
    "--data_dir data.npz --image_size 8 --network ddpmpp --num_channels 8 --channel_mult 1 --num_res_blocks 1 "
    "--attention_resolutions 8 --class_cond True --global_batch_size 6 --num_workers 0 --ema_rate 0.9 "
    "--preview_count 0 --log_interval 2 --total_training_steps 6 --save_interval 4"
)
# The commands that made the runs, in their order: the second takes the first's model as its teacher.
TRAINING = {
    "edm": (
        EdmTrainConfig,
        "--schedule_sampler loss-second-moment --num_timesteps 4 --out_dir runs/edm --augment 0.1",
    ),
    "cd": (
        CmTrainConfig,
        "--augment_dim 9 --teacher_model_path runs/edm --loss_norm l2 --start_scales 8 --target_ema_mode fixed "
        "--start_ema 0.9 --out_dir runs/cd",
    ),
}
SAMPLING = {
    "heun": "--model_path runs/edm --sampler heun --steps 5",
    "onestep": "--model_path runs/cd --sampler onestep",
    "multistep": "--model_path runs/cd --sampler multistep --ts 0,4,7",
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The runs, stopped at step 4, after the same commands went on to step 6."""
    folder = tmp_path_factory.mktemp("old") / "here"
    shutil.copytree(FIXTURE, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for config, flags in TRAINING.values():
            run_train(parse(config, [*COMMON.split(), *flags.split()]))
            logger.reset()
    return folder


@pytest.mark.parametrize("name", TRAINING)
def test_the_same_command_goes_on_to_the_same_weights(resumed, name):
    log = (resumed / "runs" / name / "log.txt").read_text()
    assert "from step 4" in log
    found, _ = load_weights(resumed / "runs" / name / "checkpoints" / "step_000006" / "model000006.pt")
    expected, _ = load_weights(resumed / "expected" / f"{name}.pt")
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", SAMPLING)
def test_the_model_gives_the_same_samples(resumed, monkeypatch, name):
    monkeypatch.chdir(resumed)
    flags = f"{SAMPLING[name]} --num_samples 6 --batch_size 4 --out_dir s_{name}"
    run_image_sample(parse(SampleConfig, flags.split()))
    with np.load(next(Path(f"s_{name}").glob("*.npz"))) as found, np.load(f"expected/{name}.npz") as expected:
        assert sorted(found.files) == sorted(expected.files)
        assert np.abs(found["arr_0"].astype(int) - expected["arr_0"].astype(int)).max() <= 1
        for key in found.files[1:]:
            assert np.array_equal(found[key], expected[key])
