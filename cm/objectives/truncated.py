"""Truncated consistency training, its second stage (Lee et al. 2025).

Stage 1 is a consistency model of all noise levels, frozen here in the role of the teacher. The student learns the
levels from t' up only, where its capacity is needed: a pair whose lower end r is below t' has the stage-1 model as its
target. A share of the rows is at t' itself. Their target, just below, always is the stage-1 model: the boundary that
keeps the student from a constant.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cm.diffusion.proposals import Proposal
from cm.nn import append_dims
from cm.objectives.base import Draw, Objective, Roles, bare, replayed_rng, rng_state
from cm.objectives.curricula import Ratio
from cm.objectives.distances import Distance
from cm.objectives.pairs import draw_level, law_of, lower_level, ratio_of
from cm.objectives.parts import Weight, distance_of, weight_of
from cm.seeding import StepRandom

LOWEST = 1e-6  # no pair goes to 0


@dataclass(frozen=True)
class TruncatedPairs:
    """t of a law above t', or t' itself on the boundary's rows; r by a ratio.

    Every (1 / share)-th row of the global batch is a boundary row. Its weight makes the mean over the batch the mean
    over the other rows plus boundary_weight times the mean over the boundary's.
    """

    law: Proposal
    ratio: Ratio
    transition: float = 1.0
    share: float = 0.25
    boundary_weight: float = 0.1
    k: float = 8.0
    b: float = 1.0

    def draw(self, x0: Tensor, step: int, random: StepRandom) -> Draw:
        """Levels, noise and weights for images x0 (B, C, ...) of this step."""
        noise = random.noise(tuple(x0.shape[1:]))
        t = draw_level(self.law, random)
        boundary, weight = self.boundary(random.rows(), random.global_batch)
        return self.at(torch.where(boundary, self.transition, t), step, noise, weight.to(t))

    def at(self, t: Tensor, step: int, noise: Tensor, weight: Tensor) -> Draw:
        """The Draw of given levels."""
        return Draw(
            t=t, r=lower_level(t, self.ratio(step), self.k, self.b, LOWEST), noise=noise, weight=weight
        )

    def boundary(self, rows: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """(whether rows of a global batch are the boundary's, their weights), float64."""
        chosen = torch.floor((rows + 1).double() * self.share) > torch.floor(rows.double() * self.share)
        count = math.floor(batch * self.share)
        weight = torch.full(rows.shape, batch / (batch - count), dtype=torch.float64, device=rows.device)
        return chosen, torch.where(chosen, self.boundary_weight * batch / max(count, 1), weight)


class TruncatedObjective(Objective):
    """Stage 2: w(t, r) d(f(x_t, t), f-(x_r, r)) for t >= t'; f- is the stage-1 model below t', the student above."""

    needs_teacher = True

    def __init__(self, distance: Distance, weight: Weight, *, pairs: TruncatedPairs):
        self.distance = distance
        self.weight = weight
        self.pairs = pairs

    def draw(self, x0: Tensor, step: int, random: StepRandom) -> Draw:
        return self.pairs.draw(x0, step, random)

    def forward(self, roles: Roles, x0: Tensor, draw: Draw, step: int, **cond: Tensor) -> dict[str, Tensor]:
        if roles.teacher is None:
            raise ValueError("truncated training needs its stage-1 model")
        x_t, x_r = (x0 + draw.noise * append_dims(level, x0.ndim) for level in (draw.t, draw.r))
        masks = rng_state(x0.device)
        student = roles.student(x_t, draw.t, **cond)
        with torch.no_grad():
            # The stage-1 model drops out as the student does, under the same masks.
            roles.teacher.net.train()
            with replayed_rng(x0.device, masks):
                below = roles.teacher(x_r, draw.r, **cond)
            with replayed_rng(x0.device, masks):
                above = bare(roles.student)(x_r, draw.r, **cond)
            target = torch.where(append_dims(draw.r < self.pairs.transition, x0.ndim), below, above)
        return {"loss": self.distance(student, target) * self.weight(draw.t, draw.r)}


def truncated(config: Any) -> Objective:
    """Row tcm."""
    pairs = TruncatedPairs(
        law_of(config, low=math.log(config.transition_t), df=config.t_df),
        ratio_of(config),
        config.transition_t,
        config.boundary_share,
        config.boundary_weight,
        config.ratio_k,
        config.ratio_b,
    )
    return TruncatedObjective(distance_of(config), weight_of(config), pairs=pairs)
