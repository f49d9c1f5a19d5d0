"""Consistency trajectory models (Kim et al. 2024): jumps G from any noise level t to any lower one s.

    G(x, t, s) = (s/t) x + (1 - s/t) g(x, t, s),    g = c_skip(t) x + c_out(t) F(c_in(t) x; c_noise(t), c_noise(s))

with EDM's scalings: G is DDIM's step with g for the clean image, and g(x, t, t) a denoiser. Two ways to s, and from
there to the lowest level, must meet: the student's one jump from t, and n Heun steps of the teacher to u, then the
student's jump from u. Denoising score matching keeps g(x, t, t) a denoiser, with a weight that makes both gradients of
the last layer equally long. Without a teacher the target network jumps to u by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cm.diffusion.ddim import ddim
from cm.diffusion.flow_maps import FlowMap
from cm.diffusion.grid import Grid, karras_sigma
from cm.errors import UserError
from cm.nn import append_dims, mean_flat
from cm.objectives.base import Draw, Objective, Roles, bare, replayed_rng, rng_state
from cm.objectives.consistency import heun_step
from cm.objectives.curricula import EmaAndScales
from cm.objectives.distances import Distance
from cm.objectives.parts import Weight, distance_of, distils, grid_of, schedule_of, weight_of
from cm.seeding import StepRandom, derive_seed
from cm.storage.weights import LOSS_MODULE

LOG_MEAN, LOG_STD = -1.2, 1.2  # of the levels of denoising score matching, EDM's
LARGEST = 1e4  # weight of denoising score matching
SMALL = 1e-4  # keeps its denominator from 0


def jumped(model: FlowMap, x: Tensor, t: Tensor, s: Tensor, **cond: Tensor) -> Tensor:
    """G(x, t, s), like x (B, C, ...), for levels 0 < s <= t (B,); x itself at s = t."""
    return ddim(x, model(x, t, s, **cond), t, s)


@dataclass(frozen=True)
class TrajectoryDraw(Draw):
    """t: where the student's jump begins; r: s, where it ends; index: of t on the grid, 0 = sigma_max.

    heun_steps: n, from t to u, the same for the whole batch. level, level_noise: of denoising score matching.
    """

    heun_steps: int = 1
    level: Tensor | None = None
    level_noise: Tensor | None = None


def batch_number(random: StepRandom) -> float:
    """A uniform number in [0, 1) for the whole global batch, which never leaves the host."""
    generator = torch.Generator().manual_seed(derive_seed(random.seed, "teacher steps", random.step))
    return torch.rand((), generator=generator, dtype=torch.float64).item()


@dataclass(frozen=True)
class TrajectoryGrid:
    """Where jumps begin and end: on Karras's grid of N points, n teacher's steps at most `most` (0: no limit).

    n is drawn with probability proportional to n, then t uniformly from where n steps are left, then s uniformly from
    u down to the lowest level.
    """

    grid: Grid
    points: int
    most: int = 0
    dsm_span: float = 0.7

    @property
    def longest(self) -> int:
        """The largest n."""
        return min(self.most or self.points - 1, self.points - 1)

    def steps(self, u: float) -> int:
        """n of a uniform number u in [0, 1)."""
        total, n = self.longest * (self.longest + 1) / 2, 1
        while n < self.longest and u * total >= n * (n + 1) / 2:
            n += 1
        return n

    def level(self, index: Tensor) -> Tensor:
        """Noise levels of grid points."""
        return self.grid.sigma(index, self.points - 1)

    def dsm_levels(self, normal: Tensor, uniform: Tensor, first: Tensor) -> Tensor:
        """Levels of denoising score matching: log-normal in the first rows, from sigma_max down in the others."""
        g = self.grid
        of_grid = karras_sigma((self.dsm_span * uniform).double(), g.sigma_min, g.sigma_max, g.rho).float()
        return torch.where(first, (LOG_MEAN + LOG_STD * normal).exp(), of_grid)

    def draw(self, x0: Tensor, random: StepRandom, dsm: bool) -> TrajectoryDraw:
        """A draw for images x0 (B, C, ...); its order does not depend on the ranks."""
        shape = tuple(x0.shape[1:])
        n = self.steps(batch_number(random))
        index = random.randint(0, self.points - n)
        left = self.points - index - n  # of the points from u on
        end = index + n + (random.uniform() * left).long().minimum(left - 1)
        drawn = {"noise": random.noise(shape), "index": index, "heun_steps": n}
        if dsm:
            first = random.rows() < random.global_batch // 2
            drawn["level"] = self.dsm_levels(random.normal(), random.uniform(), first)
            drawn["level_noise"] = random.noise(shape)
        t, s = self.level(index), self.level(end)
        return TrajectoryDraw(t=t, r=s, weight=torch.ones_like(t), **drawn)


class TrajectoryObjective(Objective):
    """CTM's loss without its adversarial part. dsm: weight of denoising score matching; adaptive: times lambda.

    inner: who jumps from u to s: `student`, `target`, or `none` where s = u is compared at once. needs_teacher False:
    the target network jumps from t to u, in one step or (iterate) by those of the grid.
    """

    needs_target = True

    def __init__(
        self,
        schedule: EmaAndScales,
        distance: Distance,
        weight: Weight,
        *,
        law: TrajectoryGrid,
        distillation: bool,
        dsm: float = 1.0,
        adaptive: bool = True,
        inner: str = "student",
        iterate: bool = False,
        sigma_data: float = 0.5,
    ):
        self.schedule = schedule
        self.distance = distance
        self.weight = weight
        self.law = law
        self.needs_teacher = distillation
        self.dsm = dsm
        self.adaptive = adaptive
        self.inner = inner
        self.iterate = iterate
        self.sigma_data = sigma_data

    def draw(self, x0: Tensor, step: int, random: StepRandom) -> TrajectoryDraw:
        draw = self.law.draw(x0, random, self.dsm > 0)
        if self.inner == "none":
            return replace(draw, r=self.law.level(draw.index + draw.heun_steps))
        return draw

    def forward(
        self, roles: Roles, x0: Tensor, draw: TrajectoryDraw, step: int, **cond: Tensor
    ) -> dict[str, Tensor]:
        if self.needs_teacher != (roles.teacher is not None) or roles.target is None:
            raise ValueError("CTM needs a target network, and a teacher unless it learns from itself")
        consistency = self.consistency(roles, x0, draw, **cond)
        if self.dsm == 0:
            return {"loss": consistency}
        noisy = x0 + draw.level_noise * append_dims(draw.level, x0.ndim)
        denoised = roles.student(noisy, draw.level, draw.level, **cond)
        d2, l2 = self.sigma_data**2, draw.level**2
        matching = mean_flat((denoised - x0).square()) * (l2 + d2) / (l2 * d2)
        scale = self.dsm * torch.ones_like(matching[0])
        if self.adaptive:
            scale = scale * balance(consistency.mean(), matching.mean(), last_weight(roles.student.net))
        loss = consistency + scale * matching
        return {
            "loss": loss,
            "consistency": consistency,
            "matching": matching,
            "matching_weight": scale.expand(len(loss)),
        }

    def consistency(self, roles: Roles, x0: Tensor, draw: TrajectoryDraw, **cond: Tensor) -> Tensor:
        """w d(G-(student's jump), G-(the other way)) per sample, both at the lowest level.

        The gradient passes through the student's jump, and through the input of the target network's. All jumps drop
        out under the same masks, as student and target do in the other objectives.
        """
        t, s = draw.t, draw.r
        lowest = torch.full_like(t, self.law.grid.sigma_min)
        x_t = x0 + draw.noise * append_dims(t, x0.ndim)
        masks = rng_state(x0.device)

        def jump(model: FlowMap, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            with replayed_rng(x0.device, masks):
                return jumped(model, x, t, s, **cond)

        estimate = jumped(roles.student, x_t, t, s, **cond)
        with torch.no_grad():
            u, x_s = self._to_u(roles, x_t, draw, jump, **cond)
            if self.inner != "none":
                x_s = jump(bare(roles.student) if self.inner == "student" else roles.target, x_s, u, s)
            target = jump(roles.target, x_s, s, lowest)
        estimate = jump(roles.target, estimate, s, lowest)
        return self.distance(estimate, target) * self.weight(t, s)

    def _to_u(
        self, roles: Roles, x: Tensor, draw: TrajectoryDraw, jump: Callable[..., Tensor], **cond: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(u (B,), the point there) on the trajectory through x at t."""
        index, n = draw.index, draw.heun_steps
        end = self.law.level(index + n)
        if roles.teacher is None and not self.iterate:
            return end, jump(roles.target, x, draw.t, end)
        for k in range(n):
            t, r = (self.law.level(index + k + shift) for shift in (0, 1))
            if roles.teacher is None:
                x = jump(roles.target, x, t, r)
            else:
                x = heun_step(lambda x, t: roles.teacher(x, t, **cond), x, t, r)
        return end, x

    def target_decay(self, step: int) -> float:
        return self.schedule(step)[0]

    def num_scales(self, step: int) -> int:
        return self.law.points


def last_weight(net: nn.Module) -> Tensor:
    """The weight of a network's last layer: of its parameters the last one that is no vector."""
    named = [(n.removeprefix("module."), p) for n, p in net.named_parameters()]
    return [p for n, p in named if p.ndim > 1 and "logvar" not in n and not n.startswith(LOSS_MODULE)][-1]


def balance(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """|d first / d weight| / (|d second / d weight| + 1e-4), at most 1e4, without gradient.

    Of the rows of one pass: micro-batches and ranks have weights of their own.
    """
    a, b = (
        torch.autograd.grad(loss, weight, retain_graph=True)[0].float().norm() for loss in (first, second)
    )
    return (a / (b + SMALL)).clamp(0, LARGEST).detach()


def trajectories(config: Any) -> Objective:
    """Rows ctm and ctm_training (self-learning)."""
    distillation = distils(config)
    if config.dsm_adaptive and config.dsm_weight and getattr(config, "shard", "none") == "fsdp":
        raise UserError(
            "--shard fsdp leaves no rank the whole weight by whose gradients --dsm_adaptive True weighs the losses: "
            "give --dsm_adaptive False or --shard optimizer"
        )
    return TrajectoryObjective(
        schedule_of(config),
        distance_of(config),
        weight_of(config),
        law=TrajectoryGrid(grid_of(config), config.start_scales, config.max_teacher_steps),
        distillation=distillation,
        dsm=config.dsm_weight,
        adaptive=config.dsm_adaptive,
        inner=config.target_jump,
        iterate=not distillation and config.iterate,
        sigma_data=config.sigma_data,
    )
