"""How a consistency loss draws its pairs of noise levels t > r: one of the three things that papers vary.

The others are the distance (`cm.objectives.distances`) and the weight(t, r) (`cm.diffusion.weightings`).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cm.diffusion.grid import Grid
from cm.objectives.base import Draw
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


def grid_pairs(config: Any) -> Pairs:
    """Row grid."""
    return GridPairs(grid_of(config))


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
