"""Preconditionings: how a raw network F becomes a denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).

A preconditioning is a frozen dataclass that maps noise levels sigma (B,) to four coefficients (B,). It knows no
network. `time_scale` is the network's clock: c_noise = time_scale * ln(sigma) / 4 (1000 for the ADM U-Net with its
sinusoidal embedding, 1 for NCSN++ and DDPM++).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cm.errors import UserError


class Coefficients(NamedTuple):
    """c_skip, c_out, c_in, c_noise, each (B,)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Precond(Protocol):
    """What a denoiser asks of its preconditioning."""

    def __call__(self, sigma: Tensor) -> Coefficients:
        """Coefficients at the noise levels sigma (B,)."""


def _log_sigma(sigma: Tensor) -> Tensor:
    return sigma.clamp_min(torch.finfo(sigma.dtype).tiny).log()


@dataclass(frozen=True)
class EDMPrecond:
    """EDM's preconditioning (Karras et al. 2022, Table 1, last column)."""

    sigma_data: float = 0.5
    time_scale: float = 1000.0

    def __call__(self, sigma: Tensor) -> Coefficients:
        variance = sigma**2 + self.sigma_data**2
        return Coefficients(
            c_skip=self.sigma_data**2 / variance,
            c_out=sigma * self.sigma_data / variance.sqrt(),
            c_in=variance.rsqrt(),
            c_noise=self.time_scale * 0.25 * _log_sigma(sigma),
        )


@dataclass(frozen=True)
class ConsistencyPrecond:
    """Skip parameterisation of a consistency function (Song et al. 2023, Eq. 5 and App. C): D(x; sigma_min) = x.

    c_skip = sd^2 / ((t - eps)^2 + sd^2), c_out = sd (t - eps) / sqrt(sd^2 + t^2). `printed_c_out` puts (t - eps)^2
    under that root, a form in circulation that no released model uses.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    time_scale: float = 1000.0
    printed_c_out: bool = False

    def __call__(self, sigma: Tensor) -> Coefficients:
        edm = EDMPrecond(self.sigma_data, self.time_scale)(sigma)
        # The boundary is sigma_min as this dtype stores it, so that c_out is exactly 0 there.
        shifted = sigma - torch.tensor(self.sigma_min, dtype=sigma.dtype, device=sigma.device)
        shifted_variance = shifted**2 + self.sigma_data**2
        out_variance = shifted_variance if self.printed_c_out else sigma**2 + self.sigma_data**2
        return edm._replace(
            c_skip=self.sigma_data**2 / shifted_variance,
            c_out=shifted * self.sigma_data / out_variance.sqrt(),
        )


@dataclass(frozen=True)
class PiecewisePrecond:
    """Free-form parameterisation of a consistency function (Song et al. 2023, Eq. 4).

    D(x; t) = F(c_in x; t) for t > sigma_min and D(x; sigma_min) = x.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    time_scale: float = 1000.0

    def __call__(self, sigma: Tensor) -> Coefficients:
        edm = EDMPrecond(self.sigma_data, self.time_scale)(sigma)
        # Grid points computed in fp32 may miss sigma_min by a rounding error.
        at_boundary = (sigma <= self.sigma_min * (1 + 1e-6)).to(sigma.dtype)
        return edm._replace(c_skip=at_boundary, c_out=1 - at_boundary)


def boundary_precond(
    boundary: str, *, sigma_data: float, sigma_min: float, time_scale: float, printed_c_out: bool = False
) -> Precond:
    """Preconditioning of a consistency function by name: `skip` (Eq. 5) or `piecewise` (Eq. 4)."""
    if boundary == "skip":
        return ConsistencyPrecond(sigma_data, sigma_min, time_scale, printed_c_out)
    if boundary == "piecewise":
        return PiecewisePrecond(sigma_data, sigma_min, time_scale)
    raise UserError(f"--boundary must be skip or piecewise, got {boundary}")
