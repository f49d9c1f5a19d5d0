"""A network and a preconditioning make a denoiser: (x, sigma) -> estimate of the clean image."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cm.diffusion.precond import Coefficients, Precond
from cm.nn import append_dims


@dataclass(frozen=True)
class Denoiser:
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (Karras et al. 2022, Eq. 7).

    It owns no parameters, so state dicts stay those of the bare network. x: (B, C, ...); sigma: (B,) or a scalar
    tensor. Coefficients and state are fp32 (or x's own precision when that is higher); only the network's torso runs
    in its own dtype.
    """

    net: Callable[..., Tensor]
    precond: Precond

    def __call__(self, x: Tensor, sigma: Tensor, **cond: Tensor) -> Tensor:
        """Estimate of x0, in x's dtype and shape."""
        return self.raw(x, sigma, **cond)[1]

    def raw(self, x: Tensor, sigma: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """(raw network output, denoised)."""
        x, c = self._scaled(x, sigma)
        output = self.net(append_dims(c.c_in, x.ndim) * x, c.c_noise, **cond).to(x.dtype)
        return output, self._denoised(x, c, output)

    def with_logvar(self, x: Tensor, sigma: Tensor, **cond: Tensor) -> tuple[Tensor, Tensor]:
        """(denoised, u (B,)) of a network whose head gives u, the logarithm of its loss's variance."""
        x, c = self._scaled(x, sigma)
        output, logvar = self.net(append_dims(c.c_in, x.ndim) * x, c.c_noise, return_logvar=True, **cond)
        return self._denoised(x, c, output.to(x.dtype)), logvar.to(x.dtype)

    def _scaled(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Coefficients]:
        """x in fp32 at least, and the coefficients (B,) of its noise levels."""
        if x.element_size() < 4:
            x = x.float()
        sigma = sigma.to(device=x.device, dtype=x.dtype)
        if sigma.ndim == 0:
            sigma = sigma.expand(x.shape[0])
        if sigma.shape != x.shape[:1]:
            raise ValueError(f"sigma has shape {tuple(sigma.shape)}, but the batch is {tuple(x.shape)}")
        return x, self.precond(sigma)

    @staticmethod
    def _denoised(x: Tensor, c: Coefficients, output: Tensor) -> Tensor:
        # A network with learned variances gives 2C channels: the first C are the image (Nichol & Dhariwal 2021).
        mean = output[:, : x.shape[1]]
        return append_dims(c.c_out, x.ndim) * mean + append_dims(c.c_skip, x.ndim) * x


# (x (B, C, ...), sigma (B,)) -> estimate of the clean image, like x; flow maps take a lower level, too
DenoiseFn = Callable[..., Tensor]


def clamped(denoiser: DenoiseFn) -> DenoiseFn:
    """The same denoiser with predictions clamped to [-1, 1]."""
    return lambda x, *levels: denoiser(x, *levels).clamp(-1, 1)


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
