"""Grids of noise levels that samplers walk along, by name.

A grid is a function (steps, sigma_min, sigma_max, rho, *, own options) -> decreasing levels, with the one at which the
sample ends; the rows of GRIDS.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cm.config.rows import GRIDS, TIME_STEPS
from cm.diffusion.alpha_sigma import AlphaSigma
from cm.diffusion.grid import karras_sigma
from cm.diffusion.paths import LINEAR, trigonometric
from cm.diffusion.sde import SDE, create_sde
from cm.errors import UserError
from cm.nn import append_zero
from cm.sampling.driver import own_options


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Karras's grid of `steps` levels and a final 0 (Karras et al. 2022, Eq. 5), evaluated in float32.

    `cm.diffusion.grid.karras_sigmas` is the exact grid. Published samples were drawn on this one, whose levels are
    rounded (79.999985 for 80), and runs of one or two steps amplify the difference to 6e-4.
    """
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return append_zero((high + torch.linspace(0, 1, steps) * (low - high)) ** rho)


def intervals(
    steps: int, sigma_min: float, sigma_max: float, rho: float, *, diffusion_schedule: str = ""
) -> Tensor:
    """The ends of the `steps` intervals of progressive distillation, and a final 0.

    diffusion_schedule: equal steps in the time of this (alpha, sigma) schedule; "": on Karras's grid.
    """
    if diffusion_schedule:
        return AlphaSigma(diffusion_schedule, sigma_min, sigma_max).steps(steps).double()
    return karras(steps + 1, sigma_min, sigma_max, rho)


def to_lowest(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """The ends of `steps` jumps from sigma_max to sigma_min on Karras's grid, as CTM is sampled."""
    return karras(steps + 1, sigma_min, sigma_max, rho)[:-1]


def of_sde(steps: int, sigma_min: float, sigma_max: float, rho: float, *, sde: SDE | None = None) -> Tensor:
    """Levels at equidistant times of an SDE, EDM's by default, and a final 0."""
    sde = sde or create_sde("edm", sigma_min, sigma_max)
    return append_zero(sde.levels(steps, sigma_min, sigma_max, rho))


def of_jumps(
    steps: int, sigma_min: float, sigma_max: float, rho: float, *, spacing: str = "linear"
) -> Tensor:
    """`steps` jumps from sigma_max to 0, by equal steps in the time of a path or, but the last, on Karras's grid."""
    if spacing == "karras":
        return karras(steps, sigma_min, sigma_max, rho)
    path = {"linear": LINEAR, "trigonometric": trigonometric()}[spacing]
    end = path.time(torch.tensor(sigma_max, dtype=torch.float64))
    levels = path.level(torch.linspace(1, 0, steps + 1, dtype=torch.float64) * end)
    return torch.cat([levels.new_tensor([sigma_max]), levels[1:]])


def checked_ts(ts: Sequence[int] | None, steps: int) -> list[int]:
    """Grid indices of a multistep sampler: at least two of 0 (sigma_max) .. steps-1 (sigma_min), never decreasing."""
    if steps < 2:
        raise UserError(f"steps must be at least 2 where ts is used, got {steps}")
    if ts is None or len(ts) < 2:
        raise UserError(f"ts needs at least two grid indices, such as 0,{steps - 1}, got {ts}")
    ts = [int(t) for t in ts]
    if any(a > b for a, b in pairwise(ts)):
        raise UserError(f"ts must not decrease, got {','.join(map(str, ts))}")
    if ts[0] < 0 or ts[-1] > steps - 1:
        raise UserError(f"ts must lie on the grid 0..{steps - 1}, got {','.join(map(str, ts))}")
    return ts


def spread(evaluations: int, steps: int, known: int) -> list[int]:
    """Grid indices of so many evaluations, or of all there are, and the grid's end, where a sample ends.

    Evenly from 0 over the grid 0..steps-1, or over 0..known where the model is not defined beyond.
    """
    last = steps - 1
    if known < last:
        return [*np.unique(np.linspace(0, known, evaluations).round().astype(int)).tolist(), last]
    return np.unique(np.linspace(0, last, evaluations + 1).round().astype(int)).tolist()


def ts_to_sigmas(
    ts: Sequence[int] | None, steps: int, sigma_min: float, sigma_max: float, rho: float
) -> Tensor:
    """Noise levels of grid indices on Karras's grid of `steps` points, float64."""
    position = torch.tensor(checked_ts(ts, steps), dtype=torch.float64) / (steps - 1)
    return karras_sigma(position, sigma_min, sigma_max, rho)


def chosen(
    steps: int, sigma_min: float, sigma_max: float, rho: float, *, ts: Sequence[int] | None = None
) -> Tensor:
    """`ts_to_sigmas` of indices that begin with 0."""
    levels = ts_to_sigmas(ts, steps, sigma_min, sigma_max, rho)
    if ts[0] != 0:
        raise UserError(f"ts must begin with 0 (sigma_max), where the noise is, got {ts[0]}")
    return levels


def grid_levels(
    name: str,
    steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float = 7.0,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """The levels of a row of GRIDS, which is given its own among `options`, or of TIME_STEPS with a final 0."""
    if steps < 1:
        raise UserError(f"steps must be at least 1, got {steps}")
    if name in TIME_STEPS:
        return append_zero(TIME_STEPS.load(name)(steps, sigma_min, sigma_max, rho))
    grid = GRIDS.load(name)
    return grid(steps, sigma_min, sigma_max, rho, **own_options(grid, options or {}))
