"""One loss for flow maps: u(z, t, r) -> what an identity of the exact map says it is, held constant.

| identity | target of u | with v from data; a teacher; the map itself |
|---|---|---|
| eulerian | v - (t - r) du/dt along (v, 1), r fixed | MeanFlow; its distillation; ESD |
| lagrangian | v(Phi, r) + (t - r) du/dr, Phi = z - (t - r) u | none; LMD; LSD |
| progressive | a u1 + (1 - a) u(z - (t - s) u1, s, r) | alpha-Flow, SoFlow; the same; shortcut models, PSD |

Progressive: s = t - a (t - r) lies between, and u1 is v, or the map's own u(z, t, s).
References: Geng et al. 2025 (MeanFlow), Boffi et al. 2025 (the three identities, ESD, LSD, PSD), Frans et al. 2025
(shortcut), Zhang et al. 2025 (alpha-Flow), SoFlow (arXiv:2512.15657). Rows with r = t learn v from the data, or from
the teacher where there is one; without them nothing is learned. Targets carry no gradient, so that one step costs one
pass with a graph and none through a derivative.

z = alpha(t) x0 + beta(t) n on any path; `Draw` holds t and r in the linear path's time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cm.diffusion.denoiser import Denoiser
from cm.diffusion.flow_maps import FlowMap, average_velocity, velocity
from cm.diffusion.paths import EDM, LINEAR, VP_COSINE, Path, trigonometric
from cm.errors import UserError
from cm.nn import append_dims
from cm.objectives.base import Draw, Objective, Roles, bare, replayed_rng, rng_state
from cm.objectives.flow_times import LATEST, TimeLaw
from cm.objectives.forward_mode import along, in_fp32
from cm.seeding import StepRandom

# (z, t, r) -> u of the network that is held constant, under the masks of the pass that learns
Held = Callable[[Tensor, Tensor, Tensor], Tensor]
# (z, t) -> dz/dt
Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Adaptive:
    """e / (e + c)^p of squared errors e (B,), the divisor without gradient (MeanFlow, section 4.3)."""

    power: float = 1.0
    c: float = 0.01

    def __call__(self, squared: Tensor) -> Tensor:
        return squared / (squared.detach() + self.c) ** self.power


@dataclass(frozen=True)
class Split:
    """Where the progressive identity's middle lies: the share a of the gap that the first step takes.

    From start to end over so many steps, on a logarithmic scale. Or uniform (0, 1), drawn anew for every row.
    """

    start: float = 0.5
    end: float = 0.5
    steps: int = 0
    uniform: bool = False

    def share(self, step: int) -> float:
        """a at a step of training."""
        done = min(step / self.steps, 1.0) if self.steps else 1.0
        return self.start * (self.end / self.start) ** done


def point(path: Path, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(z, dz/dt) of the line through an image and its noise at times t (B,) of the path."""
    alpha, beta, *slopes = (append_dims(c, x0.ndim) for c in (path.alpha(t), path.beta(t), *path.slopes(t)))
    return alpha * x0 + beta * noise, slopes[0] * x0 + slopes[1] * noise


def times(path: Path, draw: Draw) -> tuple[Tensor, Tensor]:
    """(t, r) of a draw in a path's own time."""
    if path == LINEAR:
        return draw.t, draw.r
    return path.time(draw.t / (1 - draw.t)), path.time(draw.r / (1 - draw.r))


def eulerian(
    u: Held, z: Tensor, t: Tensor, r: Tensor, v: Tensor, derivative: Callable[..., tuple[Tensor, Tensor]]
) -> Tensor:
    """v - (t - r) du/dt: what u is if Phi(z, t, r) does not change along the flow (MeanFlow, Eq. 10)."""
    ones = torch.ones_like(t)
    _, change = derivative(u, (z, t, r), (v, ones, torch.zeros_like(r)))
    return v - append_dims(t - r, z.ndim) * change


def lagrangian(
    u: Held, z: Tensor, t: Tensor, r: Tensor, at: Velocity, derivative: Callable[..., tuple[Tensor, Tensor]]
) -> Tensor:
    """v(Phi, r) + (t - r) du/dr: what u is if the end of the step moves with the flow (Boffi et al. 2025)."""
    mean, change = derivative(lambda lower: u(z, t, lower), (r,), (torch.ones_like(r),))
    gap = append_dims(t - r, z.ndim)
    return at(z - gap * mean, r) + gap * change


def progressive(u: Held, z: Tensor, t: Tensor, r: Tensor, share: Tensor, first: Tensor | None) -> Tensor:
    """a u1 + (1 - a) u2 of two steps in the place of one; first: u1, or None for the map's own."""
    middle = t - share * (t - r)
    u1 = u(z, t, middle) if first is None else first
    u2 = u(z - append_dims(t - middle, z.ndim) * u1, middle, r)
    a = append_dims(share, z.ndim)
    return a * u1 + (1 - a) * u2


