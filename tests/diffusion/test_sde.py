"""SDEs, their samplers and likelihoods on data whose marginals, score and flow are known."""

import math
from itertools import pairwise

import pytest
import torch

from cm.config.choices import SDES
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.grid import karras_sigmas
from cm.diffusion.precond import EDMPrecond
from cm.diffusion.sde import EDMSDE, VESDE, VPSDE, SubVPSDE, create_sde
from cm.errors import UserError
from cm.sampling.noise import get_generator
from cm.sampling.ode import sample_heun
from cm.sampling.predictor_corrector import CORRECTORS, PREDICTORS, sample_pc, sample_rk45
from tests.helpers.analytic import Gaussian
from tests.helpers.models import tiny_unet

GAUSS = Gaussian(mean=0.3, std=0.5)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def sdes():
    return {"ve": VESDE(0.01, 5.0), "vp": VPSDE(), "subvp": SubVPSDE(), "edm": EDMSDE(5.0, 0.01)}


def score(sde, z, t):
    """Exact score of Gaussian data."""
    return sde.score(GAUSS.denoise(z / sde.alpha(t), sde.level(t)), z, t)


def moments(sde, t):
    """Mean and standard deviation of z(t) on Gaussian data."""
    return sde.alpha(t) * GAUSS.mean, ((sde.alpha(t) * GAUSS.std) ** 2 + sde.std(t) ** 2).sqrt()


# ---- definitions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
def test_marginals_solve_the_moment_equations(name):
    """d alpha / dt = alpha f'(t) and d std^2 / dt = 2 f' std^2 + g^2, with drift f' z."""
    sde = sdes()[name]
    t = double(0.1, 0.5, 0.9).requires_grad_()
    rate = sde.drift(torch.ones(3).double(), t)
    alpha, variance = sde.alpha(t) + 0 * t, sde.std(t) ** 2
    (alpha_deriv,) = torch.autograd.grad(alpha.sum(), t, retain_graph=True)
    (variance_deriv,) = torch.autograd.grad(variance.sum(), t)
    torch.testing.assert_close(alpha_deriv, rate * alpha)
    torch.testing.assert_close(variance_deriv, 2 * rate * variance + sde.diffusion(t) ** 2)
    torch.testing.assert_close(sde.time(sde.level(t)), t)


def test_definitions_by_hand():
    t = scalar(0.5)
    integral = 0.1 * 0.5 + 19.9 * 0.125
    assert VPSDE().alpha(t).item() == pytest.approx(math.exp(-integral / 2))
    assert VPSDE().std(t).item() == pytest.approx(math.sqrt(1 - math.exp(-integral)))
    assert SubVPSDE().std(t).item() == pytest.approx(1 - math.exp(-integral))
    assert VPSDE().diffusion(t).item() == pytest.approx(math.sqrt(0.1 + 19.9 * 0.5))
    assert VESDE(0.01, 50).std(t).item() == pytest.approx(math.sqrt(0.01 * 50))
    assert VESDE(0.01, 50).diffusion(t).item() == pytest.approx(math.sqrt(0.5 * 2 * math.log(5000)))
    assert EDMSDE().diffusion(t).item() == pytest.approx(1.0)
    # Discrete forward steps: sigma_t^2 - sigma_r^2, and 1 - beta with beta = 1 - exp(-integral from r to t).
    scale, variance = VESDE(0.01, 50).transition(scalar(0.4), t)
    assert (scale, variance.item()) == (1, pytest.approx(0.5 - VESDE(0.01, 50).std(scalar(0.4)) ** 2))
    scale, variance = VPSDE().transition(scalar(0.4), t)
    beta = 1 - math.exp(-(integral - 0.1 * 0.4 - 19.9 * 0.08))
    assert (scale.item(), variance.item()) == (pytest.approx(math.sqrt(1 - beta)), pytest.approx(beta))


@pytest.mark.parametrize("name", SDES)
def test_score(name):
    sde = sdes()[name]
    z = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = scalar(0.4)
    mean, deviation = moments(sde, t)
    torch.testing.assert_close(score(sde, z, t), -(z - mean) / deviation**2)


@pytest.mark.parametrize("name", SDES)
def test_forward_simulation_has_the_marginals(name):
    sde = sdes()[name]
    generator = torch.Generator().manual_seed(0)
    end = scalar(0.6)
    z = GAUSS.sample((40000,), generator)
    times = torch.linspace(0, end.item(), 201, dtype=torch.float64)
    z = sde.alpha(times[0]) * z + sde.std(times[0]) * torch.randn(40000, generator=generator).double()
    for t, following in pairwise(times):
        dw = (following - t).sqrt() * torch.randn(40000, generator=generator).double()
        z = z + sde.drift(z, t) * (following - t) + sde.diffusion(t) * dw
    mean, std = moments(sde, end)
    assert z.mean().item() == pytest.approx(mean.item(), abs=0.01)
    assert z.std().item() == pytest.approx(std.item(), rel=0.02)


