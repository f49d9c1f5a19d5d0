"""Gamma-sampling of flow maps (Kim et al. 2024, Algorithm 3): jumps below the next level, then noise up to it."""

import math
from itertools import pairwise

from torch import Tensor

from cm.diffusion.flow_maps import jump
from cm.sampling.driver import Denoise, Step, Walk, sampler
from cm.sampling.noise import SampleGenerator, skip_draw


@sampler
def sample_gamma(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    generator: SampleGenerator,
    *,
    gamma: float = 0.0,
    sigma_min: float = 0.002,
) -> Walk:
    """For each level t' but the first: jump to s = sqrt(1 - gamma^2) (t' - sigma_min) + sigma_min, add noise up to t'.

    gamma 0 is deterministic, as `sample_jumps`; gamma 1 jumps to sigma_min each time, as multistep sampling of a
    consistency model. The jump to sigma_min or below adds no noise.
    """
    for sigma, sigma_next in pairwise(sigmas):
        lower = sigma_next
        if sigma_next > sigma_min:
            lower = math.sqrt(1 - gamma**2) * (sigma_next - sigma_min) + sigma_min
        clean = denoise(x, sigma, lower)
        yield Step(x, sigma, clean)
        x = jump(clean, x, sigma, lower)
        if gamma > 0 and sigma_next > sigma_min:
            x = x + (sigma_next**2 - lower**2).clamp_min(0).sqrt() * generator.randn_like(x)
        else:
            skip_draw(generator, x)
    return x
