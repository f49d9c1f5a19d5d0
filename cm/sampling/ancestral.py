"""Ancestral sampling: part of each step is deterministic, the rest is fresh noise (Song et al. 2021, App. F)."""

from itertools import pairwise

from torch import Tensor

from cm.diffusion.denoiser import Gradient
from cm.sampling.driver import Denoise, Step, Walk, evaluate, sampler
from cm.sampling.noise import SampleGenerator
from cm.sampling.ode import to_d


def get_ancestral_step(
    sigma_from: Tensor | float, sigma_to: Tensor | float
) -> tuple[Tensor | float, Tensor | float]:
    """(sigma_down, sigma_up): go down to sigma_down, then add noise of standard deviation sigma_up.

    sigma_up^2 = sigma_to^2 (sigma_from^2 - sigma_to^2) / sigma_from^2 and sigma_down^2 = sigma_to^2 - sigma_up^2, which
    is sigma_to^4 / sigma_from^2: written so, no rounding can make it negative.
    """
    sigma_down = sigma_to**2 / sigma_from
    sigma_up = sigma_to * (1 - (sigma_to / sigma_from) ** 2) ** 0.5
    return sigma_down, sigma_up


@sampler
def sample_euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    generator: SampleGenerator,
    *,
    gradient: Gradient | None = None,
) -> Walk:
    """Euler step to sigma_down, then noise up to the next level. One evaluation and one draw per step.

    gradient: (x, sigma) -> s grad log p(y | x; sigma) of a classifier; the step's mean moves by sigma_up^2 times it
    (Dhariwal & Nichol 2021, Algorithm 1, with the gradient at x).
    """
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        yield Step(x, sigma, denoised)
        sigma_down, sigma_up = get_ancestral_step(sigma, sigma_next)
        shift = sigma_up**2 * evaluate(gradient, x, sigma) if gradient else 0
        x = x + (sigma_down - sigma) * to_d(x, sigma, denoised) + shift
        x = x + sigma_up * generator.randn_like(x)
    return x
