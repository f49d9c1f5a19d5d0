"""The four columns of EDM's Table 1: constants, scalings, training noise, time steps, the general sampler."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from cm.config.choices import NOISE_SCHEDULES, STATE_SCALES
from cm.config.rows import PRECONDS, TIME_STEPS
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.grid import karras_sigmas
from cm.diffusion.noise_levels import ddpm_uniform_levels, iddpm_uniform_levels, ve_levels, vp_levels
from cm.diffusion.noise_schedules import (
    VPSchedule,
    ddpm_levels,
    iddpm_levels,
    nearest_level,
)
from cm.diffusion.precond import BoundaryPrecond, IDDPMPrecond, boundary_precond, denoiser_precond
from cm.errors import UserError
from cm.sampling.general import sample_general
from cm.sampling.noise import get_generator
from cm.sampling.ode import sample_euler, sample_heun
from cm.sampling.registry import run_sampler
from cm.seeding import StepRandom
from tests.helpers.analytic import Gaussian
from tests.helpers.ideal import SolvedMixture

GAUSS = Gaussian(mean=0.3, std=0.5)
MIXTURE = SolvedMixture(torch.tensor([[-1.0, 0.5], [0.8, -0.3], [0.1, 1.2]], dtype=torch.float64), std=0.2)
DUMMY = get_generator("dummy")


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- constants and schedules ---------------------------------------------------------------------


def test_published_constants():
    assert VPSchedule().sigma(double(1.0, 1e-3, 1e-5)).tolist() == pytest.approx(
        [152.167, 0.010484, 0.0010005], rel=3e-4
    )
    u = iddpm_levels()
    assert u.shape == (1000,) and (u[:-1] > u[1:]).all()
    assert u[[0, 8]].tolist() == pytest.approx([20291.17, 80.2037], rel=1e-6)
    # Published values that come from float32 arithmetic differ in the fourth digit.
    assert u[999].item() == pytest.approx(0.0064223, rel=6e-4)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_schedules_are_consistent(name):
    schedule = NOISE_SCHEDULES.load(name)(0.002, 80.0)
    t = double(1e-3, 0.03, 0.4, 0.9).requires_grad_()
    sigma = schedule.sigma(t)
    torch.testing.assert_close(schedule.time(sigma), t, rtol=1e-9, atol=0)
    (derivative,) = torch.autograd.grad(sigma.sum(), t)
    torch.testing.assert_close(schedule.sigma_deriv(t), derivative)


@pytest.mark.parametrize("name", STATE_SCALES)
def test_scale_derivative(name):
    schedule, scaling = VPSchedule(), STATE_SCALES.load(name)()
    t = double(0.01, 0.3, 1.0).requires_grad_()
    scale = scaling.scale(schedule.sigma(t)) + 0 * t
    (derivative,) = torch.autograd.grad(scale.sum(), t)
    torch.testing.assert_close(scaling.scale_deriv(schedule.sigma(t), schedule.sigma_deriv(t)), derivative)


def test_vp_scale_is_that_of_the_sde():
    # s(t) = exp(-(beta_d t^2 / 2 + beta_min t) / 2).
    t = double(0.2, 0.7)
    expected = torch.exp(-0.5 * (19.9 * t**2 / 2 + 0.1 * t))
    torch.testing.assert_close(STATE_SCALES.load("vp")().scale(VPSchedule().sigma(t)), expected)


def test_time_of_small_levels_in_float32():
    sigma = torch.tensor([1e-3, 2e-3])
    exact = VPSchedule().time(sigma.double())
    torch.testing.assert_close(VPSchedule().time(sigma).double(), exact, rtol=1e-5, atol=0)


def test_time_steps():
    for name, row in TIME_STEPS.items():
        law = row.load()
        sigma = law(12, 0.02, 80.0)
        assert sigma.shape == (12,) and (sigma[:-1] > sigma[1:]).all(), name
        assert law(1, 0.02, 80.0).shape == (1,)
        if name != "iddpm":
            assert sigma[[0, -1]].tolist() == pytest.approx([80.0, 0.02], rel=1e-6), name
    # VE: t = sigma^2 falls geometrically.
    assert (TIME_STEPS.load("ve")(3, 0.02, 100.0) ** 2).tolist() == pytest.approx([1e4, 2.0, 4e-4])
    # VP on its own range: equal steps of time.
    own = VPSchedule().sigma(double(1e-3, 1.0)).tolist()
    times = VPSchedule().time(TIME_STEPS.load("vp")(5, *own))
    torch.testing.assert_close(times, torch.linspace(1, 1e-3, 5).double(), rtol=1e-5, atol=1e-9)
    # iDDPM with the published range begins at j0 = 8 and ends at the last level.
    u = iddpm_levels()
    torch.testing.assert_close(TIME_STEPS.load("iddpm")(3, 0.002, 81.0), u[[8, 504, 999]])
    with pytest.raises(UserError, match="--time_steps iddpm has 1 levels"):
        TIME_STEPS.load("iddpm")(40, 80.0, 81.0)


def test_refitted_vp_schedule_spans_the_range():
    fitted = VPSchedule.between(0.03, 50.0, 1e-3)
    assert fitted.sigma(double(1e-3, 1.0)).tolist() == pytest.approx([0.03, 50.0])


# ---- preconditionings ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRECONDS)
def test_the_exact_network_gives_the_exact_denoiser(name):
    """F from the definition of each column, on Gaussian data; the network sees its scaled input and its clock."""
    sigma = double(0.013, 0.6, 7.0, 75.0)
    precond = denoiser_precond(name)
    sigma = precond.round_sigma(sigma)
    clocks = {
        "edm": lambda c: torch.exp(c / 250),
        "vp": lambda c: VPSchedule().sigma(c / 999),
        "ve": lambda c: 2 * torch.exp(c / 250),
        "iddpm": lambda c: iddpm_levels()[(999 - c).long()],
        "trigflow": lambda c: 0.5 * torch.tan(c),
        "ddpm": lambda c: ddpm_levels()[(999 - c).long()],
        "flow": lambda c: c / (1 - c),
    }

    def net(x_in, clock):
        level = clocks[name](clock)[:, None]
        if name == "flow":  # the velocity of x0 + t (noise - x0), whose input is (1 - t) x
            x = x_in * (1 + level)
            clean = GAUSS.denoise(x, level)
            return (x - clean) / level - clean
        if name in ("edm", "trigflow"):
            x = x_in * (level**2 + 0.25).sqrt()
            f = (GAUSS.denoise(x, level) - 0.25 / (level**2 + 0.25) * x) / (
                level * 0.5 / (level**2 + 0.25).sqrt()
            )
            return f if name == "edm" else -f
        x = x_in if name == "ve" else x_in * (level**2 + 1).sqrt()
        noise = (x - GAUSS.denoise(x, level)) / level
        return -noise if name == "ve" else noise

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sigma[:, None]
    torch.testing.assert_close(Denoiser(net, precond)(x, sigma), GAUSS.denoise(x, sigma))


def test_iddpm_clock_counts_from_the_cleanest_level():
    c = IDDPMPrecond()(torch.tensor([80.2, 0.0064, 30000.0]))
    assert c.c_noise.tolist() == [991, 0, 999]
    levels = double(8.0, 4.0, 1.0)
    assert nearest_level(levels, double(9, 6.1, 5.9, 2.4, 0.0)).tolist() == [0, 0, 1, 2, 2]


def test_iddpms_smooth_clock_meets_the_levels_and_rises_between_them():
    smooth, levels = IDDPMPrecond().smooth(), iddpm_levels()[::50]
    torch.testing.assert_close(smooth(levels).c_noise, IDDPMPrecond()(levels).c_noise)
    sigma = torch.logspace(math.log10(0.0065), 2, 500, dtype=torch.float64)
    clock = smooth(sigma).c_noise
    assert (clock.diff() > 0).all() and (clock - IDDPMPrecond()(sigma).c_noise).abs().max() < 1
    assert torch.equal(smooth.round_sigma(sigma), sigma)
    for name in ("edm", "vp", "ve", "trigflow"):
        precond = denoiser_precond(name)
        assert precond.smooth() == precond


def test_only_discrete_columns_round():
    sigma = double(79.9, 0.5, 0.0)
    for name in PRECONDS:
        rounded = denoiser_precond(name).round_sigma(sigma)
        if known := {"iddpm": iddpm_levels, "ddpm": ddpm_levels}.get(name):
            levels = known()
            nearest = (levels[:, None] - sigma[:2]).abs().argmin(0)
            torch.testing.assert_close(rounded, torch.cat([levels[nearest], double(0.0)]))
        else:
            assert torch.equal(rounded, sigma)


@pytest.mark.parametrize("name", ["vp", "ve", "iddpm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_consistency_functions_of_the_other_columns(name, dtype):
    precond = boundary_precond("skip", sigma_data=0.5, sigma_min=0.02, time_scale=1.0, column=name)
    assert isinstance(precond, BoundaryPrecond)
    sigma = torch.tensor([0.02, 0.03, 50.0], dtype=dtype)
    c, plain = precond(sigma), denoiser_precond(name, time_scale=1.0)(sigma)
    edm = boundary_precond("skip", sigma_data=0.5, sigma_min=0.02, time_scale=1.0)(sigma)
    assert c.c_skip[0] == 1 and c.c_out[0] == 0
    # Input and clock are the column's; the output is bounded and has the column's sign.
    assert torch.equal(c.c_in, plain.c_in) and torch.equal(c.c_noise, plain.c_noise)
    assert torch.equal(c.c_skip, edm.c_skip)
    assert torch.equal(c.c_out[1:], (1 if name == "ve" else -1) * edm.c_out[1:])


def test_unknown_columns():
    with pytest.raises(UserError, match=r"precond must be one of edm, vp, ve, iddpm, .*ddpm"):
        denoiser_precond("cosine")
    with pytest.raises(UserError, match="--boundary piecewise"):
        boundary_precond("piecewise", sigma_data=0.5, sigma_min=0.02, time_scale=1.0, column="vp")


# ---- training noise ------------------------------------------------------------------------------


def test_noise_distributions():
    random = StepRandom(seed=1, step=0, start=0, stop=20000, global_batch=20000)
    sigma, weight, index = vp_levels().draw(random)
    assert index is None and (weight == 1).all()
    times = VPSchedule().time(sigma.double())
    assert 0 < times.min() < 1e-3 and 1 - 1e-3 < times.max() <= 1 + 1e-5
    assert times.mean().item() == pytest.approx(0.5, abs=0.01)
    assert times.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.005)
    logs = ve_levels(SimpleNamespace(sigma_min=0.02, sigma_max=100.0)).draw(random)[0].log()
    assert logs.min() >= math.log(0.02) - 1e-5 and logs.max() <= math.log(100) + 1e-5
    assert logs.mean().item() == pytest.approx(math.log(0.02 * 100) / 2, abs=0.1)
    for sampler, known in ((iddpm_uniform_levels(), iddpm_levels()), (ddpm_uniform_levels(), ddpm_levels())):
        levels = sampler.draw(random)[0]
        chosen = nearest_level(known, levels.double())
        assert torch.allclose(known[chosen].float(), levels)
        assert chosen.min() == 0 and chosen.max() == 999 and abs(chosen.double().mean().item() - 499.5) < 10


# ---- the general sampler -------------------------------------------------------------------------


def test_with_edms_choices_it_is_heun():
    torch.manual_seed(0)
    x = 80 * torch.randn(5, 3, dtype=torch.float64)
    sigmas = torch.cat([karras_sigmas(9, 0.002, 80.0), double(0.0)])
    churn = {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
    seeded = [get_generator("indexed", seed=3) for _ in range(2)]
    ours = sample_general(GAUSS.denoise, x, sigmas, seeded[0], **churn)
    torch.testing.assert_close(ours, sample_heun(GAUSS.denoise, x, sigmas, seeded[1], **churn))
    ours = sample_general(GAUSS.denoise, x, sigmas, DUMMY, order=1)
    torch.testing.assert_close(ours, sample_euler(GAUSS.denoise, x, sigmas))


@pytest.fixture(scope="module")
def crossing():
    """Points at level 3 and where the probability flow takes them at level 0.8."""
    x = 3 * torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, MIXTURE.flow(x, 3.0, 0.8)


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("scale", STATE_SCALES)
@pytest.mark.parametrize(("order", "alpha"), [(1, 1.0), (2, 1.0), (2, 0.5), (2, 2 / 3)])
def test_observed_orders(crossing, schedule, scale, order, alpha):
    """Halving the steps in the schedule's time divides the error by 2 or 4, whatever curve joins the levels."""
    x, exact = crossing
    ends = NOISE_SCHEDULES.load(schedule)(0.8, 3.0).time(double(3.0, 0.8)).tolist()
    errors = []
    for steps in (40, 80):
        sigmas = NOISE_SCHEDULES.load(schedule)(0.8, 3.0).sigma(
            torch.linspace(*ends, steps + 1, dtype=torch.float64)
        )
        sample = sample_general(
            MIXTURE.denoise,
            x,
            sigmas,
            DUMMY,
            noise_schedule=schedule,
            state_scale=scale,
            order=order,
            alpha=alpha,
        )
        errors.append((sample - exact).abs().mean().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def edm_ablation(denoise, noise, steps: int, low: float, high: float, scaled: bool, second: bool):
    """EDM's ablation sampler with schedule vp on its own grid, from its formulas (Karras et al. 2022, App. C.1)."""
    beta_d = 2 * (math.log(low**2 + 1) / 1e-3 - math.log(high**2 + 1)) / (1e-3 - 1)
    beta_min = math.log(high**2 + 1) - beta_d / 2

    def sigma(t):
        return math.sqrt(math.exp(beta_d * t * t / 2 + beta_min * t) - 1)

    def time(level):
        return (math.sqrt(beta_min**2 + 2 * beta_d * math.log(level**2 + 1)) - beta_min) / beta_d

    def s(t):
        return 1 / math.sqrt(1 + sigma(t) ** 2) if scaled else 1.0

    def slope(z, t):
        level, rate = sigma(t), (beta_min + beta_d * t) / 2 * (sigma(t) + 1 / sigma(t))
        s_rate = -level * rate * s(t) ** 3 if scaled else 0.0
        denoised = denoise(z / s(t), noise.new_full((len(z),), level))
        return (rate / level + s_rate / s(t)) * z - rate * s(t) / level * denoised

    roots = [high ** (1 / 7) + i / (steps - 1) * (low ** (1 / 7) - high ** (1 / 7)) for i in range(steps)]
    times = [*(time(root**7) for root in roots), 0.0]
    z = noise * sigma(times[0]) * s(times[0])
    for t, t_next in pairwise(times):
        d = slope(z, t)
        if second and t_next > 0:
            d = (d + slope(z + (t_next - t) * d, t_next)) / 2
        z = z + (t_next - t) * d
    return z


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.002, 80.0), (0.02, 100.0)])
def test_the_curve_vp_is_derived_from_the_range(scaled, second, low, high):
    noise = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = edm_ablation(GAUSS.denoise, noise, 9, low, high, scaled, second)
    options = {"noise_schedule": "vp", "state_scale": "vp" if scaled else "none", "order": 1 + second}
    sample = run_sampler(
        "general", GAUSS.denoise, noise * high, None, steps=9, sigma_min=low, sigma_max=high, options=options
    )
    torch.testing.assert_close(sample, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_the_end_of_a_derived_curve_is_time_zero():
    for low, high in ((0.002, 80.0), (0.02, 100.0)):  # beta_min below 0 and above
        curve = VPSchedule.between(low, high)
        assert curve.time(double(0.0)).tolist() == [0.0]
        sigma = double(low, 1.3 * low, 1.0, high)
        torch.testing.assert_close(curve.sigma(curve.time(sigma)), sigma)


def test_ddim_is_euler_in_sigma():
    """The VP state with Euler steps is another curve; iDDPM + DDIM, linear without scale, is the plain one."""
    x = 5 * torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigmas = torch.cat([TIME_STEPS.load("vp")(6, 0.02, 5.0), double(0.0)])
    plain = sample_general(GAUSS.denoise, x, sigmas, DUMMY, order=1)
    curved = sample_general(GAUSS.denoise, x, sigmas, DUMMY, order=1, noise_schedule="vp", state_scale="vp")
    assert torch.allclose(plain, sample_euler(GAUSS.denoise, x, sigmas)) and not torch.allclose(plain, curved)


def test_churned_levels_are_rounded():
    asked = []

    def denoise(x, sigma):
        asked.append(sigma[0].item())
        return GAUSS.denoise(x, sigma)

    precond = IDDPMPrecond()
    sigmas = torch.cat([TIME_STEPS.load("iddpm")(6, 0.02, 81.0), double(0.0)])
    x = 80 * torch.randn(2, 3, dtype=torch.float64)
    sample_general(denoise, x, sigmas, DUMMY, s_churn=1.0, round_sigma=precond.round_sigma)
    known = iddpm_levels()
    assert all((known - level).abs().min() < 1e-9 for level in asked)
    assert asked[0] > sigmas[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"noise_schedule": "quadratic"}, "noise_schedule"),
        ({"state_scale": "half"}, "state_scale"),
        ({"order": 3}, "order must be 1 or 2"),
        ({"alpha": 0.0}, "alpha in"),
    ],
)
def test_unknown_choices(flags, message):
    with pytest.raises(UserError, match=message):
        sample_general(GAUSS.denoise, torch.zeros(1, 3), double(1.0, 0.0), DUMMY, **flags)
