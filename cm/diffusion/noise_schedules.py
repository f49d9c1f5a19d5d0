"""Noise schedules of EDM's Table 1: how the noise level and the scale of the state depend on time.

A state is z(t) = s(t) (x0 + sigma(t) noise) (Karras et al. 2022, Eq. 4 with App. B). Times and levels are tensors of
any shape; results have their shape and precision.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from cm.diffusion.grid import karras_sigmas
from cm.errors import UserError


class NoiseSchedule(Protocol):
    """sigma(t), increasing in t, with its derivative and its inverse."""

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at time t."""

    def sigma_deriv(self, t: Tensor) -> Tensor:
        """d sigma / dt."""

    def time(self, sigma: Tensor) -> Tensor:
        """The time at which the noise level is sigma."""


@dataclass(frozen=True)
class LinearSchedule:
    """sigma(t) = t: the columns iDDPM and EDM."""

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def sigma_deriv(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time(self, sigma: Tensor) -> Tensor:
        return sigma


@dataclass(frozen=True)
class VESchedule:
    """sigma(t) = sqrt(t): the column VE."""

    def sigma(self, t: Tensor) -> Tensor:
        return t.sqrt()

    def sigma_deriv(self, t: Tensor) -> Tensor:
        return 0.5 / t.sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        return sigma**2


@dataclass(frozen=True)
class VPSchedule:
    """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1): the column VP, t in [0, 1]."""

    beta_d: float = 19.9
    beta_min: float = 0.1

    @classmethod
    def between(cls, sigma_min: float, sigma_max: float, epsilon_s: float = 1e-3) -> "VPSchedule":
        """The schedule with sigma(epsilon_s) = sigma_min and sigma(1) = sigma_max (Karras et al. 2022, App. C.1)."""
        low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
        return cls(beta_d, high - beta_d / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.expm1(self.beta_d * t**2 / 2 + self.beta_min * t).sqrt()

    def sigma_deriv(self, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        return 0.5 * (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma)

    def time(self, sigma: Tensor) -> Tensor:
        level, d, low = torch.log1p(sigma**2), self.beta_d, self.beta_min
        root = (low**2 + 2 * d * level).sqrt()
        # Of two forms of the same root, the one that does not cancel at small sigma.
        t = 2 * level / (root + low) if low >= 0 else (root - low) / d
        return torch.where(sigma > 0, t, torch.zeros_like(t))


@dataclass(frozen=True)
class CosineSchedule:
    """sigma(t) = tan(pi t / 2): alpha = cos, the cosine schedule without offset (Salimans & Ho 2022), t in [0, 1)."""

    def sigma(self, t: Tensor) -> Tensor:
        return torch.tan(math.pi / 2 * t)

    def sigma_deriv(self, t: Tensor) -> Tensor:
        return math.pi / 2 * (1 + self.sigma(t) ** 2)

    def time(self, sigma: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(sigma)


def linear_curve(sigma_min: float, sigma_max: float) -> NoiseSchedule:
    """Row linear of NOISE_SCHEDULES; the range does not change it."""
    return LinearSchedule()


def ve_curve(sigma_min: float, sigma_max: float) -> NoiseSchedule:
    """Row ve; the range does not change it."""
    return VESchedule()


def vp_curve(sigma_min: float, sigma_max: float) -> NoiseSchedule:
    """Row vp: derived from the range, as EDM's ablation does; the standard one where the range is a single level."""
    return VPSchedule.between(sigma_min, sigma_max) if sigma_min < sigma_max else VPSchedule()


def cosine_curve(sigma_min: float, sigma_max: float) -> NoiseSchedule:
    """Row cosine; the range does not change it."""
    return CosineSchedule()


@dataclass(frozen=True)
class ConstantScale:
    """s(t) = 1."""

    def scale(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def scale_deriv(self, sigma: Tensor, sigma_deriv: Tensor) -> Tensor:
        return torch.zeros_like(sigma)


@dataclass(frozen=True)
class VPScale:
    """s(t) = 1 / sqrt(1 + sigma(t)^2): the state of unit-variance data keeps unit variance."""

    def scale(self, sigma: Tensor) -> Tensor:
        return (1 + sigma**2).rsqrt()

    def scale_deriv(self, sigma: Tensor, sigma_deriv: Tensor) -> Tensor:
        return -sigma * sigma_deriv * self.scale(sigma) ** 3


@lru_cache(maxsize=16)
def iddpm_levels(
    num_levels: int = 1000, c1: float = 0.001, c2: float = 0.008, device: torch.device | str = "cpu"
) -> Tensor:
    """iDDPM's noise levels u_0 > ... > u_{M-1}, float64 (Karras et al. 2022, Table 1 and App. C.3).

    u_M = 0 and u_{j-1} = sqrt((u_j^2 + 1) / max(abar_{j-1} / abar_j, c1) - 1), abar_j = sin^2(pi j / (2 M (c2 + 1))).
    The tensor is shared between callers: read only.
    """
    abar = [math.sin(math.pi / 2 * j / (num_levels * (c2 + 1))) ** 2 for j in range(num_levels + 1)]
    u = [0.0]
    for j in range(num_levels, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(abar[j - 1] / abar[j], c1) - 1))
    return torch.tensor(u[:0:-1], dtype=torch.float64, device=device)


@lru_cache(maxsize=16)
def ddpm_levels(num_levels: int = 1000, device: torch.device | str = "cpu") -> Tensor:
    """DDPM's noise levels, decreasing, float64: sigma_t^2 = 1 / abar_t - 1, abar_t the product of 1 - beta_0..t.

    beta grows linearly from 0.1 / M to 20 / M (Ho et al. 2020, section 4, for M = 1000); ADM calls it "linear".
    The tensor is shared between callers: read only.
    """
    beta = torch.linspace(0.1, 20, num_levels, dtype=torch.float64) / num_levels
    log_abar = torch.log1p(-beta).cumsum(0)
    return torch.expm1(-log_abar).sqrt().flip(0).to(device)


def nearest_level(levels: Tensor, sigma: Tensor) -> Tensor:
    """Index of the entry of `levels`, decreasing, that is nearest to sigma, int64 like sigma."""
    midpoints = (levels[1:] + levels[:-1]).flip(0) / 2
    return len(levels) - 1 - torch.searchsorted(midpoints, sigma.to(levels.dtype).contiguous())


def level_position(levels: Tensor, sigma: Tensor) -> Tensor:
    """Where sigma stands among `levels`, decreasing: the index of an entry, and between two linear in ln(sigma)."""
    sigma = sigma.to(levels.dtype)
    upper = len(levels) - 1 - torch.searchsorted(levels.flip(0), sigma.detach().contiguous(), right=True)
    upper = upper.clamp(0, len(levels) - 2)
    high, low = levels[upper].log(), levels[upper + 1].log()
    return upper + (high - sigma.clamp_min(torch.finfo(sigma.dtype).tiny).log()) / (high - low)


def edm_steps(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Equal steps in sigma^(1/rho)."""
    return karras_sigmas(n, sigma_min, sigma_max, rho)


def ve_steps(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Geometric levels: t_i = sigma_max^2 (sigma_min^2 / sigma_max^2)^(i / (N-1)) with sigma = sqrt(t)."""
    i = torch.linspace(0, 1, n, dtype=torch.float64)
    return sigma_max * (sigma_min / sigma_max) ** i


def vp_steps(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, epsilon_s: float = 1e-3) -> Tensor:
    """Equal steps in the time of the VP schedule that runs from sigma_max at 1 to sigma_min at epsilon_s."""
    t = torch.linspace(1, epsilon_s, n, dtype=torch.float64)
    return VPSchedule.between(sigma_min, sigma_max, epsilon_s).sigma(t)


def iddpm_steps(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Evenly chosen entries of iDDPM's levels within [sigma_min, sigma_max]."""
    u = iddpm_levels()
    u = u[(u >= sigma_min) & (u <= sigma_max)]
    if len(u) < n:
        raise UserError(
            f"--time_steps iddpm has {len(u)} levels between --sigma_min {sigma_min} and --sigma_max {sigma_max}, "
            f"fewer than --steps {n}"
        )
    # Halves round up, as in the table.
    chosen = torch.floor((len(u) - 1) / max(n - 1, 1) * torch.arange(n, dtype=torch.float64) + 0.5)
    return u[chosen.long()]
