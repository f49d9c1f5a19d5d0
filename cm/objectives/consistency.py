"""Consistency distillation and consistency training (Song et al. 2023, Algorithms 2 and 3).

Both compare f(x_t, t) of the student with f-(x_r, r) of the target network at the next lower noise level r of the
grid. They differ in how x_r is made: distillation takes one step of a solver along the teacher's probability-flow ODE,
training re-noises the clean image with the same noise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cm.config.choices import ODE_SOLVERS
from cm.config.rows import PAIRS
from cm.diffusion.denoiser import Denoiser
from cm.nn import append_dims
from cm.objectives.base import Draw, Objective, Roles, bare, replayed_rng, rng_state
from cm.objectives.curricula import EmaAndScales
from cm.objectives.distances import Distance
from cm.objectives.pairs import Pairs
from cm.objectives.parts import Weight, distance_of, distils, schedule_of, weight_of
from cm.seeding import StepRandom


def euler_step(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """One Euler step of the PF-ODE dx/dt = (x - D(x; t)) / t from t to r (Song et al. 2023, Eq. 6)."""
    slope = (x - denoise(x, t)) / append_dims(t, x.ndim)
    return x + append_dims(r - t, x.ndim) * slope


def heun_step(denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """One step of Heun's second-order method from t to r >= 0 (Karras et al. 2022, Algorithm 1)."""
    dt = append_dims(r - t, x.ndim)
    slope = (x - denoise(x, t)) / append_dims(t, x.ndim)
    x_euler = x + dt * slope
    slope_end = (x_euler - denoise(x_euler, r)) / append_dims(r, x.ndim)
    # A step to 0 has no slope at its end: it is Euler's, as in sampling.
    return torch.where(append_dims(r, x.ndim) > 0, x + dt * (slope + slope_end) / 2, x_euler)


def consistency_losses(
    roles: Roles,
    x0: Tensor,
    draw: Draw,
    *,
    distance: Distance,
    weight: Weight,
    ode_solver: str,
    **cond: Tensor,
) -> dict[str, Tensor]:
    """lambda(t) d(f(x_t, t), f-(x_r, r)) per sample (Song et al. 2023, Eq. 7 and Eq. 10).

    With a teacher x_r is one `ode_solver` step from x_t (Algorithm 2); without, x_r = x0 + r noise (Algorithm 3).
    Without a target network the student stands for it, as mu = 0 makes both the same. Student and target share their
    dropout masks. Gradients flow through the student only.
    """
    x_t = x0 + draw.noise * append_dims(draw.t, x0.ndim)
    masks = rng_state(x0.device)
    student = roles.student(x_t, draw.t, **cond)
    with torch.no_grad():
        x_r = _lower_point(roles.teacher, x0, x_t, draw, ode_solver, **cond)
        with replayed_rng(x0.device, masks):
            target = at_level(roles.target or bare(roles.student), x_r, draw.r, **cond)
    return {"loss": distance(student, target) * weight(draw.t, draw.r)}


def at_level(denoiser: Denoiser, x: Tensor, r: Tensor, **cond: Tensor) -> Tensor:
    """f(x, r), which is x itself where r = 0, whatever the network would say there."""
    at_zero = r == 0
    value = denoiser(x, r.masked_fill(at_zero, 1.0), **cond)
    return torch.where(append_dims(at_zero, x.ndim), x, value)


def _lower_point(
    teacher: Denoiser | None, x0: Tensor, x_t: Tensor, draw: Draw, ode_solver: str, **cond: Tensor
) -> Tensor:
    """The point at noise level r on the trajectory through (x_t, t)."""
    if teacher is None:
        # Algorithm 3; the same point as an Euler step whose denoiser returns the clean image.
        return x0 + draw.noise * append_dims(draw.r, x0.ndim)
    return ODE_SOLVERS.load(ode_solver)(lambda x, t: teacher(x, t, **cond), x_t, draw.t, draw.r)


class ConsistencyObjective(Objective):
    """Algorithm 2 (with a teacher) or Algorithm 3 (without), with target decay mu(k).

    What papers vary are three arguments: how `pairs` (t, r) are drawn, the `distance`, and `weight`(t, r).
    """

    def __init__(
        self,
        schedule: EmaAndScales,
        distance: Distance,
        weight: Weight,
        *,
        pairs: Pairs,
        distillation: bool,
        ode_solver: str = "heun",
    ):
        ODE_SOLVERS[ode_solver]  # refuses unknown names at once
        self.schedule = schedule
        self.distance = distance
        self.weight = weight
        self.pairs = pairs
        self.needs_teacher = distillation
        self.needs_target = not schedule.copies_student
        self.ode_solver = ode_solver

    def draw(self, x0: Tensor, step: int, random: StepRandom) -> Draw:
        return self.pairs.draw(x0, step, self.num_scales(step), random)

    def forward(self, roles: Roles, x0: Tensor, draw: Draw, step: int, **cond: Tensor) -> dict[str, Tensor]:
        if self.needs_teacher != (roles.teacher is not None):
            raise ValueError("consistency distillation needs a teacher, consistency training takes none")
        return consistency_losses(
            roles, x0, draw, distance=self.distance, weight=self.weight, ode_solver=self.ode_solver, **cond
        )

    def target_decay(self, step: int) -> float:
        return self.schedule(step)[0]

    def num_scales(self, step: int) -> int:
        return self.schedule(step)[1]


def consistency(config: Any) -> Objective:
    """Rows consistency_distillation and consistency_training."""
    return ConsistencyObjective(
        schedule_of(config),
        distance_of(config),
        weight_of(config),
        pairs=PAIRS.load(config.pairs)(config),
        distillation=distils(config),
        ode_solver=config.ode_solver,
    )
