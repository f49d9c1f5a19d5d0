"""Continuous-time consistency models in TrigFlow's coordinates: sCT and sCD (Lu & Song 2025).

What moves the student is its derivative along the flow, in one forward-mode pass without a graph, on the bare network;
gradients come from a plain pass, which DistributedDataParallel sees. With F- the student held constant,

    g = -cos^2(t) (sigma_data F- - dx/dt) - r cos(t) sin(t) (x_t + sigma_data dF-/dt)         (its Algorithm 1)

is cos(t) df/dt at r = 1 and velocity matching at r = 0; r grows in over a warm-up. The flow's dx/dt is the teacher's
(sCD) or cos(t) z - sin(t) x0 (sCT).
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cm.diffusion.denoiser import Denoiser
from cm.diffusion.proposals import Proposal
from cm.diffusion.trigflow import TrigFlow, time_of, velocity
from cm.nn import append_dims, mean_flat
from cm.objectives.base import Draw, Objective, Roles, bare, replayed_rng, rng_state
from cm.objectives.forward_mode import along, in_fp32
from cm.objectives.pairs import draw_level, law_of
from cm.objectives.parts import distils
from cm.seeding import StepRandom
from cm.storage.weights import LOSS_MODULE

FEATURES = 64


class LossWeight(nn.Module):
    """ln of the expected squared error at a noise level, learned beside the student; zero at the start.

    One linear layer on waves of ln(sigma / sigma_data), which is even in the noise level and smooth.
    """

    def __init__(self, sigma_data: float):
        super().__init__()
        self.sigma_data = sigma_data
        self.linear = nn.Linear(FEATURES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, sigma: Tensor) -> Tensor:
        """(B,) for noise levels (B,)."""
        frequencies = torch.logspace(-1.5, 0.5, FEATURES // 2, device=sigma.device)
        phases = (sigma / self.sigma_data).log().float()[:, None] * frequencies
        return self.linear(torch.cat([phases.cos(), phases.sin()], dim=1))[:, 0]


@dataclass(frozen=True)
class Tangent:
    """How g is made and bounded. step: a difference over this much of ln(sigma) instead of the derivative; 0: none."""

    sigma_data: float = 0.5
    warmup: int = 10000
    norm: str = "l2"
    c: float = 0.1
    step: float = 0.0
    mode: str = "sct"

    def share(self, step: int) -> float:
        """r of the warm-up."""
        return min(1.0, step / self.warmup) if self.warmup else 1.0

    def bounded(self, g: Tensor) -> Tensor:
        """g / (|g| + c) per image by its norm or root mean square, or g cut to [-1, 1]."""
        if self.norm == "clip":
            return g.clamp(-1, 1)
        size = torch.linalg.vector_norm(g.flatten(1), dim=1)
        if self.norm == "rms":
            size = size / math.sqrt(g[0].numel())
        return g / append_dims(size + self.c, g.ndim)

    def __call__(
        self, student: Denoiser, x_t: Tensor, t: Tensor, slope: Tensor, share: float, **cond: Tensor
    ) -> Tensor:
        """g (B, C, ...), not bounded, of a bare student at (x_t, t) where the flow has dx/dt = slope."""
        sd = self.sigma_data
        cos, sin = append_dims(t.cos(), x_t.ndim), append_dims(t.sin(), x_t.ndim)
        derivative = self._difference if self.step else self._derivative
        f, change = derivative(replace(student, net=in_fp32(student.net)), x_t, t, slope, cond)
        return -(cos**2) * (sd * f - slope) - share * (cos * sin * x_t + sd * change)

    def _derivative(
        self, student: Denoiser, x_t: Tensor, t: Tensor, slope: Tensor, cond: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(F, cos t sin t dF/dt). The factor is inside the pass, where it keeps the clock's speed from overflowing."""
        speed = t.cos() * t.sin()
        network = TrigFlow(student, self.sigma_data)
        direction = (append_dims(speed, x_t.ndim) * slope / self.sigma_data, speed)
        return along(
            lambda u, s: network(u, s, **cond),
            (x_t / self.sigma_data, t),
            direction,
            net=student.net,
            mode=self.mode,
            otherwise="; --tangent_step 0.02 needs none",
        )

    def _difference(
        self, student: Denoiser, x_t: Tensor, t: Tensor, slope: Tensor, cond: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The same from two levels t > t' on a DDIM step of the flow, so that g = cos(t) (f_t - f_t') / sin(t - t').

        Exact for any step at share 1; for smaller shares it tends to the derivative's.
        """
        sd = self.sigma_data
        lower = torch.atan(t.tan() * math.exp(-self.step))
        gap = t - lower
        c, s, cos_low, sin_low, cos, sin = (
            append_dims(v, x_t.ndim)
            for v in (gap.cos(), gap.sin(), lower.cos(), lower.sin(), t.cos(), t.sin())
        )
        network = TrigFlow(student, sd)
        masks = rng_state(x_t.device)
        f = network(x_t / sd, t, **cond)
        with replayed_rng(x_t.device, masks):
            f_low = network((c * x_t - s * slope) / sd, lower, **cond)
        delta = -cos_low * (sd * f - slope) - sin_low * (x_t + sd * (c * f - f_low) / s)
        return f, -(cos * delta + cos**2 * (sd * f - slope) + cos * sin * x_t) / sd


class TrigFlowObjective(Objective):
    """mean_pixels (F - F- - g)^2 / e^u + u with a learned u(t), or without it (Lu & Song 2025, Algorithm 1)."""

    def __init__(self, law: Proposal, tangent: Tangent, *, distillation: bool, adaptive: bool = True):
        self.law = law
        self.tangent = tangent
        self.needs_teacher = distillation
        self.adaptive = adaptive

    def attach(self, student: nn.Module) -> None:
        if self.adaptive:
            device = next(student.parameters()).device
            student.add_module(LOSS_MODULE, LossWeight(self.tangent.sigma_data).to(device))

    def draw(self, x0: Tensor, step: int, random: StepRandom) -> Draw:
        sigma = draw_level(self.law, random)
        return Draw(t=sigma, noise=random.noise(tuple(x0.shape[1:])), weight=torch.ones_like(sigma))

    def forward(self, roles: Roles, x0: Tensor, draw: Draw, step: int, **cond: Tensor) -> dict[str, Tensor]:
        if self.needs_teacher != (roles.teacher is not None):
            raise ValueError("sCD needs a teacher, sCT takes none")
        head = getattr(bare(roles.student).net, LOSS_MODULE, None) if self.adaptive else None
        return trigflow_losses(
            roles,
            x0,
            draw,
            tangent=self.tangent,
            share=self.tangent.share(step),
            log_error=None if head is None else head(draw.t),
            **cond,
        )


def trigflow_losses(
    roles: Roles,
    x0: Tensor,
    draw: Draw,
    *,
    tangent: Tangent,
    share: float,
    log_error: Tensor | None = None,
    **cond: Tensor,
) -> dict[str, Tensor]:
    """Losses (B,), the size of g before it is bounded, and u if there is one. draw.t is sigma = sigma_data tan(t)."""
    sd = tangent.sigma_data
    t = time_of(draw.t, sd)
    cos, sin = append_dims(t.cos(), x0.ndim), append_dims(t.sin(), x0.ndim)
    z = sd * draw.noise
    x_t = cos * x0 + sin * z
    masks = rng_state(x0.device)
    prediction = TrigFlow(roles.student, sd)(x_t / sd, t, **cond)
    with torch.no_grad():
        slope = cos * z - sin * x0
        if roles.teacher is not None:
            slope = velocity(roles.teacher, x_t, draw.t, sd, **cond)
        with replayed_rng(x0.device, masks):
            g = tangent(bare(roles.student), x_t, t, slope, share, **cond)
        target = prediction.detach() + tangent.bounded(g)
    squared = mean_flat((prediction - target).square())
    logged = {"tangent_rms": mean_flat(g.square()).sqrt(), "squared": squared}
    if log_error is None:
        return {"loss": squared, **logged}
    return {"loss": squared * (-log_error).exp() + log_error, **logged, "log_error": log_error}


def trigflow(config: Any) -> Objective:
    """Rows sct and scd."""
    tangent = Tangent(
        config.sigma_data,
        config.tangent_warmup,
        config.tangent_norm,
        config.tangent_c,
        config.tangent_step,
        config.training_mode,
    )
    return TrigFlowObjective(
        law_of(config), tangent, distillation=distils(config), adaptive=config.adaptive_weight
    )
