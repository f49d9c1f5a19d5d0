"""Noise grid, N(k), mu(k), stages and learning rates against formulas and golden tables."""

import math

import pytest
import torch

from cm.diffusion.grid import karras_sigma, karras_sigmas
from cm.errors import UserError
from cm.objectives.curricula import (
    EmaAndScales,
    mu_adaptive,
    num_scales_progressive,
    progdist_stage,
    progdist_steps,
)
from cm.training.learning_rate import LearningRate
from tests.helpers import golden_data


def test_grid_ends_are_exact_and_it_decreases():
    grid = karras_sigmas(40, 0.002, 80.0, 7.0)
    assert grid[0] == 80.0 and grid[-1] == 0.002
    assert (grid.diff() < 0).all()
    assert grid.dtype == torch.float64


@pytest.mark.parametrize(
    ("index", "n", "sigma"),
    [
        (11, 18, 0.5853481),
        (22, 40, 1.3823680),
        (106, 201, 1.9128436),
        (17, 40, 4.3655617),
        (18, 40, 3.5196988),
        (67, 151, 3.9912186),
        (62, 151, 5.2485032),
    ],
)
def test_published_two_step_points(index, n, sigma):
    assert karras_sigmas(n, 0.002, 80.0, 7.0)[index] == pytest.approx(sigma, rel=1e-7)


def test_grid_position_is_linear_in_the_rho_root():
    u = torch.tensor([0.25])
    expected = (0.75 * 80.0 ** (1 / 3) + 0.25 * 0.01 ** (1 / 3)) ** 3
    assert karras_sigma(u, 0.01, 80.0, 3.0).item() == pytest.approx(expected, rel=1e-12)


def test_single_point_grid_is_sigma_max():
    assert karras_sigmas(1, 0.002, 80.0).tolist() == [80.0]


@pytest.mark.parametrize(
    ("step", "scales", "mu"),
    [(0, 2, 0.81), (1, 3, 0.9), (8000, 16, 0.986050), (80_000, 48, 0.995527), (400_000, 107, 0.998014)],
)
def test_cifar_schedule_values(step, scales, mu):
    assert num_scales_progressive(step, 2, 150, 800_000) == scales
    assert mu_adaptive(scales, 0.9, 2) == pytest.approx(mu, abs=5e-7)


def test_number_of_scales_never_passes_the_end():
    assert {num_scales_progressive(k, 2, 150, 1000) for k in (1000, 1001, 5000)} == {151}


def test_printed_mu_gives_start_ema_at_the_first_step():
    assert mu_adaptive(2, 0.95, 2, printed=True) == pytest.approx(0.95)
    assert mu_adaptive(2, 0.95, 2) == pytest.approx(0.9025)


@pytest.mark.parametrize(
    "entry", golden_data.json("schedules")["entries"], ids=lambda e: e["args"]["scale_mode"]
)
def test_golden_schedules(entry):
    schedule = EmaAndScales(**entry["args"])
    beyond = set(entry["beyond_total"])
    for step, ema, scales in zip(entry["steps"], entry["target_ema"], entry["num_scales"], strict=True):
        if step not in beyond:
            mu, n = schedule(step)
            assert n == scales, step
            assert mu == pytest.approx(ema, rel=1e-12), step


def test_stages_halve_and_the_last_two_are_twice_as_long():
    stages = [progdist_stage(k, 8, 3) for k in range(19)]
    assert [s.num_scales for s in stages] == [8] * 3 + [4] * 3 + [2] * 6 + [1] * 7
    assert [(s.start, s.length) for s in stages[::3]][:5] == [(0, 3), (3, 3), (6, 6), (6, 6), (12, 6)]
    assert progdist_steps(8, 3) == 18
    assert progdist_stage(10**6, 8, 3).num_scales == 1


def test_stage_of_two_intervals_from_the_start():
    assert progdist_stage(0, 2, 10) == progdist_stage(19, 2, 10)
    assert progdist_stage(20, 2, 10).num_scales == 1
    assert progdist_stage(5, 1, 10).length == 20


@pytest.mark.parametrize(
    "change",
    [
        {"target_ema_mode": "adaptive"},
        {"scale_mode": "progressive", "target_ema_mode": "adaptive", "start_ema": 0.0},
        {"start_scales": 1},
        {"scale_mode": "progdist", "start_scales": 40},
        {"scale_mode": "progdist", "start_scales": 8, "distill_steps_per_iter": 0},
        {"scale_mode": "progressive", "end_scales": 10},
        {"start_ema": 1.5},
    ],
)
def test_bad_schedules_are_refused_at_construction(change):
    args = dict(
        target_ema_mode="fixed",
        start_ema=0.95,
        scale_mode="fixed",
        start_scales=40,
        end_scales=40,
        total_steps=100,
        distill_steps_per_iter=10,
    )
    EmaAndScales(**args)
    with pytest.raises(UserError, match="--"):
        EmaAndScales(**{**args, **change})


@pytest.mark.parametrize("row", golden_data.json("lr_anneal")["rows"], ids=lambda r: str(r["lr"]))
def test_golden_linear_anneal(row):
    rate = LearningRate(row["lr"], "linear", row["lr_anneal_steps"])
    for k, expected in enumerate(row["lr_after_step_1_to_N"], start=1):
        assert rate(k) == pytest.approx(expected, rel=1e-9, abs=1e-18)
    assert rate(row["lr_anneal_steps"] + 5) == 0.0


def test_late_decay_and_warmup():
    rate = LearningRate(2.0, "late_decay", 100)
    assert [rate(k) for k in (0, 20, 60, 92, 99)] == pytest.approx([2.0, 2.0, 1.0, 0.2, 0.2])
    assert LearningRate(1.0, warmup=4)(0) == 0.25 and LearningRate(1.0, warmup=4)(10) == 1.0
    with pytest.raises(UserError, match="lr_schedule"):
        LearningRate(1.0, "cosine")


def test_mu_formula():
    assert mu_adaptive(11, 0.9, 10) == pytest.approx(math.exp(10 * math.log(0.9) / 10))
