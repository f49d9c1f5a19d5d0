"""MeanFlow (Geng et al. 2025): a flow map from data alone, by the Eulerian identity on the linear path.

Guidance can be part of the target (section 4.2), so that a sample costs one pass: the velocity of the data is replaced
by v_g = omega v + (1 - omega - kappa) u(z, t, t) + kappa u(z, t, t | y), with the network held constant. What obeys
this follows the flow v(no class) + w (v(y) - v(no class)) of scale w = omega / (1 - kappa).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cm.diffusion.flow_maps import average_velocity
from cm.diffusion.guidance import unconditional
from cm.errors import UserError
from cm.nn import NO_CLASS, append_dims
from cm.objectives.base import Objective, Roles, bare, replayed_rng
from cm.objectives.flow_map import Adaptive, FlowMapObjective, law_of


@dataclass(frozen=True)
class TargetGuidance:
    """omega and kappa of v_g, which acts at times start <= t <= end of the linear path; else v_g is v."""

    omega: float = 1.0
    kappa: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def __call__(self, v: Tensor, no_class: Tensor, by_class: Tensor) -> Tensor:
        """v_g, like v, of the velocities without and with the class."""
        return self.omega * v + (1 - self.omega - self.kappa) * no_class + self.kappa * by_class

    @property
    def plain(self) -> bool:
        """Whether v_g is v everywhere."""
        return self.omega == 1 and self.kappa == 0


@dataclass(frozen=True, kw_only=True)
class MeanFlowObjective(FlowMapObjective):
    """MeanFlow's loss. Rows whose class is hidden are not guided: they learn the flow of all classes."""

    guidance: TargetGuidance = TargetGuidance()

    def guided(
        self, roles: Roles, z: Tensor, t: Tensor, v: Tensor, masks: Any, cond: dict[str, Tensor]
    ) -> Tensor:
        """v_g where the guidance acts and the row has a class y (B,), v elsewhere; like v."""
        if self.guidance.plain:
            return v
        held = bare(roles.student)
        with torch.no_grad(), replayed_rng(z.device, masks):
            by_class = average_velocity(held, z, t, t, self.path, **cond)
        with torch.no_grad(), replayed_rng(z.device, masks):
            no_class = average_velocity(unconditional(held), z, t, t, self.path, **cond)
        acts = (t >= self.guidance.start) & (t <= self.guidance.end) & (cond["y"] != NO_CLASS)
        return torch.where(append_dims(acts, v.ndim), self.guidance(v, no_class, by_class), v)


def meanflow(config: Any) -> Objective:
    """Row meanflow."""
    return MeanFlowObjective(
        law=law_of(config),
        weight=Adaptive(config.norm_p, config.norm_c),
        mode=config.training_mode,
        guidance=_guidance_of(config),
    )


def _guidance_of(config: Any) -> TargetGuidance:
    guidance = TargetGuidance(config.omega, config.kappa, config.guided_from, config.guided_to)
    if guidance.plain:
        return guidance
    flags = f"--omega {config.omega} --kappa {config.kappa}"
    if not config.class_cond:
        raise UserError(f"{flags}: guidance needs classes (--class_cond True)")
    if not config.label_dropout:
        raise UserError(f"{flags}: guidance needs images without a class (--label_dropout above 0)")
    if guidance.start >= guidance.end:
        raise UserError(f"--guided_from {guidance.start} must be below --guided_to {guidance.end}")
    return guidance
