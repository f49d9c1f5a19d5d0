"""Preconditionings and weightings against formulas and golden tables."""

import math

import pytest
import torch

from cm.config.rows import WEIGHTINGS
from cm.diffusion.precond import (
    ConsistencyPrecond,
    EDMPrecond,
    FlowPrecond,
    PiecewisePrecond,
    boundary_precond,
)
from cm.diffusion.weightings import get_snr, get_weightings
from cm.errors import UserError
from tests.helpers import golden_data


def test_edm_scalings_give_unit_variances():
    sigma = torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=torch.float64)
    c = EDMPrecond(0.5)(sigma)
    # Unit variance of the input and of the training target F = (x0 - c_skip x) / c_out, for data of variance 0.25.
    assert torch.allclose(c.c_in**2 * (0.25 + sigma**2), torch.ones(4).double())
    target_variance = ((1 - c.c_skip) ** 2 * 0.25 + c.c_skip**2 * sigma**2) / c.c_out**2
    assert torch.allclose(target_variance, torch.ones(4).double())


def test_clock_is_quarter_log_sigma_times_the_scale():
    sigma = torch.tensor([2.0])
    assert EDMPrecond(time_scale=1000.0)(sigma).c_noise.item() == pytest.approx(250 * 0.6931472)
    assert EDMPrecond(time_scale=1.0)(sigma).c_noise.item() == pytest.approx(0.25 * 0.6931472)


def test_the_clock_at_zero_is_that_of_the_smallest_normal_number():
    at = EDMPrecond(time_scale=1.0)(torch.tensor([0.0, torch.finfo(torch.float32).tiny, 1e-37])).c_noise
    assert at[0] == at[1] == pytest.approx(0.25 * math.log(2.0**-126)) and at[2] > at[1]


def test_the_second_clock_is_the_first_at_the_lower_level():
    """Down to 0.002: below, where ln has no end, it stands still."""
    precond, lower = EDMPrecond(time_scale=1.0), torch.tensor([0.0, 1e-4, 0.002, 3.0])
    expected = torch.tensor([0.002, 0.002, 0.002, 3.0]).log() / 4
    torch.testing.assert_close(precond.second(torch.full((4,), 5.0), lower), expected)
    t, r = torch.tensor([0.9, 0.6]), torch.tensor([0.5, 0.6])
    torch.testing.assert_close(FlowPrecond().second(t / (1 - t), r / (1 - r)), t - r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "precond", [ConsistencyPrecond(), ConsistencyPrecond(printed_c_out=True), PiecewisePrecond()]
)
def test_boundary_is_the_identity(precond, dtype):
    c = precond(torch.tensor([0.002], dtype=dtype))
    assert c.c_skip == 1 and c.c_out == 0


def test_piecewise_is_free_form_above_the_boundary():
    c = PiecewisePrecond()(torch.tensor([0.0021, 80.0]))
    assert c.c_skip.tolist() == [0, 0] and c.c_out.tolist() == [1, 1]


def test_printed_c_out_differs_only_in_the_denominator():
    sigma = torch.tensor([0.1])
    code, printed = ConsistencyPrecond()(sigma), ConsistencyPrecond(printed_c_out=True)(sigma)
    assert code.c_skip == printed.c_skip
    ratio = (printed.c_out / code.c_out).item()
    assert ratio == pytest.approx(((0.25 + 0.01) / (0.25 + 0.098**2)) ** 0.5, rel=1e-6)


def test_golden_scalings():
    g = golden_data.load("scalings")
    sigma = g.tensor("sigmas")
    for name, precond in (("edm", EDMPrecond()), ("distill", ConsistencyPrecond())):
        c = precond(sigma)
        for key in ("c_skip", "c_out", "c_in"):
            torch.testing.assert_close(getattr(c, key), g.tensor(f"{name}/{key}"), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(EDMPrecond()(sigma).c_noise, g.tensor("rescaled_t"), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(get_snr(sigma), g.tensor("snr"), rtol=1e-5, atol=0)
    for name in (n for n, row in WEIGHTINGS.items() if not row.pairs):
        expected = g.tensor(f"weight/{name}")
        torch.testing.assert_close(get_weightings(name, get_snr(sigma), 0.5), expected, rtol=1e-5, atol=0)


def test_karras_weighting_is_the_inverse_square_of_c_out():
    sigma = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    weight = get_weightings("karras", get_snr(sigma), 0.5)
    torch.testing.assert_close(weight, EDMPrecond()(sigma).c_out ** -2)


def test_unknown_names():
    with pytest.raises(UserError, match="weight_schedule"):
        get_weightings("snr2", torch.ones(1), 0.5)
    with pytest.raises(UserError, match="--boundary"):
        boundary_precond("free", sigma_data=0.5, sigma_min=0.002, time_scale=1000.0)
