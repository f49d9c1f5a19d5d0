"""EDM's denoising score matching, the objective of teachers (Karras et al. 2022, Eq. 8)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cm.config.rows import NOISE_LEVELS
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.noise_levels import NoiseSampler, ScheduleSampler, UniformTimeSampler
from cm.nn import append_dims, mean_flat
from cm.objectives.augmentation import augment
from cm.objectives.base import Draw, Objective, Roles
from cm.objectives.parts import alpha_sigma_of, weight_of
from cm.seeding import StepRandom


def edm_losses(
    student: Denoiser,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    weight: Callable[[Tensor], Tensor],
    uncertainty: bool = False,
    **cond: Tensor,
) -> dict[str, Tensor]:
    """lambda(t) mean (D(x0 + t noise; t) - x0)^2 per sample.

    uncertainty: lambda(t) mean(...) / e^u(t) + u(t), with u from the network's head (Karras et al. 2024, EDM2, Eq. 21);
    at its optimum every noise level has a loss of variance 1. Returns loss (weighted) and xs_mse (unweighted), (B,).
    """
    x_t = x0 + noise * append_dims(t, x0.ndim)
    if uncertainty:
        denoised, logvar = student.with_logvar(x_t, t, **cond)
    else:
        denoised = student(x_t, t, **cond)
    xs_mse = mean_flat((denoised - x0) ** 2)
    loss = weight(t) * xs_mse
    return {"loss": loss * (-logvar).exp() + logvar if uncertainty else loss, "xs_mse": xs_mse}


class EDMObjective(Objective):
    """Denoising score matching with noise levels from a sampler and a weighting lambda(sigma)."""

    def __init__(
        self,
        sampler: NoiseSampler,
        weight: Callable[[Tensor], Tensor],
        augment_probability: float = 0.0,
        uncertainty: bool = False,
    ):
        self.sampler = sampler
        self.weight = weight
        self.augment_probability = augment_probability
        self.uncertainty = uncertainty

    def prepare(
        self, x0: Tensor, cond: dict[str, Tensor], random: StepRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.augment_probability:
            return x0, cond
        x0, labels = augment(x0, random, self.augment_probability)
        return x0, {**cond, "augment_labels": labels}

    def draw(self, x0: Tensor, step: int, random: StepRandom) -> Draw:
        t, importance, index = self.sampler.draw(random)
        return Draw(t=t, noise=random.noise(tuple(x0.shape[1:])), weight=importance, index=index)

    def forward(self, roles: Roles, x0: Tensor, draw: Draw, step: int, **cond: Tensor) -> dict[str, Tensor]:
        return edm_losses(roles.student, x0, draw.t, draw.noise, self.weight, self.uncertainty, **cond)

    def observe(self, draw: Draw, losses: Tensor) -> None:
        if isinstance(self.sampler, ScheduleSampler):
            self.sampler.observe(draw.index, losses)

    def state_dict(self) -> dict[str, Tensor]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sampler.load_state_dict(state)


def denoising(config: Any) -> Objective:
    """Row edm: in x = x0 + sigma noise, or in z = alpha x + sigma e with --diffusion_schedule."""
    if (
        config.diffusion_schedule
    ):  # the same loss at sigma / alpha, at times that are uniform (Salimans & Ho 2022)
        sampler = UniformTimeSampler(alpha_sigma_of(config).level)
    else:
        sampler = NOISE_LEVELS.load(config.schedule_sampler)(config)
    return EDMObjective(sampler, weight_of(config), config.augment, config.uncertainty)