@dataclass(frozen=True, kw_only=True)
class FlowMapObjective(Objective):
    """Squared error of u against an identity's target, with an adaptive weight.

    source: of v, `data` (dz/dt of image and noise), `teacher` or `self`. gap_power: errors of rows with r < t are
    multiplied by (t - r)^this: 2 compares the ends of steps instead of their velocities. mode: the row, for messages.
    """

    law: TimeLaw
    identity: str = "eulerian"
    source: str = "data"
    path: Path = LINEAR
    weight: Adaptive = Adaptive()
    split: Split = Split()
    gap_power: float = 0.0
    mode: str = "flow_map"

    @property
    def needs_teacher(self) -> bool:
        return self.source == "teacher"

    def draw(self, x0: Tensor, step: int, random: StepRandom) -> Draw:
        t, r = self.law.draw(random)
        noise = random.noise(tuple(x0.shape[1:]))
        middle = random.uniform() if self.split.uniform else None
        return Draw(t=t, r=r, noise=noise, weight=torch.ones_like(t), share=middle)

    def forward(self, roles: Roles, x0: Tensor, draw: Draw, step: int, **cond: Tensor) -> dict[str, Tensor]:
        t, r = times(self.path, draw)
        z, v = point(self.path, x0, draw.noise, t)
        masks = rng_state(x0.device)
        u = average_velocity(roles.student, z, t, r, self.path, **cond)
        with torch.no_grad(), replayed_rng(x0.device, masks):
            target = self.target(roles, z, t, r, v, draw.share, step, masks, cond)
        squared = (u - target).square().flatten(1).sum(1)
        gap = torch.where(r < t, t - r, 1.0) ** self.gap_power
        return {"loss": self.weight(gap * squared), "squared": squared / u[0].numel()}

    def target(
        self,
        roles: Roles,
        z: Tensor,
        t: Tensor,
        r: Tensor,
        v: Tensor,
        share: Tensor | None,
        step: int,
        masks: Any,
        cond: dict[str, Tensor],
    ) -> Tensor:
        """What u should be, like z. v: dz/dt of image and noise. masks: generator state of the pass that learns."""
        held = bare(roles.student)
        v = self.guided(roles, z, t, v, masks, cond)

        def u(z: Tensor, t: Tensor, r: Tensor, model: FlowMap = held) -> Tensor:
            with replayed_rng(z.device, masks):
                return average_velocity(model, z, t, r, self.path, **cond)

        def at(z: Tensor, t: Tensor) -> Tensor:
            return u(z, t, t) if roles.teacher is None else velocity(roles.teacher, z, t, self.path, **cond)

        flow = v
        if self.source == "teacher" or (self.source, self.identity) == ("self", "eulerian"):
            flow = at(z, t)
        if self.identity == "progressive":
            a = torch.full_like(t, self.split.share(step)) if share is None else share
            found = progressive(u, z, t, r, a, None if self.source == "self" else flow)
        else:
            wide = FlowMap(in_fp32(held.net), held.precond)
            pass_on = differentiated(wide, self.mode)
            found = (
                eulerian(lambda *a: u(*a, wide), z, t, r, flow, pass_on)
                if self.identity == "eulerian"
                else lagrangian(lambda *a: u(*a, wide), z, t, r, at, pass_on)
            )
        diagonal = flow if self.source == "teacher" else v
        return torch.where(append_dims(r == t, z.ndim), diagonal, found)

    def guided(
        self, roles: Roles, z: Tensor, t: Tensor, v: Tensor, masks: Any, cond: dict[str, Tensor]
    ) -> Tensor:
        """The flow of the data that the target takes in the place of v, like v: here v itself."""
        return v


def differentiated(model: Denoiser, mode: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """(function, at, direction) -> (value, derivative) by forward mode, for functions of a network held constant."""
    return lambda function, at, direction: along(function, at, direction, net=model.net, mode=mode)


def path_of(config: Any) -> Path:
    """The path of --flow_path."""
    known = {"linear": LINEAR, "edm": EDM, "vp": VP_COSINE, "trigonometric": trigonometric(config.sigma_data)}
    return known[config.flow_path]


def law_of(config: Any) -> TimeLaw:
    """The law of t and r of the options."""
    return TimeLaw(
        config.time_law,
        config.t_mean,
        config.t_std,
        config.r_mean,
        config.r_std,
        config.gap_share,
        config.octaves,
        min(config.sigma_max / (1 + config.sigma_max), LATEST),
    )


def flow_map(config: Any) -> Objective:
    """Row flow_map."""
    if config.identity == "lagrangian" and config.flow_velocity == "data":
        raise UserError(
            "--identity lagrangian asks for the velocity where a step ends, of which data say nothing: "
            "--flow_velocity self"
        )
    return _flow_map(config, config.flow_velocity)


def distillation(config: Any) -> Objective:
    """Row flow_map_distillation."""
    return _flow_map(config, "teacher")


def _flow_map(config: Any, source: str) -> Objective:
    return FlowMapObjective(
        law=law_of(config),
        identity=config.identity,
        source=source,
        path=path_of(config),
        weight=Adaptive(config.norm_p, config.norm_c),
        split=Split(config.split_start, config.split_end, config.split_steps, config.split_uniform),
        gap_power=config.gap_power,
        mode=config.training_mode,
    )
