"""Classifier guidance (Dhariwal & Nichol 2021, section 4): a classifier of noisy images steers a denoiser.

In x = x0 + sigma noise the guided denoiser is D + sigma^2 s grad log p(y | x; sigma), which adds s grad log p(y | x) to
the score. With the noise prediction e = (x - D) / sigma it reads e - sigma s grad log p: Algorithm 2 (DDIM), whose
sqrt(1 - abar) and gradient refer to the state sqrt(abar) x. Algorithm 1 (ancestral) shifts the mean of each step by
its variance times the gradient instead: see `cm.sampling.ancestral`.
"""

from torch import Tensor

from cm.diffusion.denoiser import DenoiseFn, Gradient
from cm.nn import append_dims


def guided(denoiser: DenoiseFn, gradient: Gradient) -> DenoiseFn:
    """D + sigma^2 gradient: any sampler of denoisers follows the guided flow."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(x, sigma) + append_dims(sigma.to(x) ** 2, x.ndim) * gradient(x, sigma)

    return denoise
