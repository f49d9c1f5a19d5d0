"""Numbers that are not finite: which steps are skipped, what is said about them, when training ends."""

import math

import pytest
import torch

from cm.diffusion.denoiser import Denoiser
from cm.diffusion.noise_levels import LogNormalSampler, LossSecondMomentResampler
from cm.diffusion.precond import EDMPrecond
from cm.errors import BadNumbers, UserError
from cm.karras_diffusion import KarrasDenoiser
from cm.objectives.base import Roles
from cm.objectives.edm import EDMObjective
from cm.runtime import logger
from cm.storage.saver import Saver
from cm.training.anomalies import LEAST_ROWS, SPIKE, NanGuard, advice, cause_of_skip
from cm.training.learning_rate import LearningRate
from cm.training.mixed_precision import MIN_LG_LOSS_SCALE
from cm.training.options import BatchSize, Optimization, Reports
from cm.training.trainer import Trainer
from tests.helpers.models import tiny_unet


@pytest.fixture(autouse=True)
def run_dir(tmp_path):
    logger.configure(tmp_path, ["log", "json"])
    yield tmp_path
    logger.reset()


def log_text(run_dir):
    return (run_dir / "log.txt").read_text()


class Spoiled(EDMObjective):
    """An EDM objective whose losses a function spoils: spoil(losses, step) -> losses."""

    def __init__(self, spoil, sampler=None):
        super().__init__(sampler or LogNormalSampler(), torch.ones_like)
        self.spoil = spoil

    def forward(self, roles, x0, draw, step, **cond):
        terms = super().forward(roles, x0, draw, step, **cond)
        return {"loss": self.spoil(terms["loss"], step)}


def make_trainer(run_dir, spoil, sampler=None, **options):
    def batches():
        while True:
            yield torch.zeros(4, 1, 8, 8), {}

    return Trainer(
        roles=Roles(Denoiser(tiny_unet(), EDMPrecond())),
        objective=Spoiled(spoil, sampler),
        data=batches(),
        batch=BatchSize(4),
        optimization=Optimization(LearningRate(1e-3), ema_rate="0.9", **{"max_bad_steps": 3, **options}),
        saver=Saver(run_dir),
        reports=Reports(log_interval=1, save_interval=-1),
        total_steps=6,
    )


def one_in_two(losses, step):
    """Loss 1 of the odd steps is infinite; its gradient stays finite."""
    return losses + torch.tensor([0.0, math.inf, 0.0, 0.0]) if step % 2 else losses


def test_a_loss_that_is_not_finite_skips_the_step_even_with_finite_gradients(run_dir):
    trainer = make_trainer(run_dir, one_in_two)
    weights = [p.detach().clone() for p in trainer.state.student.master_params]
    averages = [p.clone() for p in trainer.state.ema.copies[0]]
    assert trainer.run_step(*next(trainer.data))
    moved = [p.detach().clone() for p in trainer.state.student.master_params]
    assert not trainer.run_step(*next(trainer.data))
    assert all(torch.equal(a, b) for a, b in zip(moved, trainer.state.student.master_params))
    assert any(not torch.equal(a, b) for a, b in zip(weights, moved))
    assert any(not torch.equal(a, b) for a, b in zip(averages, trainer.state.ema.copies[0]))
    assert (trainer.state.step, trainer.state.skipped, trainer.state.bad_steps) == (2, 1, 1)
    assert "warning: step 1 skipped: 1 of 4 losses not finite, at noise levels" in log_text(run_dir)


def test_the_noise_level_that_is_told_is_that_of_the_bad_loss(run_dir):
    trainer = make_trainer(run_dir, one_in_two)
    levels = []
    draw = trainer.objective.draw
    trainer.objective.draw = lambda *args: levels.append(draw(*args)) or levels[-1]
    trainer.run_step(*next(trainer.data))
    trainer.run_step(*next(trainer.data))
    level = levels[1].t[1].item()
    assert f"at noise levels {level:.4g} to {level:.4g}" in log_text(run_dir)


