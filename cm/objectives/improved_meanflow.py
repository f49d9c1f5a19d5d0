"""Improved MeanFlow (iMF, arXiv:2512.02012): a regression of velocities, with the guidance as an input.

The network gives u(z, t, r) and, in a second set of channels, a velocity v^(z, t, r). With Du the derivative of u along
(v^(z, t, t), 1), which carries no gradient, V = u + (t - r) Du is the velocity of the flow that u averages:

    loss = w(|V - v_g|^2) + w(|v^ - v_g|^2),    v_g = v + (1 - 1/omega) (v^(z, t, t | y) - v^(z, t, t | no class))

where w is MeanFlow's adaptive weight and v^ in v_g is held constant. MeanFlow differentiates along v instead, which is
noise - image, so that its target depends on more than (z, t, r). Each row draws the scale omega and the times from
t_min to t_max at which it acts, and the network is told them: a sample chooses them.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cm.diffusion.flow_maps import FlowMap
from cm.diffusion.paths import LINEAR
from cm.errors import UserError
from cm.networks.second_clock import at_all_times
from cm.nn import NO_CLASS, append_dims
from cm.objectives.base import Draw, Objective, Roles, bare, replayed_rng, rng_state
from cm.objectives.flow_map import Adaptive, differentiated, law_of, point
from cm.objectives.flow_times import TimeLaw
from cm.objectives.forward_mode import in_fp32
from cm.seeding import StepRandom


@dataclass(frozen=True)
class ScaleLaw:
    """Scales omega between 1 and `largest`, with a density that falls as omega^-beta."""

    largest: float = 8.0
    beta: float = 1.0

    def scale(self, uniform: Tensor) -> Tensor:
        """omega, like the uniform numbers in [0, 1); by exp, which, unlike powers, rounds a row alike in any batch."""
        if self.beta == 1:
            return torch.exp(uniform * math.log(self.largest))
        power = 1 - self.beta
        return torch.exp(torch.log1p(uniform * (self.largest**power - 1)) / power)


@dataclass(frozen=True)
class GuidedDraw(Draw):
    """omega (B,): scale of the guidance. t_min, t_max (B,): first and last time at which it acts; (0, 1) where r = t.

    hidden (B,) bool: rows whose class is not told, and which are not guided.
    """

    omega: Tensor | None = None
    t_min: Tensor | None = None
    t_max: Tensor | None = None
    hidden: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """What the network is told, (B, 3)."""
        return torch.stack([1 / self.omega, self.t_min, self.t_max], dim=1)

    @property
    def acting(self) -> Tensor:
        """omega where it acts at t, 1 elsewhere."""
        return torch.where((self.t >= self.t_min) & (self.t <= self.t_max), self.omega, 1.0)


def both(
    model: FlowMap, z: Tensor, t: Tensor, r: Tensor, inputs: Tensor, **cond: Tensor
) -> tuple[Tensor, Tensor]:
    """(u, v^) of a network on the linear path, each like z (B, C, ...); inputs (B, 3): its guidance."""
    output = model.net(z, t, second=t - r, guidance_inputs=inputs, **cond).to(z.dtype)
    return tuple(output.split(z.shape[1], dim=1))


@dataclass(frozen=True, kw_only=True)
class ImprovedMeanFlowObjective(Objective):
    """iMF's loss. hidden: how often a row hides its class. mode: the row, for messages."""

    law: TimeLaw
    weight: Adaptive
    scales: ScaleLaw = ScaleLaw()
    hidden: float = 0.1
    mode: str = "improved_meanflow"

    def draw(self, x0: Tensor, step: int, random: StepRandom) -> Draw:
        t, r = self.law.draw(random)
        noise = random.noise(tuple(x0.shape[1:]))
        omega = self.scales.scale(random.uniform().double()).float()
        t_min, t_max = 0.5 * random.uniform(), 0.5 + 0.5 * random.uniform()
        gap = r < t
        return GuidedDraw(
            t=t,
            r=r,
            noise=noise,
            weight=torch.ones_like(t),
            omega=omega,
            t_min=torch.where(gap, t_min, 0.0),
            t_max=torch.where(gap, t_max, 1.0),
            hidden=random.uniform() < self.hidden,
        )

    def forward(
        self, roles: Roles, x0: Tensor, draw: GuidedDraw, step: int, *, y: Tensor, **cond: Tensor
    ) -> dict[str, Tensor]:
        t, r = draw.t, draw.r
        z, v = point(LINEAR, x0, draw.noise, t)
        told = {"y": y.masked_fill(draw.hidden, NO_CLASS), **cond}
        masks = rng_state(x0.device)
        u, head = both(roles.student, z, t, r, draw.inputs, **told)
        with torch.no_grad():
            direction, guided = self.velocities(roles, z, v, draw, masks, {"y": y, **cond})
            change = self.change(roles, z, direction, draw, masks, told)
        average = u + append_dims(t - r, z.ndim) * change
        squared, of_head = ((a - guided).square().flatten(1).sum(1) for a in (average, head))
        size = z[0].numel()
        loss = self.weight(squared) + self.weight(of_head)
        return {"loss": loss, "squared": squared / size, "squared_head": of_head / size}

    def velocities(
        self, roles: Roles, z: Tensor, v: Tensor, draw: GuidedDraw, masks: Any, cond: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(v^ along which u is differentiated, v_g), each like z; cond has the true classes y (B,)."""
        held, t, omega = bare(roles.student), draw.t, draw.acting
        with replayed_rng(z.device, masks):
            direction = both(held, z, t, t, at_all_times(omega), **cond)[1]
        none = {**cond, "y": torch.full_like(cond["y"], NO_CLASS)}
        with replayed_rng(z.device, masks):
            no_class = both(held, z, t, t, at_all_times(torch.ones_like(omega)), **none)[1]
        guided = v + append_dims(1 - 1 / omega, z.ndim) * (direction - no_class)
        return direction, torch.where(append_dims(draw.hidden, z.ndim), v, guided)

    def change(
        self,
        roles: Roles,
        z: Tensor,
        direction: Tensor,
        draw: GuidedDraw,
        masks: Any,
        cond: dict[str, Tensor],
    ) -> Tensor:
        """Du: the derivative of u along (direction, 1) of (z, t), with r held; like z."""
        held = bare(roles.student)
        wide = FlowMap(in_fp32(held.net), held.precond)

        def u(z: Tensor, t: Tensor) -> Tensor:
            with replayed_rng(z.device, masks):
                return both(wide, z, t, draw.r, draw.inputs, **cond)[0]

        return differentiated(wide, self.mode)(u, (z, draw.t), (direction, torch.ones_like(draw.t)))[1]


def improved_meanflow(config: Any) -> Objective:
    """Row improved_meanflow."""
    mode = f"--training_mode {config.training_mode}"
    if not config.class_cond or not config.label_dropout:
        raise UserError(f"{mode} guides by classes: it needs --class_cond True and --label_dropout above 0")
    if config.precond != "flow":
        raise UserError(f"{mode} trains a network that predicts velocities: it needs --precond flow")
    return ImprovedMeanFlowObjective(
        law=law_of(config),
        scales=ScaleLaw(config.omega_max, config.omega_beta),
        hidden=config.label_dropout,
        weight=Adaptive(config.norm_p, config.norm_c),
        mode=config.training_mode,
    )