@pytest.mark.parametrize("name", SDES)
def test_reverse_simulation_and_flow_return_to_the_data(name):
    sde = sdes()[name]
    generator = torch.Generator().manual_seed(1)
    levels = sde.levels(300, 0.02, 5.0)
    times = sde.time(levels)
    mean, std = moments(sde, times[0])
    start = mean + std * torch.randn(20000, generator=generator, dtype=torch.float64)
    by_sde = by_flow = start
    for t, r in pairwise(times):
        dw = (t - r).sqrt() * torch.randn(20000, generator=generator).double()
        by_sde = (
            by_sde + sde.reverse_drift(by_sde, t, score(sde, by_sde, t)) * (r - t) + sde.diffusion(t) * dw
        )
        by_flow = by_flow + sde.flow(by_flow, t, score(sde, by_flow, t)) * (r - t)
    mean, std = moments(sde, times[-1])
    for z in (by_sde, by_flow):
        assert z.mean().item() == pytest.approx(mean.item(), abs=0.03)
        assert z.std().item() == pytest.approx(std.item(), rel=0.04)
    # The flow is deterministic: each point goes where the closed form says.
    exact = GAUSS.flow(start / sde.alpha(times[0]), levels[0], levels[-1]) * sde.alpha(times[-1])
    assert (by_flow - exact).abs().mean() < 0.03


def test_levels_of_sampling():
    assert VESDE(0.02, 80).levels(3, 0.02, 80).tolist() == pytest.approx([80, math.sqrt(1.6), 0.02], rel=1e-4)
    # Within the SDE's own times even if the model's range is larger.
    widest = VPSDE().levels(10, 1e-4, 1000.0)
    assert widest[[0, -1]].tolist() == pytest.approx([152.167, 0.010486], rel=1e-3)
    torch.testing.assert_close(EDMSDE().levels(7, 0.002, 80.0), karras_sigmas(7, 0.002, 80.0))
    with pytest.raises(UserError, match="sde must be one of ve, vp, subvp, edm"):
        create_sde("vpp")


# ---- predictor-corrector ---------------------------------------------------------------------------


