"""Power-function averages in training: every objective, going on bitwise, stages, and sampling any length."""

import shutil

import numpy as np
import pytest
import torch

from cm.commands.cli import parse
from cm.commands.sample import run_image_sample
from cm.commands.train import run_train
from cm.config.rows import OBJECTIVES
from cm.config.scripts import ClassifierConfig, CmTrainConfig, EdmTrainConfig, SampleConfig
from cm.errors import UserError
from cm.runtime import logger
from cm.storage import posthoc
from cm.storage.checkpoint import complete_checkpoints
from cm.storage.weights import load_weights
from cm.tools import posthoc_ema
from cm.tools.torture import compare
from tests.helpers.models import TINY_FLAGS

FLAGS = (
    f"{TINY_FLAGS}--global_batch_size 4 --num_workers 0 --log_interval 3 "
    "--ema_rate 0.9 --lr 1e-3 --total_training_steps 6 --ema_profiles 0.05,0.1 --save_interval 1 --device cpu"
)
TOLD = "--network ddpmpp_meanflow --precond flow --label_dropout 0.5"
CM = "--loss_norm l2 --weight_schedule uniform --start_scales 4"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    images = np.random.RandomState(0).randint(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(path, arr_0=images, arr_1=np.arange(12) % 3)
    return path


def train(data, run, script, *extra):
    draws = [] if script is ClassifierConfig else ["--preview_count", "0"]
    argv = [*FLAGS.split(), *draws, "--data_dir", str(data), "--out_dir", str(run), *extra]
    run_train(parse(script, argv))
    logger.reset()
    return run


def train_cm(data, run, mode, teacher=None):
    """A consistency model of any objective, with what its row asks for."""
    row = OBJECTIVES[mode]
    extra = ["--boundary", row.boundary] if row.boundary else []
    extra += ["--teacher_model_path", str(teacher)] if row.teacher else []
    extra += ["--start_ema", "0.9"] if row.target else []
    extra += [*TOLD.split(), "--class_cond", "True"] if row.told_guidance else []
    return train(data, run, CmTrainConfig, "--training_mode", mode, *CM.split(), *extra)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("edm") / "run", EdmTrainConfig)


def weights(run, step) -> dict:
    """The student's own weights after a step."""
    return load_weights(run / "checkpoints" / f"step_{step:06d}" / f"model{step:06d}.pt")[0]


def expected(run, sigma_rel, first, last) -> dict:
    """The average by its definition, from the weights of every step."""
    gamma, count = posthoc.exponent(sigma_rel), last - first
    shares = [((k + 1) / count) ** (gamma + 1) - (k / count) ** (gamma + 1) for k in range(count)]
    states = [weights(run, step) for step in range(first + 1, last + 1)]
    return {name: sum(s * state[name].double() for s, state in zip(shares, states)) for name in states[0]}


