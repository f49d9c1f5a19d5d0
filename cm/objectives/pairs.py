"""How a consistency loss draws its pairs of noise levels t > r: one of the three things that papers vary.

The others are the distance (`cm.objectives.distances`) and the weight(t, r) (`cm.diffusion.weightings`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from cm.diffusion.grid import Grid, karras_sigmas
from cm.diffusion.proposals import Proposal
from cm.nn import alike
from cm.objectives.base import Draw
from cm.objectives.curricula import Ratio
from cm.objectives.parts import grid_of
from cm.seeding import StepRandom


class Pairs(Protocol):
    """A law of pairs t > r."""

    def draw(self, x0: Tensor, step: int, num_scales: int, random: StepRandom) -> Draw:
        """Levels, noise and importance weights for images x0 (B, C, ...); num_scales: N(k) of this step."""


@dataclass(frozen=True)
class GridPairs(Pairs):
    """Neighbours on a grid of N(k) points, each pair equally likely (Song et al. 2023, Algorithms 2 and 3)."""

    grid: Grid

    def draw(self, x0: Tensor, step: int, num_scales: int, random: StepRandom) -> Draw:
        return draw_pair(self.grid, num_scales, x0, random)


@dataclass(frozen=True)
class LogNormalGridPairs(Pairs):
    """Neighbours on a grid, as likely as a log-normal law lies between them (Song & Dhariwal 2023, Eq. 11).

    p(sigma_i, sigma_i+1) is proportional to erf((ln sigma_i+1 - mean) / (sqrt 2 std)) - erf((ln sigma_i - mean) / ...).
    """

    grid: Grid
    mean: float
    std: float

    def draw(self, x0: Tensor, step: int, num_scales: int, random: StepRandom) -> Draw:
        u = random.uniform().double()
        cumulative = self.probabilities(num_scales).cumsum(0).to(u.device, non_blocking=True)
        index = torch.searchsorted(cumulative, u, right=True).clamp_max(num_scales - 2)
        return pair_at(self.grid, num_scales, index, random.noise(tuple(x0.shape[1:])))

    def probabilities(self, num_scales: int) -> Tensor:
        """Of each interval, the first one below sigma_max: (num_scales - 1,) float64."""
        return _interval_masses(self, num_scales)


@lru_cache(maxsize=32)
def _interval_masses(pairs: LogNormalGridPairs, num_scales: int) -> Tensor:
    g = pairs.grid
    levels = karras_sigmas(num_scales, g.sigma_min, g.sigma_max, g.rho)
    # erf of the scaled logarithm; its complement on the right keeps the digits of rare intervals.
    z = (levels.log() - pairs.mean) / (pairs.std * math.sqrt(2))
    left, right = torch.special.erfc(-z), torch.special.erfc(z)
    mass = torch.where(z[1:] > 0, right[1:] - right[:-1], left[:-1] - left[1:])
    return mass / mass.sum()


@dataclass(frozen=True)
class RatioPairs(Pairs):
    """t of any law, and r(t) of a ratio r / t that grows stage by stage (Geng et al. 2024, section 3).

    k and b: `lower_level`. Near noise levels may have r = 0, where the target is the clean image.
    """

    law: Proposal
    ratio: Ratio
    k: float = 8.0
    b: float = 1.0

    def draw(self, x0: Tensor, step: int, num_scales: int, random: StepRandom) -> Draw:
        t = draw_level(self.law, random)
        r = lower_level(t, self.ratio(step), self.k, self.b)
        return Draw(t=t, r=r, noise=random.noise(tuple(x0.shape[1:])), weight=torch.ones_like(t))


def lower_level(t: Tensor, ratio: float, k: float = 8.0, b: float = 1.0, floor: float = 0.0) -> Tensor:
    """r(t) = max(floor, t (1 - (1 - ratio) n(t))) with n(t) = 1 + k / (1 + e^(b t)), so n falls from 1 + k/2 to 1."""
    return (t * (1 - (1 - ratio) * (1 + k * alike(torch.sigmoid, -b * t)))).clamp_min(floor)


def draw_level(law: Proposal, random: StepRandom) -> Tensor:
    """fp32 noise levels (B,) of a law of ln(sigma)."""
    if law.cut:
        return law.inverse(random.uniform()).exp().float()
    return (law.mean + law.std * random.normal()).exp()


def law_of(config: Any, **changes: Any) -> Proposal:
    """The law of ln(t) by --p_mean, --p_std, and with --truncate between --sigma_min and --sigma_max."""
    span = {"low": math.log(config.sigma_min), "high": math.log(config.sigma_max)} if config.truncate else {}
    return Proposal(**{"mean": config.p_mean, "std": config.p_std, **span, **changes})


def grid_pairs(config: Any) -> Pairs:
    """Row grid."""
    return GridPairs(grid_of(config))


def lognormal_grid_pairs(config: Any) -> Pairs:
    """Row lognormal-grid."""
    return LogNormalGridPairs(grid_of(config), config.p_mean, config.p_std)


def ratio_pairs(config: Any) -> Pairs:
    """Row ratio."""
    return RatioPairs(law_of(config), ratio_of(config), config.ratio_k, config.ratio_b)


def ratio_of(config: Any) -> Callable[[int], float]:
    """step -> r / t by the --ratio_* flags."""
    return Ratio(config.ratio_q, config.ratio_steps, config.ratio_max)


def draw_pair(grid: Grid, num_scales: int, x0: Tensor, random: StepRandom) -> Draw:
    """n ~ U{0..N-2} on the grid of N points (0 = sigma_max), t and r its two ends, and the noise."""
    index = random.randint(0, num_scales - 1)
    return pair_at(grid, num_scales, index, random.noise(tuple(x0.shape[1:])))


def pair_at(grid: Grid, num_scales: int, index: Tensor, noise: Tensor) -> Draw:
    """The Draw of given grid positions (B,) int64 in 0..num_scales-2 and noise."""
    if num_scales < 2:
        raise ValueError(f"a consistency loss needs num_scales >= 2, got {num_scales}")
    t, r = (grid.sigma(index + shift, num_scales - 1) for shift in (0, 1))
    return Draw(t=t, r=r, noise=noise, weight=torch.ones_like(t), index=index)
