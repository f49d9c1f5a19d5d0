"""The algorithms on Gaussian data, where the exact answers are known and a few numbers per noise level hold them.

With one affine function per noise level a step of gradient descent solves every regression exactly, so that what is
left is the error of the algorithm itself.
"""

import copy

import pytest
import torch
from torch import nn

from cm.diffusion.denoiser import Denoiser
from cm.diffusion.grid import Grid, karras_sigmas
from cm.diffusion.noise_levels import LogNormalSampler
from cm.objectives.base import Draw, Roles
from cm.objectives.consistency import ConsistencyObjective
from cm.objectives.curricula import EmaAndScales, mu_adaptive, num_scales_progressive, progdist_stage
from cm.objectives.distances import make_distance
from cm.objectives.edm import EDMObjective, edm_losses
from cm.objectives.pairs import GridPairs, pair_at
from cm.objectives.progressive import ProgressiveObjective, interval_at
from cm.sampling.noise import get_generator
from cm.sampling.registry import run_sampler
from tests.helpers.analytic import Gaussian, free, ones
from tests.helpers.ideal import SolvedMixture

DATA = Gaussian()
GRID = Grid()


class Affine(nn.Module):
    """offset_n + slope_n (x - m) / sqrt(s^2 + t_n^2) at each level of the grid; the identity at sigma_min."""

    def __init__(self, points):
        super().__init__()
        self.levels = karras_sigmas(points, GRID.sigma_min, GRID.sigma_max, GRID.rho)
        self.offset = nn.Parameter(torch.zeros(points, dtype=torch.float64))
        self.slope = nn.Parameter(torch.zeros(points, dtype=torch.float64))

    def forward(self, x, sigma):
        level = (sigma[:, None] / self.levels).log().abs().argmin(1)
        spread = (DATA.std**2 + sigma**2).sqrt()[:, None]
        value = self.offset[level][:, None] + self.slope[level][:, None] * (x - DATA.mean) / spread
        at_end = (level == len(self.levels) - 1)[:, None]
        return torch.where(at_end, x, value)


def moments(levels):
    """x0, noise and level index whose first two moments at each level are those of the data and of N(0, 1)."""
    x0 = DATA.mean + DATA.std * torch.tensor([1.0, 1.0, -1.0, -1.0]).double()
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    index = torch.arange(levels).repeat_interleave(4)
    return x0.repeat(levels)[:, None], noise.repeat(levels)[:, None], index


def teacher():
    return Denoiser(lambda x, sigma: DATA.denoise(x, sigma), free)


def descend(student, losses, levels):
    """One step of gradient descent that solves the regression of every level."""
    gradients = torch.autograd.grad(losses.mean(), (student.offset, student.slope))
    with torch.no_grad():
        for p, g in zip((student.offset, student.slope), gradients):
            p -= levels / 2 * g


# --- exact consistency functions ---


def test_exact_gaussian_consistency_function():
    x = torch.linspace(-5, 5, 11).double()[:, None]
    eps = torch.tensor(DATA.eps)
    torch.testing.assert_close(DATA.consistency(x, eps), x)
    for t, r in ((80.0, 3.0), (3.0, 0.1), (0.1, 0.002)):
        later = DATA.flow(x, torch.tensor(t), torch.tensor(r))
        torch.testing.assert_close(
            DATA.consistency(later, torch.tensor(r)), DATA.consistency(x, torch.tensor(t))
        )


def test_exact_mixture_consistency_function_is_constant_along_solved_trajectories():
    """Two independent constructions: quantiles in one dimension, and the PF-ODE of the ideal denoiser."""
    data = SolvedMixture(torch.tensor([[-1.0], [0.7]], dtype=torch.float64), std=0.3)
    x = torch.linspace(-4, 4, 9).double()[:, None] * 5
    ends = data.consistency(x, 5.0, 0.05)
    for r in (2.0, 0.4):
        later = data.flow(x, 5.0, r)
        torch.testing.assert_close(data.consistency(later, r, 0.05), ends, rtol=0, atol=2e-4)
    torch.testing.assert_close(data.flow(x, 5.0, 0.05), ends, rtol=0, atol=2e-4)


# --- Theorem 1 ---


def train(points, *, distillation, solver="euler"):
    """The student after points-1 rounds in which the target follows it; information travels one level a round."""
    objective = ConsistencyObjective(
        EmaAndScales("fixed", 0.0, "fixed", points, points, 9, 9),
        make_distance("l2"),
        ones,
        pairs=GridPairs(GRID),
        distillation=distillation,
        ode_solver=solver,
    )
    student = Affine(points)
    x0, noise, index = moments(points - 1)
    draw = pair_at(GRID, points, index, noise)
    for step in range(points - 1):
        assert objective.target_decay(step) == 0
        target = copy.deepcopy(student)
        roles = Roles(Denoiser(student, free), Denoiser(target, free), teacher() if distillation else None)
        losses = objective.forward(roles, x0, draw, step)["loss"]
        descend(student, losses, points - 1)
    # The fixed point is reached: another round changes nothing.
    roles = Roles(Denoiser(student, free), Denoiser(copy.deepcopy(student), free), roles.teacher)
    loss = objective.forward(roles, x0, draw, 0)["loss"].mean()
    slope = torch.autograd.grad(loss, student.slope)[0]
    assert slope.abs().max() < 1e-12
    return student, loss.item()


