"""Any-to-any sampling of flow maps: one evaluation for each jump, over any levels."""

from itertools import pairwise

from torch import Tensor

from cm.diffusion.flow_maps import jump
from cm.sampling.driver import Denoise, Step, Walk, sampler
from cm.sampling.noise import SampleGenerator


@sampler
def sample_jumps(denoise: Denoise, x: Tensor, sigmas: Tensor, generator: SampleGenerator) -> Walk:
    """x <- Phi(x, sigma, sigma'), deterministic; with the exact map every grid gives one and the same image.

    MeanFlow's sampler and `exact` of CTM. denoise(x, sigma, lower) is a flow map's x^. An equal level changes nothing.
    """
    for sigma, lower in pairwise(sigmas):
        clean = denoise(x, sigma, lower)
        yield Step(x, sigma, clean)
        x = jump(clean, x, sigma, lower)
    return x