def check(run, first, last) -> None:
    """Both snapshots of a step are the averages of the weights since `first`."""
    for length in (0.05, 0.1):
        name = f"{posthoc.stem(length, first)}{last:06d}.pt"
        found, meta = load_weights(run / "checkpoints" / f"step_{last:06d}" / name)
        assert meta["config"]["ema_profiles"] == "0.05,0.1"
        for key, value in expected(run, length, first, last).items():
            torch.testing.assert_close(found[key].double(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [n for n, row in OBJECTIVES.items() if row.origin == "" and not row.stages])
def test_every_objective_keeps_its_averages(data, teacher, tmp_path, mode):
    row, run = OBJECTIVES[mode], tmp_path / "run"
    if mode == "edm":
        check(teacher, 0, 6)
    elif mode == "classifier":
        train(data, run, ClassifierConfig)
        check(run, 0, 6)
    else:
        if row.learns_from == "consistency":
            stage = ["--training_mode", "consistency_training", *CM.split(), "--boundary", row.boundary]
            teacher = train(data, tmp_path / "stage1", CmTrainConfig, *stage)
        train_cm(data, run, mode, teacher)
        check(run, 0, 6)


def test_stages_of_progressive_distillation_begin_anew(data, teacher, tmp_path):
    run = train(
        data,
        tmp_path / "run",
        CmTrainConfig,
        *f"--training_mode progdist --scale_mode progdist {CM} --distill_steps_per_iter 2".split(),
        *("--teacher_model_path", str(teacher)),
    )
    check(run, 0, 2)
    check(run, 2, 6)
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    for step in (4, 5, 6):
        shutil.rmtree(stopped / "checkpoints" / f"step_00000{step}")
    train(
        data,
        stopped,
        CmTrainConfig,
        *f"--training_mode progdist --scale_mode progdist {CM} --distill_steps_per_iter 2".split(),
        *("--teacher_model_path", str(teacher)),
    )
    compare(stopped, run)


def test_a_stopped_run_goes_on_bitwise(data, teacher, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(teacher, run)
    for step in (4, 5, 6):
        shutil.rmtree(run / "checkpoints" / f"step_00000{step}")
    train(data, run, EdmTrainConfig)
    compare(run, teacher)
    with pytest.raises(UserError, match=r"--ema_profiles 0\.05,0\.1 -> 0\.05"):
        train(data, run, EdmTrainConfig, "--ema_profiles", "0.05")
    shutil.rmtree(run / "checkpoints" / "step_000006")
    with pytest.raises(UserError, match=r"has no posthoc_0\.15_000005\.pt: .*--ema_profiles"):
        train(data, run, EdmTrainConfig, "--ema_profiles", "0.15", "--resume_with_changes", "True")


def test_averages_of_any_length_are_sampled(data, teacher, tmp_path):
    def draw(folder, *extra):
        argv = ["--sampler", "euler", "--steps", "3", "--num_samples", "4", "--device", "cpu", *extra]
        run_image_sample(parse(SampleConfig, [*argv, "--out_dir", str(tmp_path / folder)]))
        return np.load(next((tmp_path / folder).glob("*.npz")))["arr_0"]

    by_run = draw("a", "--model_path", str(teacher), "--weights", "posthoc:0.08")
    out = tmp_path / "model.pt"
    posthoc_ema.main([str(teacher), "--sigma_rel", "0.08", "--out", str(out)])
    assert np.array_equal(by_run, draw("b", "--model_path", str(out)))
    with pytest.raises(UserError, match=r"do not span an average of length 0\.28"):
        draw("c", "--model_path", str(teacher), "--weights", "posthoc:0.28")


def test_keep_last_leaves_what_every_length_needs(data, teacher, tmp_path):
    run = train(data, tmp_path / "run", EdmTrainConfig, "--keep_last", "1")
    assert len(complete_checkpoints(run)) == 1
    for length in (0.07, 0.1):
        found, _, _ = posthoc.reconstruct(run, length)
        same, _, _ = posthoc.reconstruct(teacher, length)
        assert all(torch.equal(found[name], same[name]) for name in same)


def test_lists_out_of_range_are_refused_before_the_run(data, tmp_path):
    with pytest.raises(UserError, match=r"--ema_profiles must lie above 0 and not above 0\.2886"):
        train(data, tmp_path / "run", EdmTrainConfig, "--ema_profiles", "0.05,0.5")


def test_edm2_in_a_run_keeps_unit_weights(data, tmp_path):
    """The averages see the weights behind the forced normalisation, and the buffers travel as they are."""
    run = train(
        data,
        tmp_path / "run",
        EdmTrainConfig,
        "--network",
        "edm2",
        "--uncertainty",
        "True",
        "--optimizer",
        "adam",
    )
    state = weights(run, 6)
    sizes = state["enc.8x8_block0.conv_res0.weight"].flatten(1).square().mean(1).sqrt()
    torch.testing.assert_close(sizes, torch.ones_like(sizes), rtol=0, atol=1e-3)
    assert state["logvar_linear.weight"].isfinite().all() and state["out_gain"] != 0
    found, _, _ = posthoc.reconstruct(run, 0.08)
    assert torch.equal(found["emb_fourier.freqs"], state["emb_fourier.freqs"])
