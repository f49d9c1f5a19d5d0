"""Data-parallel training is training: 1, 2 and 4 ranks give the same weights."""

import pytest
import torch
from PIL import Image

from cm.commands.train import open_training_data
from cm.config.scripts import CmTrainConfig, configure
from cm.data.sources import FolderSource
from cm.diffusion.grid import Grid
from cm.diffusion.noise_levels import LogNormalSampler, LossSecondMomentResampler
from cm.diffusion.precond import ConsistencyPrecond, EDMPrecond
from cm.karras_diffusion import KarrasDenoiser
from cm.nn import Dropout
from cm.objectives.consistency import ConsistencyObjective
from cm.objectives.curricula import EmaAndScales
from cm.objectives.edm import EDMObjective
from cm.objectives.pairs import GridPairs
from cm.objectives.progressive import ProgressiveObjective
from cm.runtime import distributed, logger
from cm.storage.checkpoint import complete_checkpoints
from cm.storage.saver import Saver
from cm.training.learning_rate import LearningRate
from cm.training.options import BatchSize, Optimization, Reports
from cm.training.trainer import Trainer
from tests.helpers.models import roles_of, tiny_unet
from tests.helpers.mp import run_ranks

GLOBAL_BATCH = 6  # does not divide evenly over 4 ranks


def l2(a, b):
    return ((a - b) ** 2).flatten(1).mean(1)


def ones(t, r=None):
    return torch.ones_like(t)


OBJECTIVES = {
    "edm": lambda: EDMObjective(LogNormalSampler(), ones),
    "second_moment": lambda: EDMObjective(
        LossSecondMomentResampler(KarrasDenoiser(num_timesteps=3), history_per_term=1), ones
    ),
    "ct": lambda: ConsistencyObjective(
        EmaAndScales("fixed", 0.5, "fixed", 8, 8, 9, 9), l2, ones, pairs=GridPairs(Grid()), distillation=False
    ),
    "cd": lambda: ConsistencyObjective(
        EmaAndScales("fixed", 0.5, "fixed", 8, 8, 9, 9), l2, ones, pairs=GridPairs(Grid()), distillation=True
    ),
    "pd": lambda: ProgressiveObjective(
        EmaAndScales("fixed", 0.0, "progdist", 4, 4, 9, 2), l2, ones, grid=Grid()
    ),
}


