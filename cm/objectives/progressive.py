"""Progressive distillation in x = x0 + sigma noise coordinates (Salimans & Ho 2022, Algorithm 2)."""

from typing import Any

import torch
from torch import Tensor

from cm.diffusion.alpha_sigma import AlphaSigma
from cm.diffusion.grid import Grid
from cm.nn import append_dims
from cm.objectives.base import Draw, Objective, Roles
from cm.objectives.consistency import euler_step
from cm.objectives.curricula import EmaAndScales, Stage, progdist_stage
from cm.objectives.distances import Distance
from cm.objectives.parts import Weight, alpha_sigma_of, distance_of, grid_of, schedule_of, weight_of
from cm.seeding import StepRandom


def progressive_losses(
    roles: Roles, x0: Tensor, draw: Draw, t_mid: Tensor, *, distance: Distance, weight: Weight, **cond: Tensor
) -> dict[str, Tensor]:
    """lambda(t) d(D(x_t; t), target) per sample: one student step must land where two teacher steps land.

    x_t -> x_mid -> x_r are two Euler (DDIM) steps of the teacher; target = x_t - t (x_r - x_t) / (r - t) is the
    clean image that makes a single Euler step from t end in x_r.
    """
    x_t = x0 + draw.noise * append_dims(draw.t, x0.ndim)
    denoised = roles.student(x_t, draw.t, **cond)
    with torch.no_grad():
        x_mid = euler_step(lambda x, t: roles.teacher(x, t, **cond), x_t, draw.t, t_mid)
        x_r = euler_step(lambda x, t: roles.teacher(x, t, **cond), x_mid, t_mid, draw.r)
        t, r = append_dims(draw.t, x0.ndim), append_dims(draw.r, x0.ndim)
        target = x_t - t * (x_r - x_t) / (r - t)
    return {"loss": distance(denoised, target) * weight(draw.t, draw.r)}


class ProgressiveObjective(Objective):
    """Halve the number of sampling steps stage by stage; each stage's student is the next one's teacher.

    grid: Karras's, or that of a schedule (alpha, sigma), divided by whose alpha a DDIM step is Euler's.
    """

    needs_teacher = True

    def __init__(
        self, schedule: EmaAndScales, distance: Distance, weight: Weight, *, grid: Grid | AlphaSigma
    ):
        self.schedule = schedule
        self.distance = distance
        self.weight = weight
        self.grid = grid

    def draw(self, x0: Tensor, step: int, random: StepRandom) -> Draw:
        intervals = self.num_scales(step)
        index = random.randint(0, intervals)
        return interval_at(self.grid, intervals, index, random.noise(tuple(x0.shape[1:])))

    def forward(self, roles: Roles, x0: Tensor, draw: Draw, step: int, **cond: Tensor) -> dict[str, Tensor]:
        t_mid = self.grid.sigma(draw.index + 0.5, self.num_scales(step))
        return progressive_losses(roles, x0, draw, t_mid, distance=self.distance, weight=self.weight, **cond)

    def stage(self, step: int) -> Stage:
        return progdist_stage(step, self.schedule.start_scales, self.schedule.distill_steps_per_iter)

    def num_scales(self, step: int) -> int:
        return self.stage(step).num_scales


def interval_at(grid: Grid | AlphaSigma, intervals: int, index: Tensor, noise: Tensor) -> Draw:
    """The Draw of given intervals (B,) int64 in 0..intervals-1 of a grid with `intervals` intervals."""
    if intervals < 1:
        raise ValueError(f"progressive distillation needs at least 1 interval, got {intervals}")
    t, r = (grid.sigma(index + shift, intervals) for shift in (0, 1))
    return Draw(t=t, r=r, noise=noise, weight=torch.ones_like(t), index=index)


def progressive(config: Any) -> Objective:
    """Row progdist: on Karras's grid, or in z = alpha x + sigma e with --diffusion_schedule."""
    parts = schedule_of(config), distance_of(config), weight_of(config)
    grid = alpha_sigma_of(config) if config.diffusion_schedule else grid_of(config)
    return ProgressiveObjective(*parts, grid=grid)
