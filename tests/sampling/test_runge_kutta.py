"""The adaptive solver against scipy's, image by image, and its independence of the batch."""

import math

import pytest
import torch

from cm.errors import UserError
from cm.sampling.runge_kutta import solve_rk45
from tests.helpers.ideal import SolvedMixture

MIXTURE = SolvedMixture(torch.tensor([[-1.0, 0.5], [0.8, -0.3], [0.1, 1.2]], dtype=torch.float64), std=0.2)


def flow(t, x):
    """The probability flow of the mixture in sigma, a level for each row."""
    return (x - MIXTURE.denoise(x, t)) / t[:, None]


def points(count=8, scale=80.0):
    return scale * torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-8])
def test_as_accurate_and_as_fast_as_scipys(tolerance):
    from scipy.integrate import solve_ivp

    x = points(16)
    exact = MIXTURE.flow(x, 80.0, 0.02)
    got = solve_rk45(flow, 80.0, 0.02, x, rtol=tolerance, atol=tolerance)
    alone = [
        solve_ivp(
            lambda t, y: flow(torch.tensor([t]).double(), torch.from_numpy(y)[None])[0].numpy(),
            (80.0, 0.02),
            row.numpy(),
            rtol=tolerance,
            atol=tolerance,
        )
        for row in x
    ]
    theirs = torch.stack([torch.from_numpy(solution.y[:, -1]) for solution in alone])
    ours, theirs = ((y - exact).abs().amax(1).median() for y in (got.y, theirs))
    assert ours < 2 * theirs
    evaluations = sum(solution.nfev for solution in alone)
    assert 0.75 * evaluations < got.nfe.sum() < 1.15 * evaluations


def test_there_and_back():
    x = points(scale=2.0)
    there = solve_rk45(flow, 2.0, 40.0, x, rtol=1e-9, atol=1e-9).y
    back = solve_rk45(flow, 40.0, 2.0, there, rtol=1e-9, atol=1e-9).y
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)


def test_the_error_follows_the_tolerance():
    x = points(scale=5.0)
    exact = MIXTURE.flow(x, 5.0, 0.1)
    errors = [
        (solve_rk45(flow, 5.0, 0.1, x, rtol=tolerance, atol=tolerance).y - exact).abs().max()
        for tolerance in (1e-3, 1e-6, 1e-9)
    ]
    assert errors[0] < 0.02 and errors[1] < errors[0] / 100 and errors[2] < 1e-7


def test_an_image_does_not_depend_on_its_neighbours():
    x = points()
    together = solve_rk45(flow, 80.0, 0.02, x, rtol=1e-3, atol=1e-3)
    alone = solve_rk45(flow, 80.0, 0.02, x[:1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alone.y, together.y[:1], rtol=0, atol=1e-11)
    assert alone.nfe[0] == together.nfe[0] and len(set(together.nfe.tolist())) > 1


def test_a_stiff_neighbour_changes_nothing():
    rates = torch.tensor([[1.0], [300.0]], dtype=torch.float64)

    def decay(t, y):
        return -rates[: len(y)] * (y - t[:, None].cos())

    start = torch.ones(2, 1, dtype=torch.float64)
    both = solve_rk45(decay, 0.0, 2.0, start, rtol=1e-5, atol=1e-5)
    alone = solve_rk45(decay, 0.0, 2.0, start[:1], rtol=1e-5, atol=1e-5)
    assert torch.equal(both.y[0], alone.y[0]) and both.nfe[0] == alone.nfe[0]
    assert both.nfe[1] > 10 * both.nfe[0]
    # y' = cos t - y from 1: y = (cos t + sin t + exp(-t)) / 2.
    exact = (math.cos(2) + math.sin(2) + math.exp(-2)) / 2
    assert both.y[0].item() == pytest.approx(exact, abs=1e-4)
    assert both.y[1].item() == pytest.approx(math.cos(2), abs=0.01)


def test_rounding_changes_no_step():
    """An unrounded step size feeds a difference of 1e-12 back until the ends of this stiff flow differ by 5e-10."""

    def slope(t, y, noise):
        stiff = -100 * (torch.sin(5 * y) + y - torch.cos(3 * t)[:, None])
        return stiff * (1 + noise * torch.sin(1e6 * y))

    start = torch.ones(1, 4, dtype=torch.float64)
    exact, rounded = (
        solve_rk45(lambda t, y, n=n: slope(t, y, n), 0.0, 10.0, start, rtol=1e-3, atol=1e-3)
        for n in (0.0, 1e-12)
    )
    assert exact.nfe == rounded.nfe
    torch.testing.assert_close(exact.y, rounded.y, rtol=0, atol=1e-11)


def test_an_image_that_has_arrived_stays():
    """Later evaluations hold it at its end."""
    seen = []

    def slope(t, y):
        seen.append(t.clone())
        return torch.tensor([[0.0], [-200.0]], dtype=torch.float64) * y

    got = solve_rk45(slope, 0.0, 1.0, torch.ones(2, 1), rtol=1e-6, atol=1e-6)
    assert got.y[0] == 1 and got.y[1].abs() < 1e-5 and got.nfe[0] < got.nfe[1] == len(seen)
    assert all(t[0] == 1 for t in seen[got.nfe[0] :])


def test_no_way_to_go():
    got = solve_rk45(flow, 3.0, 3.0, points(), rtol=1e-3, atol=1e-3)
    assert torch.equal(got.y, points())


@pytest.mark.parametrize(
    ("slope", "why"),
    [
        (lambda t, y: y**2, "image 1 of the batch: it needs too small steps"),
        (lambda t, y: y * math.nan, "image 0 of the batch: the slope is not finite"),
    ],
    ids=["blow-up", "nan"],
)
def test_giving_up(slope, why):
    start = torch.tensor([[1e-3], [1.0]])
    with pytest.raises(UserError, match=why):
        solve_rk45(slope, 0.0, 2.0, start, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tolerance", [0.1, 0.01])
def test_a_step_into_where_there_is_no_slope_is_made_smaller(tolerance):
    """dy/dt = -sqrt(y) from y(0) = 1 is (1 - t / 2)^2; a long step ends below 0, where the root is none."""
    undefined = []

    def slope(t, y):
        undefined.append(bool((y < 0).any()))
        return -y.sqrt()

    got = solve_rk45(slope, 0.0, 1.9, torch.ones(1, 1), rtol=tolerance, atol=tolerance)
    assert any(undefined)
    assert got.y.item() == pytest.approx(0.05**2, rel=1e-3)
