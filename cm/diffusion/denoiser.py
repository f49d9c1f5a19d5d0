"""A network and a preconditioning make a denoiser: (x, sigma) -> estimate of the clean image."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cm.diffusion.precond import Precond
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
        if x.element_size() < 4:
            x = x.float()
        sigma = sigma.to(device=x.device, dtype=x.dtype)
        if sigma.ndim == 0:
            sigma = sigma.expand(x.shape[0])
        if sigma.shape != x.shape[:1]:
            raise ValueError(f"sigma has shape {tuple(sigma.shape)}, but the batch is {tuple(x.shape)}")
        c = self.precond(sigma)
        output = self.net(append_dims(c.c_in, x.ndim) * x, c.c_noise, **cond).to(x.dtype)
        # A network with learned variances gives 2C channels: the first C are the image (Nichol & Dhariwal 2021).
        mean = output[:, : x.shape[1]]
        return output, append_dims(c.c_out, x.ndim) * mean + append_dims(c.c_skip, x.ndim) * x
