"""Samplers of consistency models (Song et al. 2023) and of progressively distilled ones (Salimans & Ho 2022)."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from cm.diffusion.denoiser import DenoiseFn
from cm.sampling.driver import Callback, Denoise, Step, Walk, sampler
from cm.sampling.levels import ts_to_sigmas
from cm.sampling.noise import SampleGenerator, skip_draw
from cm.sampling.ode import sample_euler


@sampler
def sample_onestep(denoise: Denoise, x: Tensor, sigmas: Tensor, generator: SampleGenerator) -> Walk:
    """One evaluation of the consistency function: f(x, sigmas[0]). Draws nothing."""
    x0 = denoise(x, sigmas[0])
    yield Step(x, sigmas[0], x0)
    return x0


@sampler
def sample_multistep(
    denoise: Denoise, x: Tensor, sigmas: Tensor, generator: SampleGenerator, *, sigma_min: float = 0.002
) -> Walk:
    """Multistep consistency sampling (Song et al. 2023, Algorithm 1).

    For each level t but the last: x0 = f(x, t), then x = x0 + sqrt(s^2 - sigma_min^2) z with s the next level. The last
    level says where the sample ends: sigma_min or 0 gives x0 itself, anything above leaves noise in the result.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        yield Step(x, sigma, x0)
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
    generator: SampleGenerator | None,
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
    generator: SampleGenerator | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Euler steps between the levels of `sigmas` without its final 0, as progressive distillation trains them."""
    return sample_euler(denoiser, x, sigmas[:-1], generator, progress, callback)