def test_skipped_steps_do_not_enter_the_means_nor_the_loss_history(run_dir):
    class History(LossSecondMomentResampler):
        seen = ()

        def observe(self, index, losses):
            self.seen = (*self.seen, *losses.tolist())

    sampler = History(KarrasDenoiser(num_timesteps=3))
    trainer = make_trainer(run_dir, one_in_two, sampler)
    trainer.run_loop()
    assert trainer.state.skipped == 3 and trainer.state.bad_steps == 1
    assert len(sampler.seen) == 3 * 4 and all(map(math.isfinite, sampler.seen))
    rows = [line for line in (run_dir / "progress.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(rows) == 3 and not any("null" in row or "Infinity" in row for row in rows)


def test_too_many_in_a_row_end_training_with_a_diagnosis(run_dir):
    trainer = make_trainer(run_dir, lambda losses, step: losses * math.nan)
    with pytest.raises(BadNumbers) as error:
        trainer.run_loop()
    text = str(error.value)
    assert text.startswith(
        "3 steps in a row had no finite gradients, the last at step 2: 4 of 4 losses not finite"
    )
    assert "lower --lr" in text and "--max_bad_steps" in text and "\n" not in text
    assert isinstance(error.value, UserError)


def test_the_diagnosis_tells_bad_images_bad_weights_and_a_spent_loss_scale(run_dir):
    trainer = make_trainer(run_dir, lambda losses, step: losses)
    state = trainer.state
    images, t, losses = torch.zeros(4, 1, 8, 8), torch.ones(4), torch.ones(4)
    assert cause_of_skip(state, images, t, losses) == "finite losses, but gradients that are not"
    assert cause_of_skip(state, images / 0, t, losses * math.nan) == "images that are not finite"
    assert "lower --lr" in advice(state)
    with torch.no_grad():
        state.student.master_params[3].fill_(math.nan)
    assert "weights themselves are not finite" in advice(state)
    half = make_trainer(run_dir, lambda losses, step: losses, precision="fp16").state
    assert cause_of_skip(half, images, t, losses).endswith("; loss scale 2^20")
    assert "--precision bf16" in advice(half)
    half.student.lg_loss_scale = MIN_LG_LOSS_SCALE
    assert "has reached its floor" in advice(half)


def test_fp16_lowers_the_loss_scale_by_one_for_each_skipped_step(run_dir):
    trainer = make_trainer(run_dir, one_in_two, precision="fp16", fp16_scale_growth=0.0)
    for _ in range(4):
        trainer.run_step(*next(trainer.data))
    assert trainer.state.student.lg_loss_scale == 18 and trainer.state.skipped == 2


def rows(guard, values, start=0, name="loss"):
    for step, value in enumerate(values, start):
        guard.watch(step, {name: value})


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_spike_above_the_running_median_is_told_once(run_dir, name):
    guard = NanGuard(3)
    rows(guard, [1.0, 3.0, 2.0] * 4, name=name)
    rows(guard, [1.9 * SPIKE], start=20, name=name)
    assert not (run_dir / "log.txt").exists()
    rows(guard, [2.2 * SPIKE] * 3, start=21, name=name)
    text = log_text(run_dir)
    assert (
        text.count("warning") == 1
        and f"{name} 22 at step 21 is 11 times its median of the last 13 rows" in text
    )
    rows(guard, [2.0, 2.2 * SPIKE], start=24, name=name)
    assert log_text(run_dir).count("warning") == 2


def test_no_spike_without_a_history(run_dir):
    guard = NanGuard(3)
    rows(guard, [1.0] * (LEAST_ROWS - 1) + [100.0])
    guard.forget()
    rows(guard, [1e6])
    assert not (run_dir / "log.txt").exists()


def test_a_run_that_learned_nothing_is_no_finished_run(run_dir):
    """Shorter than max_bad_steps; an earlier save may be there, the last one is not."""
    trainer = make_trainer(run_dir, lambda losses, step: losses * math.nan, max_bad_steps=100)
    with pytest.raises(
        BadNumbers, match="none of the 6 steps had finite gradients: nothing was learned; lower"
    ):
        trainer.run_loop()
    assert not (run_dir / "checkpoints" / "step_000006").exists()
    first = make_trainer(run_dir, lambda losses, step: losses * (math.nan if step else 1), max_bad_steps=100)
    assert first.run_loop() == "finished"  # one step was taken
