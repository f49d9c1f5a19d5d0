"""Continuous-time consistency distillation and training (Song et al. 2023, Appendix B).

The limit of a grid with infinitely many points: the student f is not compared with a target one step down the
trajectory but moved along it. What is driven to zero is its total derivative on the way,

    v = df/dt = df/dt(x, t) + df/dx dx/dt,    dx/dt = (x_t - D(x_t; t)) / t  with a teacher D (distillation),
                                              dx/dt = (x_t - x0) / t = noise without (training).

The derivative is one forward-mode pass (torch.func.jvp). There is no target network and no grid.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cm.diffusion.denoiser import Denoiser
from cm.diffusion.grid import Grid
from cm.errors import UserError
from cm.nn import append_dims, mean_flat
from cm.objectives.base import Draw, Objective, Roles, bare, replayed_rng, rng_state
from cm.objectives.distances import Distance
from cm.objectives.forward_mode import along
from cm.objectives.parts import Weight, distance_of, distils, grid_of, weight_of
from cm.seeding import StepRandom


def total_derivative(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, t_slope: Tensor, **cond: Tensor
) -> tuple[Tensor, Tensor]:
    """(f, df/dt) of a denoiser along a trajectory through (x_t, t); t_slope is t dx/dt. One forward-mode pass.

    Both carry a graph where gradients are enabled. A network of DistributedDataParallel is taken out of it, so
    gradients must find another way to the other ranks. UserError for a network without forward-mode derivatives.
    """
    denoiser = bare(denoiser)
    # Along ln t, where the clock c_noise moves at a constant speed. Along t it runs at up to 125,000, too fast for
    # fp16.
    f, slope = along(
        lambda x, s: denoiser(x, s, **cond), (x_t, t), (t_slope, t), net=denoiser.net, mode="continuous_*"
    )
    return f, slope / append_dims(t, f.ndim)


def continuous_losses(
    roles: Roles,
    x0: Tensor,
    draw: Draw,
    *,
    distance: Distance,
    weight: Weight,
    stop_grad: bool,
    **cond: Tensor,
) -> dict[str, Tensor]:
    """Losses (B,) of the student's drift along trajectories, and tangent_rms (B,), the size of v per number.

    With `stop_grad` the gradient is that of lambda(t) sum f g with g = G(f) v held constant (Theorems 5 and 6).
    Without, the loss is lambda(t) times a norm of v itself, or v^T G(f) v (Theorems 3 and 4).
    """
    scaled_noise = draw.noise * append_dims(draw.t, x0.ndim)
    x_t = x0 + scaled_noise
    t_slope = scaled_noise
    if roles.teacher is not None:
        with torch.no_grad():
            t_slope = x_t - roles.teacher(x_t, draw.t, **cond)
    distance.load(x0.device)  # within torch.func no network can be built
    losses = _stop_grad_losses if stop_grad else _differentiated_losses
    loss, v = losses(roles.student, x_t, draw.t, t_slope, distance, cond)
    return {"loss": loss * weight(draw.t), "tangent_rms": mean_flat(v.detach().square()).sqrt()}


def _stop_grad_losses(
    student: Denoiser, x_t: Tensor, t: Tensor, t_slope: Tensor, distance: Distance, cond: dict
) -> tuple[Tensor, Tensor]:
    """(loss, v). The tangent needs no graph; the gradient takes a plain forward pass with the same dropout.

    The value of sum f g says nothing and may be negative; here the loss has the value v^T g, which is to become 0.
    """
    masks = rng_state(x_t.device)
    with torch.no_grad():
        f, v = total_derivative(student, x_t, t, t_slope, **cond)
        direction = distance.direction(f, v)
    with replayed_rng(x_t.device, masks):
        f = student(x_t, t, **cond)
    return ((v + f - f.detach()) * direction).flatten(1).sum(1), v


def _differentiated_losses(
    student: Denoiser, x_t: Tensor, t: Tensor, t_slope: Tensor, distance: Distance, cond: dict
) -> tuple[Tensor, Tensor]:
    """(norm of v, v), with the graph of v."""
    if any(getattr(module, "use_checkpoint", False) for module in bare(student).net.modules()):
        raise UserError("--use_checkpoint True does not work with --stop_grad False: v needs its whole graph")
    f, v = total_derivative(student, x_t, t, t_slope, **cond)
    loss = distance.tangent_loss(f, v)
    if isinstance(student.net, DistributedDataParallel):
        # v comes from the bare network. DDP averages whatever reaches the parameters in the backward pass after a
        # forward pass of its own; one row with weight 0 is that pass, and makes every parameter take part.
        loss = loss + 0 * student(x_t[:1], t[:1], **{name: value[:1] for name, value in cond.items()}).sum()
    return loss, v


def _times_speed(weight: Weight, grid: Grid, order: int) -> Weight:
    """The weight of losses with v per unit of t that makes them losses with v per unit of the grid's u."""
    return lambda t, r=None: weight(t, r) * grid.speed(t) ** order


class ContinuousObjective(Objective):
    """Consistency distillation (with a teacher) or training (without) in the limit of infinitely many grid points.

    With stop_grad the distance needs a direction, which l1 and linf have not. Noise levels have the density of Karras's
    grid.

    clock: what v is the derivative by. "t": the noise level, as in the released models. "grid": the position u on
    Karras's grid, so that v is longer by dt/du; the limit of the discrete losses (Theorems 3 to 6).
    """

    def __init__(
        self,
        distance: Distance,
        weight: Weight,
        *,
        grid: Grid,
        distillation: bool,
        stop_grad: bool = True,
        clock: str = "t",
    ):
        if not distillation and not stop_grad:
            raise ValueError("continuous training needs stop_grad: without it the loss has another minimum")
        order = 1 if stop_grad else distance.tangent_degree
        self.distance = distance
        self.weight = weight if clock == "t" else _times_speed(weight, grid, order)
        self.grid = grid
        self.needs_teacher = distillation
        self.stop_grad = stop_grad

    def draw(self, x0: Tensor, step: int, random: StepRandom) -> Draw:
        """t = sigma(u) with u uniform: uniform in t^(1/rho)."""
        t = self.grid.sigma(random.uniform(), 1)
        return Draw(t=t, noise=random.noise(tuple(x0.shape[1:])), weight=torch.ones_like(t))

    def forward(self, roles: Roles, x0: Tensor, draw: Draw, step: int, **cond: Tensor) -> dict[str, Tensor]:
        if self.needs_teacher != (roles.teacher is not None):
            raise ValueError("continuous distillation needs a teacher, continuous training takes none")
        return continuous_losses(
            roles,
            x0,
            draw,
            distance=self.distance,
            weight=self.weight,
            stop_grad=self.stop_grad,
            **cond,
        )


def continuous(config: Any) -> Objective:
    """Rows continuous_distillation and continuous_training."""
    return ContinuousObjective(
        distance_of(config),
        weight_of(config),
        grid=grid_of(config),
        distillation=distils(config),
        stop_grad=config.stop_grad,
        clock=config.clock,
    )
