"""TrigFlow's coordinates for every denoiser of this library (Lu & Song 2025, section 3.1).

x_t = cos(t) x0 + sin(t) z with z of standard deviation sigma_data and t in [0, pi/2]. In x = x0 + sigma noise that is
sigma = sigma_data tan(t) and x_t = cos(t) x. A network F(u, t) of u = x_t / sigma_data gives the velocity of the
flow, dx_t/dt = sigma_data F, and the clean image, D = cos(t) x_t - sin(t) sigma_data F.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cm.diffusion.denoiser import Denoiser
from cm.nn import append_dims


def time_of(sigma: Tensor, sigma_data: float) -> Tensor:
    """t = arctan(sigma / sigma_data)."""
    return torch.atan(sigma / sigma_data)


@dataclass(frozen=True)
class TrigFlow:
    """F(u, t) of a denoiser with EDM's c_skip = cos^2 t and, but for the sign, c_out = sigma_data sin t.

    Consistency functions with --boundary zero are such denoisers, in every column: then F is the network itself, of
    c_in x at c_noise, and its derivative by t is the network's.
    """

    denoiser: Denoiser
    sigma_data: float

    def __call__(self, u: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        """(B, C, ...) for u = x_t / sigma_data and t (B,) above 0."""
        d = self.denoiser
        c = d.precond(self.sigma_data * torch.tan(t))
        scale = append_dims(c.c_in * self.sigma_data / torch.cos(t), u.ndim)
        output = d.net(scale * u, c.c_noise, **cond).to(u.dtype)[:, : u.shape[1]]
        return -append_dims(c.c_out.sign(), u.ndim) * output


def velocity(denoiser: Denoiser, x_t: Tensor, sigma: Tensor, sigma_data: float, **cond: Tensor) -> Tensor:
    """dx_t/dt = (cos(t) x_t - D) / sin(t) of any denoiser at sigma > 0, like x_t.

    Where D is c_skip x + c_out F, this is written so that no digits are lost near t = 0.
    """
    t = time_of(sigma.double(), sigma_data)
    output, _ = denoiser.raw(x_t / append_dims(t.cos().to(x_t), x_t.ndim), sigma, **cond)
    c = denoiser.precond(sigma.double())
    of_x = (t.cos() - c.c_skip / t.cos()) / t.sin()
    of_output = -c.c_out / t.sin()
    a, b = (append_dims(value.to(x_t), x_t.ndim) for value in (of_x, of_output))
    return a * x_t + b * output[:, : x_t.shape[1]]
