"""Limits of the discrete consistency losses: Theorems 3 to 6 of the paper's Appendix B on closed-form data."""

import pytest
import torch

from cm.diffusion.denoiser import Denoiser
from cm.objectives.base import Draw, Roles
from cm.objectives.consistency import consistency_losses
from cm.objectives.continuous import ContinuousObjective, continuous_losses
from cm.objectives.distances import FunctionDistance, make_distance
from cm.objectives.pairs import pair_at
from tests.helpers.analytic import free, ones
from tests.helpers.continuous_functions import (
    DATA,
    DIM,
    GRID,
    Smooth,
    at_levels,
    feature_distance,
    gradient,
    pairs,
    teacher,
)


def discrete(n, network, distance, distillation=True):
    """L^N over all intervals of the grid of N points, theta- = stopgrad(theta), with gradient."""
    x0, noise = pairs()
    index = torch.arange(n - 1).repeat_interleave(len(x0))
    grid = pair_at(GRID, n, index, noise.repeat(n - 1, 1))
    u = index.double() / (n - 1)
    draw = Draw(t=levels(u), r=levels(u + 1 / (n - 1)), noise=grid.noise, weight=grid.weight)
    student = Denoiser(network, free)
    return consistency_losses(
        Roles(student, student, teacher() if distillation else None),
        x0.repeat(n - 1, 1),
        draw,
        distance=distance,
        weight=ones,
        ode_solver="euler",
    )["loss"].mean()


def levels(u):
    """The grid function in float64."""
    high, low = GRID.sigma_max ** (1 / GRID.rho), GRID.sigma_min ** (1 / GRID.rho)
    return (high + u * (low - high)) ** GRID.rho


def continuous(network, distance, weight, stop_grad, distillation=True):
    """The limit by the midpoint rule."""
    x0, draw = at_levels(levels((torch.arange(1000).double() + 0.5) / 1000))
    return continuous_losses(
        Roles(Denoiser(network, free), teacher=teacher() if distillation else None),
        x0,
        draw,
        distance=distance,
        weight=weight,
        stop_grad=stop_grad,
    )["loss"].mean()


def check_first_order(values, limit):
    """Errors halve from each value to the next, and the last is small."""
    errors = torch.stack([(value - limit).norm() / limit.norm() for value in values])
    assert errors[-1] < 0.03, errors
    assert ((errors[:-1] / errors[1:] - 2).abs() < 0.35).all(), errors


POINTS = (101, 201, 401)


@pytest.mark.parametrize("distance", [make_distance("l2"), feature_distance], ids=["l2", "features"])
def test_theorem_3_squared_losses(distance):
    """(N-1)^2 L_CD -> E[tau'(u)^2 v^T G v] / 2, with gradients through both factors."""
    network = Smooth()
    with torch.no_grad():
        limit = continuous(
            network, FunctionDistance(distance), lambda t, r=None: GRID.speed(t) ** 2 / 2, stop_grad=False
        )
        check_first_order([(n - 1) ** 2 * discrete(n, network, distance) for n in POINTS], limit)


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_theorem_4_norms(norm):
    """(N-1) L_CD -> E[tau'(u) |v|] for l1, and for the largest number likewise."""
    network = Smooth()
    with torch.no_grad():
        limit = continuous(network, make_distance(norm), GRID.speed, stop_grad=False)
        check_first_order([(n - 1) * discrete(n, network, make_distance(norm)) for n in POINTS], limit)


@pytest.mark.parametrize("distillation", [True, False], ids=["theorem 5", "theorem 6"])
@pytest.mark.parametrize(
    ("distance", "factor"),
    [
        (make_distance("l2"), 2 / DIM),
        (FunctionDistance(make_distance("l2")), 1),
        (FunctionDistance(feature_distance), 1),
    ],
    ids=["l2", "l2 by curvature", "features"],
)
def test_theorems_5_and_6_gradients(distance, factor, distillation):
    """(N-1) grad L -> grad E[tau'(u) f G v], v and G held constant; for distillation and for training."""
    network = Smooth()
    loss = continuous(network, distance, lambda t, r=None: factor * GRID.speed(t), True, distillation)
    limit = gradient(loss, network)
    scaled = [(n - 1) * gradient(discrete(n, network, distance, distillation), network) for n in POINTS]
    check_first_order(scaled, limit)


def test_the_value_of_the_pseudo_loss_is_that_of_theorem_3():
    """v^T G v, which falls as the student learns; sum f g, whose gradient it has, would not."""
    with torch.no_grad():
        curved = FunctionDistance(make_distance("l2"))
        for distance in (FunctionDistance(feature_distance), curved):
            values = [continuous(Smooth(), distance, ones, stop_grad) for stop_grad in (True, False)]
            torch.testing.assert_close(*values)
        squared = continuous(Smooth(), make_distance("l2"), ones, True)
        torch.testing.assert_close(squared, continuous(Smooth(), curved, ones, False) * DIM / 2)


def test_speed_is_the_slope_of_the_grid():
    u = (torch.arange(9).double() + 0.5) / 9
    step = 1e-5
    slope = (levels(u + step) - levels(u - step)) / (2 * step)
    torch.testing.assert_close(GRID.speed(levels(u)), -slope, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("distance", "stop_grad", "order"),
    [
        (make_distance("l2"), True, 1),
        (make_distance("l2"), False, 1),
        (FunctionDistance(make_distance("l2")), True, 1),
        (FunctionDistance(make_distance("l2")), False, 2),
    ],
)
def test_the_clock_of_the_grid_makes_the_derivative_longer(distance, stop_grad, order):
    """v dt/du instead of v: once in a norm and in a pseudo-loss, twice in v^T G v."""
    x0, draw = at_levels(levels(torch.tensor([0.1, 0.5, 0.9]).double()))
    roles = Roles(Denoiser(Smooth(), free), teacher=teacher())
    by_t, by_grid = (
        ContinuousObjective(
            distance, ones, grid=GRID, distillation=True, stop_grad=stop_grad, clock=clock
        ).forward(roles, x0, draw, 0)["loss"]
        for clock in ("t", "grid")
    )
    torch.testing.assert_close(by_grid, by_t * GRID.speed(draw.t) ** order)


def test_training_has_the_gradient_of_distillation_in_expectation():
    """Theorem 6: E[z | x_t] = (x_t - D) / t. Expectations by Gauss-Hermite quadrature; not so without stop_grad."""
    import numpy as np

    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(40))
    mass = torch.outer(weights, weights).flatten() / weights.sum() ** 2
    x0 = (DATA.mean + DATA.std * nodes).repeat_interleave(40)[:, None].expand(-1, DIM)
    noise = nodes.repeat(40)[:, None].expand(-1, DIM)
    draw = Draw(t=torch.full((1600,), 0.8).double(), noise=noise, weight=torch.ones(1600))
    network = Smooth()

    def expected(who, **form):
        roles = Roles(Denoiser(network, free), teacher=who)
        terms = continuous_losses(roles, x0, draw, distance=make_distance("l2"), weight=ones, **form)
        return gradient((mass * terms["loss"]).sum(), network)

    stopped = dict(stop_grad=True)
    torch.testing.assert_close(
        expected(None, **stopped), expected(teacher(), **stopped), rtol=1e-5, atol=1e-7
    )
    plain = dict(stop_grad=False)
    gap = (expected(None, **plain) - expected(teacher(), **plain)).norm() / expected(
        teacher(), **plain
    ).norm()
    assert gap > 0.1
