"""Exact log-likelihood of a denoiser's probability flow (Song et al. 2021, arXiv:2011.13456, section 4.3 and App. D.2).

In u = ln sigma the flow is dx/du = x - D(x; sigma), and log p changes along it by the divergence:
log p(x; sigma_min) = log N(x(sigma_max); 0, sigma_max^2) + integral of div(x - D) du from ln sigma_min to ln sigma_max.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cm.config.choices import PROBES
from cm.diffusion.denoiser import DenoiseFn
from cm.sampling.noise import SampleGenerator
from cm.sampling.runge_kutta import solve_rk45

# One image's values from 0 to 255 lie this far apart in [-1, 1].
LEVELS_PER_UNIT = 127.5


class Likelihood(NamedTuple):
    """log_prob (B,) float64 in nats; latent: where the flow took the images; nfe (B,): evaluations of the flow."""

    log_prob: Tensor
    latent: Tensor
    nfe: Tensor


def rademacher(x: Tensor, generator: SampleGenerator) -> Tensor:
    """Signs: the estimate is exact where the Jacobian is diagonal."""
    return generator.randn_like(x).sign()


def gaussian(x: Tensor, generator: SampleGenerator) -> Tensor:
    """Standard normal numbers."""
    return generator.randn_like(x)


# Stands for the sum over all coordinates among PROBES
EXACT = None


def log_likelihood(
    denoiser: DenoiseFn,
    x0: Tensor,
    generator: SampleGenerator | None = None,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    probe: str = "rademacher",
    tolerance: float = 1e-5,
) -> Likelihood:
    """log p of images x0 (B, C, ...) by the flow from sigma_min to sigma_max, with an adaptive RK45 solver.

    Every image has steps of its own. probe: Skilling-Hutchinson's estimate of the divergence, e^T (d(x - D)/dx) e with
    one e per image, held fixed along the flow; `exact` takes one backward pass per coordinate. The estimate is unbiased
    in log p.
    """
    draw = PROBES.load(probe)
    probes = [draw(x0, generator)] if draw else _unit_vectors(x0)

    def slope(u: Tensor, state: Tensor) -> Tensor:
        x = state[:, :-1].reshape(x0.shape).to(x0, copy=True)
        flow, divergence = _flow_and_divergence(denoiser, x, u.exp().to(x0), probes)
        return torch.cat([flow.flatten(1), divergence[:, None]], dim=1)

    begin = torch.cat([x0.flatten(1), x0.new_zeros(len(x0), 1)], dim=1)  # the image, and the integral so far
    ends = math.log(sigma_min), math.log(sigma_max)
    final, nfe = solve_rk45(slope, *ends, begin, rtol=tolerance, atol=tolerance)
    latent, integral = final[:, :-1].reshape(x0.shape), final[:, -1]
    prior = -0.5 * ((latent / sigma_max) ** 2 + math.log(2 * math.pi * sigma_max**2))
    return Likelihood(prior.flatten(1).sum(1) + integral, latent.to(x0), nfe)


def _unit_vectors(x: Tensor) -> list[Tensor]:
    """One probe per coordinate, equal for all images."""
    basis = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).reshape(-1, 1, *x.shape[1:])
    return list(basis.expand(-1, *x.shape))


@torch.enable_grad()
def _flow_and_divergence(
    denoiser: DenoiseFn, x: Tensor, sigma: Tensor, probes: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """x - D(x; sigma) and the sum over probes of e^T J e (B,), J its Jacobian."""
    x = x.requires_grad_()
    flow = x - denoiser(x, sigma)
    divergence = x.new_zeros(len(x))
    for i, e in enumerate(probes):
        (product,) = torch.autograd.grad(flow, x, e, retain_graph=i < len(probes) - 1)
        divergence += (product * e).flatten(1).sum(1)
    return flow.detach(), divergence


def bits_per_dim(log_prob: Tensor, dims: int) -> Tensor:
    """-log2 p of pixel values 0..255 per dimension, from log p (nats) of images x = value / 127.5 - 1.

    log2(127.5) is the change of variables. With uniform dequantisation noise this bounds the bits of the 8-bit image
    from above.
    """
    return -log_prob / (dims * math.log(2)) + math.log2(LEVELS_PER_UNIT)


def dequantized(x0: Tensor, uniforms: Tensor) -> Tensor:
    """8-bit images in [-1, 1] with noise of one grey level around each value; uniforms in [0, 1) like x0."""
    return x0 + (uniforms - 0.5) / LEVELS_PER_UNIT
