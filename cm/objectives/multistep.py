"""Multistep consistency models (Heek et al. 2024): consistency within each of S segments of the noise levels.

A student's one step goes from any level t to the start of t's segment, by DDIM with its prediction; S steps make a
sample. S = 1 is a consistency model, large S a denoiser that is sampled by DDIM. In distillation a teacher's step leads
from t to the next lower level s of a fine grid; in training the same noise does.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cm.config.choices import ADDIM_VARIANCES
from cm.diffusion.alpha_sigma import AlphaSigma
from cm.diffusion.ddim import Variance, addim, ddim, inverse_ddim, squared_error
from cm.diffusion.grid import Grid
from cm.nn import append_dims
from cm.objectives.base import Draw, Objective, Roles, bare, replayed_rng, rng_state
from cm.objectives.curricula import EmaAndScales
from cm.objectives.distances import Distance
from cm.objectives.parts import Weight, alpha_sigma_of, distance_of, distils, grid_of, schedule_of, weight_of
from cm.seeding import StepRandom


def multistep_losses(
    roles: Roles,
    x0: Tensor,
    draw: Draw,
    start: Tensor,
    *,
    distance: Distance,
    weight: Weight,
    variance: Variance,
    **cond: Tensor,
) -> dict[str, Tensor]:
    """w(t) d(D(x_t, t), x^) per sample, where x^ leads from x_t to where the target leads from x_s (section 3.1).

    start (B,): levels at which the rows' segments begin, start <= draw.r < draw.t. The target's point at `start` is
    x_s itself where s is the start: the boundary condition. Gradients flow through the student only.
    """
    x_t = x0 + draw.noise * append_dims(draw.t, x0.ndim)
    masks = rng_state(x0.device)
    student = roles.student(x_t, draw.t, **cond)
    with torch.no_grad():
        if roles.teacher is None:
            x_s = x0 + draw.noise * append_dims(draw.r, x0.ndim)
        else:
            predicted = roles.teacher(x_t, draw.t, **cond)
            x_var = variance(draw.t, squared_error(predicted, x0))
            x_s = addim(x_t, predicted, draw.t, draw.r, x_var)
        first = draw.r == start
        s = torch.where(
            first, draw.t, draw.r
        )  # any level at which the network is defined: the row is not used
        with replayed_rng(x0.device, masks):
            clean = (roles.target or bare(roles.student))(x_s, s, **cond)
        x_start = torch.where(append_dims(first, x0.ndim), x_s, ddim(x_s, clean, s, start))
        target = inverse_ddim(x_start, x_t, draw.t, start)
    return {"loss": distance(student, target) * weight(draw.t, draw.r)}


@dataclass(frozen=True)
class Intervals:
    """step -> T, intervals of the fine grid: from `first` to `last`, evenly in the logarithm, as a multiple of S."""

    segments: int
    first: int = 64
    last: int = 1280
    ramp: int = 100000

    def __call__(self, step: int) -> int:
        done = min(step / self.ramp, 1.0) if self.ramp else 1.0
        count = math.exp(math.log(self.first) + done * math.log(self.last / self.first))
        return self.segments * max(round(count / self.segments), 1)


class MultistepObjective(Objective):
    """Distillation with a teacher, training without; the grid is Karras's or that of a schedule (alpha, sigma)."""

    def __init__(
        self,
        schedule: EmaAndScales,
        distance: Distance,
        weight: Weight,
        *,
        grid: Grid | AlphaSigma,
        intervals: Intervals,
        variance: Variance,
        distillation: bool,
    ):
        self.schedule = schedule
        self.distance = distance
        self.weight = weight
        self.grid = grid
        self.intervals = intervals
        self.variance = variance
        self.needs_teacher = distillation
        self.needs_target = not schedule.copies_student

    def draw(self, x0: Tensor, step: int, random: StepRandom) -> Draw:
        index = random.randint(0, self.num_scales(step))
        return self.at(index, step, random.noise(tuple(x0.shape[1:])))

    def at(self, index: Tensor, step: int, noise: Tensor) -> Draw:
        """The Draw of given positions (B,) int64 of t on the grid of this step, 0 = sigma_max."""
        count = self.num_scales(step)
        t, r = (self.grid.sigma(index + shift, count) for shift in (0, 1))
        return Draw(t=t, r=r, noise=noise, weight=torch.ones_like(t), index=index)

    def start(self, draw: Draw, step: int) -> Tensor:
        """The levels at which the segments of a draw's rows begin."""
        count = self.num_scales(step)
        length = count // self.intervals.segments
        return self.grid.sigma((draw.index // length + 1) * length, count)

    def forward(self, roles: Roles, x0: Tensor, draw: Draw, step: int, **cond: Tensor) -> dict[str, Tensor]:
        if self.needs_teacher != (roles.teacher is not None):
            raise ValueError("multistep distillation needs a teacher, multistep training takes none")
        return multistep_losses(
            roles,
            x0,
            draw,
            self.start(draw, step),
            distance=self.distance,
            weight=self.weight,
            variance=self.variance,
            **cond,
        )

    def target_decay(self, step: int) -> float:
        return self.schedule(step)[0]

    def num_scales(self, step: int) -> int:
        return self.intervals(step)


def multistep(config: Any) -> Objective:
    """Rows multistep_distillation and multistep_training."""
    distillation = distils(config)
    intervals = Intervals(
        config.segments, config.teacher_steps, config.teacher_steps_end, config.teacher_steps_ramp
    )
    return MultistepObjective(
        schedule_of(config),
        distance_of(config),
        weight_of(config),
        grid=alpha_sigma_of(config) if config.diffusion_schedule else grid_of(config),
        intervals=intervals,
        variance=ADDIM_VARIANCES.load(config.addim_variance if distillation else "none"),
        distillation=distillation,
    )
