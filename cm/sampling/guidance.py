"""Classifier guidance (Dhariwal & Nichol 2021, section 4): a classifier of noisy images steers a denoiser.

In x = x0 + sigma noise the guided denoiser is D + sigma^2 s grad log p(y | x; sigma), which adds s grad log p(y | x) to
the score. With the noise prediction e = (x - D) / sigma it reads e - sigma s grad log p: Algorithm 2 (DDIM), whose
sqrt(1 - abar) and gradient refer to the state sqrt(abar) x. Algorithm 1 (ancestral) shifts the mean of each step by
its variance times the gradient instead: see `cm.sampling.ancestral`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cm.diffusion.precond import Precond
from cm.nn import append_dims
from cm.sampling.common import DenoiseFn

# (x (B, C, ...), sigma (B,)) -> s grad_x log p(y | x; sigma), like x
Gradient = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class NoisyClassifier:
    """log p(y | x; sigma) of images x = x0 + sigma noise.

    net(c_in x, c_noise) gives logits (B, K); of the preconditioning only c_in and c_noise are used.
    """

    net: Callable[[Tensor, Tensor], Tensor]
    precond: Precond

    def logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """(B, K) in x's precision for x (B, C, ...) at noise levels sigma (B,)."""
        c = self.precond(sigma.to(x))
        return self.net(append_dims(c.c_in, x.ndim) * x, c.c_noise).to(x.dtype)

    def gradient(self, y: Tensor, scale: float = 1.0) -> Gradient:
        """The gradient towards classes y (B,), times `scale`."""

        def gradient(x: Tensor, sigma: Tensor) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                log_prob = torch.log_softmax(self.logits(x, sigma), dim=1)
                chosen = log_prob.gather(1, y[:, None]).sum()
                return scale * torch.autograd.grad(chosen, x)[0]

        return gradient


def guided(denoiser: DenoiseFn, gradient: Gradient) -> DenoiseFn:
    """D + sigma^2 gradient: any sampler of denoisers follows the guided flow."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(x, sigma) + append_dims(sigma.to(x) ** 2, x.ndim) * gradient(x, sigma)

    return denoise
