"""Diffusion as Salimans & Ho 2022 write it: z_t = alpha_t x + sigma_t e with t in [0, 1].

Dividing by alpha_t gives x + level_t e with level = sigma / alpha, the state of the rest of this library.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cm.config.choices import DIFFUSION_SCHEDULES
from cm.diffusion.noise_schedules import NoiseSchedule
from cm.nn import alike, append_zero

# Stands for alpha = 1 among DIFFUSION_SCHEDULES, whose other rows keep alpha^2 + sigma^2 = 1
VARIANCE_EXPLODING = None


@dataclass(frozen=True)
class AlphaSigma:
    """A schedule by name, between the noise levels sigma_min at t = 0 and sigma_max at t = 1.

    cosine: level = tan(a t + b) (Salimans & Ho 2022, App. B with truncated log-SNR); vp: linear beta; both keep
    alpha^2 + sigma^2 = 1. ve: alpha = 1 and ln sigma linear in t.
    """

    name: str
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self):
        DIFFUSION_SCHEDULES[self.name]  # refuses unknown names at once

    @property
    def _preserving(self) -> NoiseSchedule | None:
        """sigma / alpha as a function of time where alpha^2 + sigma^2 = 1."""
        found = DIFFUSION_SCHEDULES.load(self.name)
        return found and found()

    def level(self, t: Tensor) -> Tensor:
        """sigma_t / alpha_t, increasing in t, float64."""
        t = t.double()
        if (schedule := self._preserving) is None:
            return alike(lambda t: self.sigma_min * (self.sigma_max / self.sigma_min) ** t, t)
        low, high = schedule.time(t.new_tensor([self.sigma_min, self.sigma_max]))
        return schedule.sigma(low + t * (high - low))

    def alpha(self, level: Tensor) -> Tensor:
        """alpha where sigma / alpha is `level`; sigma is alpha times level."""
        return torch.ones_like(level) if self._preserving is None else (1 + level**2).rsqrt()

    def sigma(self, position: Tensor, intervals: int) -> Tensor:
        """fp32 levels at t = 1 - position / intervals: the grid of progressive distillation, 0 = sigma_max."""
        return self.level(1 - position / intervals).float()

    def steps(self, intervals: int) -> Tensor:
        """The levels at t = 1, 1 - 1/N, ..., 0 and a final 0: what the sampler `progdist` expects."""
        return append_zero(self.sigma(torch.arange(intervals + 1), intervals))