def error(student):
    """Largest distance from the exact consistency function, over all levels and one deviation around the mean."""
    errors = []
    for t in student.levels:
        x = DATA.mean + (DATA.std**2 + t**2).sqrt() * torch.tensor([-1.0, 0.0, 1.0]).double()[:, None]
        t = t.repeat(3)
        errors.append((student(x, t) - DATA.consistency(x, t)).abs().max().item())
    return max(errors)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_theorem_1_distillation_reaches_the_consistency_function_at_the_order_of_its_solver(solver, order):
    """sup |f - f*| = O(dt^p) when the loss is zero, with the exact score (Song et al. 2023, Theorem 1)."""
    results = [train(points, distillation=True, solver=solver) for points in (17, 33, 65)]
    errors = [error(student) for student, _ in results]
    orders = torch.tensor(errors).log2().diff().neg()
    assert ((orders - order).abs() < 0.15).all(), errors
    assert errors[-1] < (0.03 if order == 1 else 0.002)
    assert max(loss for _, loss in results) < 1e-20


def test_consistency_training_has_the_fixed_point_of_distillation_by_euler():
    """The regression puts E[x0 | x_t] where distillation has the teacher's answer; only the loss does not vanish."""
    distilled, _ = train(33, distillation=True)
    trained, loss = train(33, distillation=False)
    torch.testing.assert_close(trained.slope, distilled.slope, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(trained.offset, distilled.offset, rtol=1e-9, atol=1e-12)
    assert loss > 1e-4


# --- teachers ---


def test_the_ideal_denoiser_minimises_denoising_score_matching():
    objective = EDMObjective(LogNormalSampler(), ones)
    x0, noise, index = moments(20)
    student = Affine(21)
    draw = Draw(t=student.levels[index], noise=noise, weight=torch.ones(len(index)))
    losses = objective.forward(Roles(Denoiser(student, free)), x0, draw, 0)
    assert torch.equal(losses["loss"], edm_losses(Denoiser(student, free), x0, draw.t, noise, ones)["loss"])
    descend(student, losses["loss"], 20)
    x = torch.linspace(-3, 3, 20).double()[:, None]
    t = student.levels[:20]
    torch.testing.assert_close(student(x, t), DATA.denoise(x, t))


# --- progressive distillation ---


def test_every_stage_halves_the_steps_and_ends_where_its_teacher_ends():
    """16 Euler steps of the ideal denoiser become 8, 4, 2 and 1 steps of students, with the same samples."""
    objective = ProgressiveObjective(
        EmaAndScales("fixed", 0.0, "progdist", 8, 8, 9, 1), make_distance("l2"), ones, grid=GRID
    )
    x = 80 * torch.randn(16, 1, generator=torch.Generator().manual_seed(0)).double()

    def end(denoiser, steps):
        return run_sampler("progdist", denoiser, x, get_generator("dummy"), steps=steps)

    current, expected = teacher(), end(teacher(), 16)
    seen = []
    for step in range(5):
        stage = objective.stage(step)
        if step != stage.start:
            continue
        intervals = stage.num_scales
        student = Affine(intervals + 1)
        x0, noise, index = moments(intervals)
        draw = interval_at(GRID, intervals, index, noise)
        losses = objective.forward(Roles(Denoiser(student, free), teacher=current), x0, draw, step)["loss"]
        descend(student, losses, intervals)
        current = Denoiser(student, free)
        with torch.no_grad():
            torch.testing.assert_close(end(current, intervals), expected, rtol=1e-5, atol=1e-5)
        seen.append(intervals)
    assert seen == [8, 4, 2, 1]


# --- published numbers that no other test names ---


@pytest.mark.parametrize(
    ("step", "end", "start_ema", "points", "mu"),
    [
        (200_000, 150, 0.9, 76, 0.997194),
        (799_999, 150, 0.9, 151, 0.998596),
        (800_000, 150, 0.9, 151, 0.998596),
        (0, 200, 0.95, 2, 0.9025),
        (1, 200, 0.95, 3, 0.95),
        (8_000, 200, 0.95, 21, 0.994884),
        (80_000, 200, 0.95, 64, 0.998373),
        (200_000, 200, 0.95, 101, 0.998975),
        (400_000, 200, 0.95, 143, 0.999278),
        (800_000, 200, 0.95, 201, 0.999487),
    ],
)
def test_schedules_of_the_released_runs(step, end, start_ema, points, mu):
    assert num_scales_progressive(step, 2, end, 800_000) == points
    assert mu_adaptive(points, start_ema, 2) == pytest.approx(mu, abs=5e-7)


def test_stage_boundaries_of_the_published_progressive_distillation():
    """4096 intervals, 50 000 steps a stage: 2 intervals from step 550 000, 1 from 650 000."""
    for halvings in range(11):
        for step in (50_000 * halvings, 50_000 * halvings + 49_999):
            assert progdist_stage(step, 4096, 50_000).num_scales == 4096 >> halvings
    boundaries = [(550_000, 2), (649_999, 2), (650_000, 1), (749_999, 1), (800_000, 1)]
    for step, intervals in boundaries:
        stage = progdist_stage(step, 4096, 50_000)
        assert (stage.num_scales, stage.length) == (intervals, 100_000)
    schedule = EmaAndScales("fixed", 0.0, "progdist", 4096, 40, 800_000, 50_000)
    assert schedule(0) == (1.0, 4096) and schedule(700_000) == (1.0, 1)