def batches(start=0):
    """This rank's rows of global batches that are functions of the step."""
    step = start
    while True:
        images = torch.randn(GLOBAL_BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        rows = distributed.local_rows(GLOBAL_BATCH)
        yield images[rows.start : rows.stop].clamp(-1, 1), {}
        step += 1


def make_trainer(name, run_dir, microbatch=-1, dropout=0.0):
    objective = OBJECTIVES[name]()
    consistency = name in ("ct", "cd")
    if distributed.get_rank() > 0:
        torch.nn.init.normal_(torch.empty(1000))  # initial weights must come from rank 0 only
    return Trainer(
        roles=roles_of(
            objective,
            lambda: tiny_unet(dropout=dropout),
            ConsistencyPrecond() if consistency else EDMPrecond(),
        ),
        objective=objective,
        data=batches(),
        batch=BatchSize(GLOBAL_BATCH, microbatch),
        optimization=Optimization(LearningRate(0.1 if dropout else 1e-3), ema_rate="0.9"),
        saver=Saver(run_dir),
        reports=Reports(log_interval=2, save_interval=-1),
        total_steps=5,
    )


def train(name, run_dir, microbatch=-1, resume=False, stop=5, dropout=0.0):
    """Weights, averages and the last logged loss after `stop` steps."""
    logger.configure(run_dir, ["json"])
    trainer = make_trainer(name, run_dir, microbatch, dropout)
    if resume:
        trainer.load(complete_checkpoints(run_dir)[-1])
        trainer.data = batches(trainer.state.step)
    trainer.total_steps = stop
    trainer.run_loop()
    state = trainer.state
    roles = [w for w in (state.student.weights, state.target, state.teacher) if w is not None]
    weights = [
        p.detach() for params in (*(w.master_params for w in roles), *state.ema.copies) for p in params
    ]
    return torch.cat([p.flatten() for p in weights]).numpy()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_and_microbatches_do_not_change_the_weights(name, tmp_path):
    one = torch.from_numpy(train(name, str(tmp_path / "1")))
    for world, microbatch in ((2, -1), (4, 1)):
        results = run_ranks(
            "tests.training.test_train_ranks:train",
            world,
            name,
            str(tmp_path / f"{world}"),
            microbatch,
            timeout=90,
        )
        for result in results:
            torch.testing.assert_close(torch.from_numpy(result), one, rtol=0, atol=2e-5)
        assert all((r == results[0]).all() for r in results)


@pytest.mark.parametrize("name", ["edm", "ct", "cd"])
def test_dropout_masks_belong_to_rows(name, tmp_path):
    """Ranks and micro-batches meet the masks of one process."""
    one = torch.from_numpy(train(name, str(tmp_path / "1"), dropout=0.1))
    other = torch.from_numpy(train(name, str(tmp_path / "other"), dropout=0.11))
    assert (one - other).abs().max() > 2e-4  # masks matter
    parts = torch.from_numpy(train(name, str(tmp_path / "parts"), 4, dropout=0.1))
    torch.testing.assert_close(parts, one, rtol=0, atol=2e-5)
    arguments = (name, str(tmp_path / "2"), 2, False, 5, 0.1)
    for result in run_ranks("tests.training.test_train_ranks:train", 2, *arguments, timeout=90):
        torch.testing.assert_close(torch.from_numpy(result), one, rtol=0, atol=2e-5)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    whole = torch.from_numpy(train("cd", str(tmp_path / "whole")))
    run_ranks(
        "tests.training.test_train_ranks:train", 2, "cd", str(tmp_path / "run"), -1, False, 3, timeout=90
    )
    again = torch.from_numpy(train("cd", str(tmp_path / "run"), resume=True))
    torch.testing.assert_close(again, whole, rtol=0, atol=2e-5)


def failing_save(run_dir):
    trainer = make_trainer("edm", run_dir)
    try:
        trainer.save()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def open_data(data_dir) -> tuple[str, int]:
    """Fingerprint, and how often this rank asked the source for it."""
    calls = []
    identity = FolderSource.identity
    FolderSource.identity = lambda self: (calls.append(1), *identity(self))[1:]
    config = configure(CmTrainConfig, data_dir=data_dir, image_size=8)
    return open_training_data(config).fingerprint, len(calls)


def test_one_rank_looks_at_all_files(tmp_path):
    Image.new("L", (8, 8), 5).save(tmp_path / "a.png")
    (first, once), (second, never) = run_ranks("tests.training.test_train_ranks:open_data", 2, str(tmp_path))
    assert first == second and (once, never) == (1, 0)


def test_a_failed_save_fails_on_every_rank(tmp_path):
    (tmp_path / "run").write_text("a file where the run directory should be")
    results = run_ranks("tests.training.test_train_ranks:failing_save", 2, str(tmp_path / "run"))
    assert len(set(results)) == 1 and results[0].startswith("UserError: could not save step 0 under")


def test_a_teacher_drops_out_under_the_students_masks(tmp_path):
    logger.configure(tmp_path, ["json"])
    trainer = make_trainer("cd", str(tmp_path), dropout=0.5)
    trainer.run_step(*next(trainer.data))
    roles = (trainer.roles.student, trainer.roles.target, trainer.roles.teacher)
    drops = [next(m for m in role.net.modules() if isinstance(m, Dropout)).train() for role in roles]
    x = torch.ones(GLOBAL_BATCH, 4, 4, 4)
    masks = []
    for drop in drops:
        torch.manual_seed(0)
        masks.append(drop(x) != 0)
        torch.manual_seed(0)  # the same, whatever the other rows are
        drop.rows = drop.rows.flip(0)
        assert torch.equal(drop(x) != 0, masks[-1].flip(0))
    assert masks[0].any() and not masks[0].all()
    assert all(torch.equal(mask, masks[0]) for mask in masks)
