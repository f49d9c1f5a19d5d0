"""Solvers of the probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022).

`sigmas` (N+1,) decreases and ends in 0 (or where the path shall end); x (B, C, ...) has noise level sigmas[0].
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from cm.diffusion.ddim import addim, of_snr
from cm.nn import append_dims
from cm.sampling.driver import Denoise, Step, Walk, sampler
from cm.sampling.noise import SampleGenerator, skip_draw


def to_d(x: Tensor, sigma: Tensor | float, denoised: Tensor) -> Tensor:
    """dx/dsigma = (x - D(x; sigma)) / sigma, the probability-flow ODE (Karras et al. 2022, Eq. 3 with Eq. 1)."""
    if isinstance(sigma, Tensor) and sigma.ndim:
        sigma = append_dims(sigma, x.ndim)
    return (x - denoised) / sigma


def churn(
    x: Tensor,
    sigma: Tensor,
    generator: SampleGenerator,
    steps: int,
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
    round_sigma: Callable[[Tensor], Tensor] = lambda sigma: sigma,
) -> tuple[Tensor, Tensor]:
    """Add noise to reach sigma_hat = (1 + gamma) sigma (Karras et al. 2022, Algorithm 2, lines 4-6).

    gamma = min(s_churn / steps, sqrt(2) - 1) for sigma in [s_tmin, s_tmax], else 0. round_sigma: to the levels that
    the network knows; never below sigma. One draw per call in every case: the order of draws does not depend on the
    churn settings.
    """
    gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
    if gamma <= 0:
        skip_draw(generator, x)
        return x, sigma
    sigma_hat = torch.maximum(round_sigma(sigma * (1 + gamma)), sigma)
    noise = s_noise * generator.randn_like(x)
    return x + (sigma_hat**2 - sigma**2).sqrt() * noise, sigma_hat


@sampler
def sample_euler(denoise: Denoise, x: Tensor, sigmas: Tensor, generator: SampleGenerator) -> Walk:
    """Euler steps: first order, one evaluation per step. Draws nothing."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        yield Step(x, sigma, denoised)
        x = x + (sigma_next - sigma) * to_d(x, sigma, denoised)
    return x


@sampler
def sample_addim(
    denoise: Denoise, x: Tensor, sigmas: Tensor, generator: SampleGenerator, *, eta: float = 0.1
) -> Walk:
    """aDDIM (Heek et al. 2024, Algorithm 3): Euler's steps with a longer noise. One evaluation each; draws nothing.

    eta 0 is `sample_euler`.
    """
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        yield Step(x, sigma, denoised)
        x = addim(x, denoised, sigma, sigma_next, of_snr(sigma, eta=eta))
    return x


@sampler
def sample_heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    generator: SampleGenerator,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Walk:
    """Heun's steps with churn (Karras et al. 2022, Algorithm 2): second order, 2N - 1 evaluations.

    Deterministic for s_churn = 0 (Algorithm 1). The step to sigma = 0 is an Euler step.
    """
    steps = len(sigmas) - 1
    for sigma, sigma_next in pairwise(sigmas):
        x, sigma_hat = churn(x, sigma, generator, steps, s_churn, s_tmin, s_tmax, s_noise)
        denoised = denoise(x, sigma_hat)
        yield Step(x, sigma, denoised, sigma_hat)
        d = to_d(x, sigma_hat, denoised)
        if sigma_next > 0:
            x_next = x + (sigma_next - sigma_hat) * d
            d = (d + to_d(x_next, sigma_next, denoise(x_next, sigma_next))) / 2
        x = x + (sigma_next - sigma_hat) * d
    return x


@sampler
def sample_dpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    generator: SampleGenerator,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Walk:
    """Midpoint steps with churn: second order, 2N evaluations (after DPM-Solver-2, Lu et al. 2022).

    The midpoint is taken in sigma^(1/3), also in the last step: sigma_mid = ((a^(1/3) + b^(1/3)) / 2)^3.
    """
    steps = len(sigmas) - 1
    for sigma, sigma_next in pairwise(sigmas):
        x, sigma_hat = churn(x, sigma, generator, steps, s_churn, s_tmin, s_tmax, s_noise)
        denoised = denoise(x, sigma_hat)
        yield Step(x, sigma, denoised, sigma_hat)
        sigma_mid = ((sigma_hat ** (1 / 3) + sigma_next ** (1 / 3)) / 2) ** 3
        x_mid = x + (sigma_mid - sigma_hat) * to_d(x, sigma_hat, denoised)
        x = x + (sigma_next - sigma_hat) * to_d(x_mid, sigma_mid, denoise(x_mid, sigma_mid))
    return x
