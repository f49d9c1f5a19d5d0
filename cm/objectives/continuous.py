"""Continuous-time consistency distillation and training (Song et al. 2023, Appendix B).

The limit of a grid with infinitely many points: the student f is not compared with a target one step down the
trajectory but moved along it. What is driven to zero is its total derivative on the way,

    v = df/dt = df/dt(x, t) + df/dx dx/dt,    dx/dt = (x_t - D(x_t; t)) / t  with a teacher D (distillation),
                                              dx/dt = (x_t - x0) / t = noise without (training).

The derivative is one forward-mode pass (torch.func.jvp). There is no target network and no grid.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cm.config.rules import check_continuous
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.grid import Grid
from cm.errors import UserError
from cm.nn import append_dims, mean_flat
from cm.objectives.base import Draw, Objective, Roles, replayed_rng, rng_state
from cm.objectives.consistency import Distance, Weight
from cm.objectives.forward_mode import forward_mode
from cm.objectives.lpips import Lpips
from cm.seeding import StepRandom

# (distance, f, v), images of one shape -> what the registry says
Form = Callable[[Distance, Tensor, Tensor], Tensor]


def curvature_product(distance: Distance, f: Tensor, v: Tensor) -> Tensor:
    """G(f) v per image, with G the Hessian of y -> d(y, f) at y = f; shaped like f.

    Forward over reverse. Gradients flow through f and v where they have any.
    """
    slope = torch.func.grad(lambda y: distance(y, f).sum())
    return torch.func.jvp(slope, (f,), (v,))[1]


def _quadratic(distance: Distance, f: Tensor, v: Tensor) -> Tensor:
    """v^T G(f) v (Theorem 3, up to its factor 1/2)."""
    return (v * curvature_product(distance, f, v)).flatten(1).sum(1)


# --loss_norm without --stop_grad -> losses (B,); gradients flow through v. l2 is the norm, not its square.
LOSSES: Mapping[str, Form] = {
    "l1": lambda distance, f, v: mean_flat(v.abs()),
    "l2": lambda distance, f, v: torch.linalg.vector_norm(v.flatten(1), dim=1),
    "l2-32": _quadratic,
    "linf": lambda distance, f, v: v.abs().flatten(1).amax(1),
    "lpips": _quadratic,
    "lpips-max": _quadratic,
}
# --loss_norm with --stop_grad -> the direction g (like f) of the pseudo-loss sum f g (Theorem 5), held constant
DIRECTIONS: Mapping[str, Form] = {
    "l2": lambda distance, f, v: v,
    "l2-32": curvature_product,
    "lpips": curvature_product,
    "lpips-max": curvature_product,
}


def total_derivative(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, t_slope: Tensor, **cond: Tensor
) -> tuple[Tensor, Tensor]:
    """(f, df/dt) of a denoiser along a trajectory through (x_t, t); t_slope is t dx/dt. One forward-mode pass.

    Both carry a graph where gradients are enabled. A network of DistributedDataParallel is taken out of it, so
    gradients must find another way to the other ranks. UserError for a network without forward-mode derivatives.
    """
    bare = Denoiser(_bare(denoiser.net), denoiser.precond)
    try:
        with forward_mode():
            # Along ln t, where the clock c_noise moves at a constant speed. Along t it runs at up to 125,000, too fast
            # for fp16.
            f, slope = torch.func.jvp(lambda x, s: bare(x, s, **cond), (x_t, t), (t_slope, t))
    except (NotImplementedError, RuntimeError) as error:
        if not any(word in str(error) for word in ("forward AD", "forward mode AD", "functorch")):
            raise
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(
            f"--training_mode continuous_*: {type(bare.net).__name__} has an operation without forward-mode "
            f"derivative ({reason})"
        ) from error
    return f, slope / append_dims(t, f.ndim)


def continuous_losses(
    roles: Roles,
    x0: Tensor,
    draw: Draw,
    *,
    norm: str,
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
    if isinstance(distance, Lpips):
        distance.load(x0.device)  # within torch.func no network can be built
    losses = _stop_grad_losses if stop_grad else _differentiated_losses
    loss, v = losses(roles.student, x_t, draw.t, t_slope, norm, distance, cond)
    return {"loss": loss * weight(draw.t), "tangent_rms": mean_flat(v.detach().square()).sqrt()}


def _stop_grad_losses(
    student: Denoiser, x_t: Tensor, t: Tensor, t_slope: Tensor, norm: str, distance: Distance, cond: dict
) -> tuple[Tensor, Tensor]:
    """(loss, v). The tangent needs no graph; the gradient takes a plain forward pass with the same dropout.

    The value of sum f g says nothing and may be negative; here the loss has the value v^T g, which is to become 0.
    """
    masks = rng_state(x_t.device)
    with torch.no_grad():
        f, v = total_derivative(student, x_t, t, t_slope, **cond)
        direction = DIRECTIONS[norm](distance, f, v)
    with replayed_rng(x_t.device, masks):
        f = student(x_t, t, **cond)
    return ((v + f - f.detach()) * direction).flatten(1).sum(1), v


def _differentiated_losses(
    student: Denoiser, x_t: Tensor, t: Tensor, t_slope: Tensor, norm: str, distance: Distance, cond: dict
) -> tuple[Tensor, Tensor]:
    """(norm of v, v), with the graph of v."""
    if any(getattr(module, "use_checkpoint", False) for module in _bare(student.net).modules()):
        raise UserError("--use_checkpoint True does not work with --stop_grad False: v needs its whole graph")
    f, v = total_derivative(student, x_t, t, t_slope, **cond)
    loss = LOSSES[norm](distance, f, v)
    if isinstance(student.net, DistributedDataParallel):
        # v comes from the bare network. DDP averages whatever reaches the parameters in the backward pass after a
        # forward pass of its own; one row with weight 0 is that pass, and makes every parameter take part.
        loss = loss + 0 * student(x_t[:1], t[:1], **{name: value[:1] for name, value in cond.items()}).sum()
    return loss, v


def _bare(net: nn.Module) -> nn.Module:
    return net.module if isinstance(net, DistributedDataParallel) else net


def _order(norm: str, stop_grad: bool) -> int:
    """How often v is a factor of the loss whose gradient is taken."""
    return 2 if not stop_grad and LOSSES[norm] is _quadratic else 1


def _times_speed(weight: Weight, grid: Grid, order: int) -> Weight:
    """The weight of losses with v per unit of t that makes them losses with v per unit of the grid's u."""
    return lambda t: weight(t) * grid.speed(t) ** order


class ContinuousObjective(Objective):
    """Consistency distillation (with a teacher) or training (without) in the limit of infinitely many grid points.

    norm is a key of DIRECTIONS (with stop_grad) or LOSSES; distance is the function it names, of which l1, l2 and linf
    make no use. Noise levels have the density of Karras's grid.

    clock: what v is the derivative by. "t": the noise level, as in the released models. "grid": the position u on
    Karras's grid, so that v is longer by dt/du; the limit of the discrete losses (Theorems 3 to 6).
    """

    def __init__(
        self,
        norm: str,
        distance: Distance,
        weight: Weight,
        *,
        grid: Grid,
        distillation: bool,
        stop_grad: bool = True,
        clock: str = "t",
    ):
        check_continuous(loss_norm=norm, distillation=distillation, stop_grad=stop_grad)
        self.norm = norm
        self.distance = distance
        self.weight = weight if clock == "t" else _times_speed(weight, grid, _order(norm, stop_grad))
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
            norm=self.norm,
            distance=self.distance,
            weight=self.weight,
            stop_grad=self.stop_grad,
            **cond,
        )