class Noise:
    """One seeded stream."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)

    def randn_like(self, x):
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


def pc(sde, steps=80, **options):
    """Samples (300, 40) of predictor and corrector from the exact marginal at level 5."""
    levels = torch.cat([sde.levels(steps, 0.01, 5.0), double(0.0)])
    noise = Noise()
    x = GAUSS.mean + (0.25 + levels[0] ** 2).sqrt() * noise.randn_like(torch.empty(300, 40).double())
    return sample_pc(GAUSS.denoise, x, levels, noise, sde=sde, **options)


@pytest.mark.parametrize("predictor", [p for p in PREDICTORS if p != "none"])
@pytest.mark.parametrize("name", SDES)
def test_predictors_sample_the_data(name, predictor):
    sample = pc(sdes()[name], predictor=predictor, corrector="none")
    assert sample.mean().item() == pytest.approx(GAUSS.mean, abs=0.02)
    assert sample.std().item() == pytest.approx(GAUSS.std, rel=0.06)


def test_correctors_repair_a_coarse_predictor():
    sde = sdes()["ve"]
    alone = pc(sde, steps=12, predictor="reverse_diffusion", corrector="none")
    for corrector in ("langevin", "annealed_langevin"):
        corrected = pc(sde, steps=12, corrector=corrector, corrector_steps=6, snr=0.3)
        assert abs(corrected.std().item() - GAUSS.std) < 0.7 * abs(alone.std().item() - GAUSS.std), corrector


def test_annealed_langevin_alone_reaches_the_data():
    """No predictor: the corrector follows the levels down, from a spread of 5 to that of the data."""
    sample = pc(
        sdes()["vp"], steps=30, predictor="none", corrector="annealed_langevin", corrector_steps=15, snr=0.3
    )
    assert sample.std().item() == pytest.approx(GAUSS.std, rel=0.1)


def test_one_step_of_each_predictor_by_hand():
    z, t, r = double(0.7), scalar(0.5), scalar(0.4)
    ve, vp = VESDE(0.01, 50), VPSDE()
    s = double(-1.3)
    high, low = ve.std(t) ** 2, ve.std(r) ** 2
    mean, std = PREDICTORS.load("reverse_diffusion")(ve, z, t, r, s)
    torch.testing.assert_close(mean, z + (high - low) * s)
    torch.testing.assert_close(std, (high - low).sqrt())
    mean, std = PREDICTORS.load("ancestral")(ve, z, t, r, s)
    torch.testing.assert_close(mean, z + (high - low) * s)
    torch.testing.assert_close(std, (low * (high - low) / high).sqrt())
    beta = 1 - (vp.alpha(t) / vp.alpha(r)) ** 2
    mean, std = PREDICTORS.load("reverse_diffusion")(vp, z, t, r, s)
    torch.testing.assert_close(mean, (2 - (1 - beta).sqrt()) * z + beta * s)
    torch.testing.assert_close(std, beta.sqrt())
    mean, _ = PREDICTORS.load("ancestral")(vp, z, t, r, s)
    torch.testing.assert_close(mean, (z + beta * s) / (1 - beta).sqrt())
    mean, std = PREDICTORS.load("euler_maruyama")(vp, z, t, r, s)
    rate = 0.1 + 19.9 * 0.5
    torch.testing.assert_close(mean, z + 0.1 * (0.5 * rate * z + rate * s))
    assert std.item() == pytest.approx(math.sqrt(0.1 * rate))


def test_langevin_step_sizes_by_hand():
    z = torch.ones(2, 4, dtype=torch.float64)
    noise, s = 2 * z, double(1.0, 4.0)[:, None] * z
    step = CORRECTORS.load("langevin")(z, s, noise, scalar(0.9), scalar(3.0), 0.16)
    assert step.flatten().tolist() == pytest.approx([1.8 * (0.16 * 2) ** 2, 1.8 * (0.16 / 2) ** 2])
    step = CORRECTORS.load("annealed_langevin")(z, s, noise, scalar(0.9), scalar(3.0), 0.16)
    assert step.item() == pytest.approx(1.8 * (0.16 * 3) ** 2)


def test_evaluations_and_independence_of_the_batch():
    calls = []

    def denoise(x, sigma):
        calls.append(sigma[0].item())
        return GAUSS.denoise(x, sigma)

    sde = sdes()["ve"]
    levels = torch.cat([sde.levels(5, 0.01, 5.0), double(0.0)])
    x = 5 * torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def draw(rows):
        generator = get_generator("indexed", seed=1)
        generator.set_rows(rows)
        return sample_pc(denoise, x[rows], levels, generator, sde=sde, corrector_steps=2)

    together = draw([0, 1, 2])
    assert len(calls) == 5 * 3 and together.dtype == torch.float32
    torch.testing.assert_close(torch.cat([draw([0]), draw([1, 2])]), together)


def test_unknown_predictor_and_corrector():
    with pytest.raises(UserError, match="predictor must be one of reverse_diffusion"):
        pc(VPSDE(), predictor="heun")
    with pytest.raises(UserError, match="corrector must be one of langevin"):
        pc(VPSDE(), corrector="mala")


# ---- adaptive solver -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SDES)
def test_rk45_follows_the_exact_flow(name):
    sde = sdes()[name]
    x = 5 * torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = double(5.0, 0.02)
    exact = GAUSS.flow(x, levels[0], levels[1])
    errors = [
        (sample_rk45(GAUSS.denoise, x, levels, sde=sde, tolerance=tolerance) - exact).abs().max().item()
        for tolerance in (1e-3, 1e-7)
    ]
    assert errors[1] < 1e-5 and errors[1] < errors[0] / 20


def test_a_sample_of_rk45_does_not_depend_on_its_batch():
    """With a network, whose kernels round by the batch; a stiff neighbour has a far larger start."""
    net = Denoiser(tiny_unet().eval(), EDMPrecond())
    x = 80 * torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = double(80.0, 0.002, 0.0)
    together = sample_rk45(net, x, levels, tolerance=1e-3)
    alone = sample_rk45(net, x[:1], levels, tolerance=1e-3)
    torch.testing.assert_close(alone, together[:1], rtol=0, atol=2e-5)
    beside = sample_rk45(net, torch.cat([x[:1], 1e4 * x[1:2]]), levels, tolerance=1e-3)
    torch.testing.assert_close(alone, beside[:1], rtol=0, atol=2e-5)


def test_rk45_and_heun_agree_down_to_zero():
    x = 80 * torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigmas = torch.cat([karras_sigmas(300, 0.002, 80.0), double(0.0)])
    ours = sample_rk45(GAUSS.denoise, x, sigmas)
    torch.testing.assert_close(
        ours, sample_heun(GAUSS.denoise, x, sigmas, get_generator("dummy")), atol=1e-3, rtol=0
    )
