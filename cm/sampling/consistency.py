"""Samplers of consistency models (Song et al. 2023) and of progressively distilled ones (Salimans & Ho 2022)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cm.diffusion.denoiser import DenoiseFn
from cm.diffusion.grid import karras_sigma
from cm.errors import UserError
from cm.sampling.common import Callback, evaluate, intervals, report, start
from cm.sampling.noise import skip_draw
from cm.sampling.ode import sample_euler


def checked_ts(ts: Sequence[int] | None, steps: int) -> list[int]:
    """Grid indices of a multistep sampler: at least two of 0 (sigma_max) .. steps-1 (sigma_min), never decreasing."""
    if steps < 2:
        raise UserError(f"--steps must be at least 2 where --ts is used, got {steps}")
    if ts is None or len(ts) < 2:
        raise UserError(f"--ts needs at least two grid indices, such as 0,{steps - 1}, got {ts}")
    ts = [int(t) for t in ts]
    if any(a > b for a, b in pairwise(ts)):
        raise UserError(f"--ts must not decrease, got {','.join(map(str, ts))}")
    if ts[0] < 0 or ts[-1] > steps - 1:
        raise UserError(f"--ts must lie on the grid 0..{steps - 1}, got {','.join(map(str, ts))}")
    return ts


def ts_to_sigmas(
    ts: Sequence[int] | None, steps: int, sigma_min: float, sigma_max: float, rho: float
) -> Tensor:
    """Noise levels of grid indices on Karras's grid of `steps` points, float64."""
    position = torch.tensor(checked_ts(ts, steps), dtype=torch.float64) / (steps - 1)
    return karras_sigma(position, sigma_min, sigma_max, rho)


@torch.no_grad()
def sample_onestep(
    denoiser: DenoiseFn,
    x: Tensor,
    sigmas: Tensor,
    generator=None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """One evaluation of the consistency function: f(x, sigmas[0])."""
    x = start(x)
    sigma = sigmas[0].cpu()
    sample = evaluate(denoiser, x, sigma)
    report(callback, 0, x, sigma, sample)
    return sample


@torch.no_grad()
def sample_multistep(
    denoiser: DenoiseFn,
    x: Tensor,
    sigmas: Tensor,
    generator,
    progress: bool = False,
    callback: Callback | None = None,
    sigma_min: float = 0.002,
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1).

    For each level t but the last: x0 = f(x, t), then x = x0 + sqrt(s^2 - sigma_min^2) z with s the next level. The last
    level says where the sample ends: sigma_min or 0 gives x0 itself, anything above leaves noise in the result.
    """
    x = start(x)
    for i, sigma, sigma_next in intervals(sigmas, progress):
        x0 = evaluate(denoiser, x, sigma)
        report(callback, i, x, sigma, x0)
        if sigma_next > sigma_min:
            x = x0 + (sigma_next**2 - sigma_min**2).sqrt() * generator.randn_like(x0)
        else:
            skip_draw(generator, x0)
            x = x0
    return x


def stochastic_iterative_sampler(
    distiller: DenoiseFn,
    x: Tensor,
    sigmas: Tensor | None,
    generator,
    ts: Sequence[int],
    progress: bool = False,
    callback: Callback | None = None,
    t_min: float = 0.002,
    t_max: float = 80.0,
    rho: float = 7.0,
    steps: int = 40,
) -> Tensor:
    """`sample_multistep` with grid indices: ts = 0,22,39 of steps = 40 evaluates at two levels and ends at t_min.

    The last index is a noise level only; it should be steps-1. `sigmas` is not read.
    """
    levels = ts_to_sigmas(ts, steps, t_min, t_max, rho)
    return sample_multistep(distiller, x, levels, generator, progress, callback, sigma_min=t_min)


def sample_progdist(
    denoiser: DenoiseFn,
    x: Tensor,
    sigmas: Tensor,
    generator=None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Euler steps between the levels of `sigmas` without its final 0, as progressive distillation trains them."""
    return sample_euler(denoiser, x, sigmas[:-1], generator, progress, callback)
