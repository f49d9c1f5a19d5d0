"""Karras's grid of noise levels (Karras et al. 2022, Eq. 5), in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cm.nn import alike


def karras_sigma(u: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise level at grid position u in [0, 1] (EDM, Karras et al. 2022, Eq. 5; 0 is sigma_max).

    sigma(u) = (sigma_max^(1/rho) + u (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, in float64, exact at both ends.
    """
    u = u.to(torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigma = alike(lambda root: root**rho, high + u * (low - high))
    sigma = torch.where(u == 0, sigma_max, sigma)
    return torch.where(u == 1, sigma_min, sigma)


def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Decreasing grid of n noise levels from sigma_max to sigma_min, float64 (n,); n = 1 is sigma_max alone."""
    if n < 1:
        raise ValueError(f"the noise grid needs at least 1 point, got {n}")
    return karras_sigma(torch.linspace(0, 1, n, dtype=torch.float64), sigma_min, sigma_max, rho)


@dataclass(frozen=True)
class Grid:
    """The noise levels of an objective: Karras's grid between sigma_max (position 0) and sigma_min."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def sigma(self, position: Tensor, intervals: int) -> Tensor:
        """fp32 noise levels at the (possibly fractional) positions 0..intervals."""
        return karras_sigma(position / intervals, self.sigma_min, self.sigma_max, self.rho).float()

    def speed(self, sigma: Tensor) -> Tensor:
        """|d sigma / du| at noise levels sigma, for u from 0 to 1 along the grid: 1 / (tau^-1)'(t) of the paper."""
        root = 1 / self.rho
        return self.rho * (self.sigma_max**root - self.sigma_min**root) * sigma ** (1 - root)
