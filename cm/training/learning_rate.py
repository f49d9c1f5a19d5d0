"""Learning rates as functions of the step."""

from dataclasses import dataclass

from cm.config.choices import LR_SCHEDULES
from cm.errors import UserError


def constant(step: int, total: int) -> float:
    """1 at every step: the rate stays."""
    return 1.0


def linear_to_zero(step: int, total: int) -> float:
    """1 - k/K, never below 0."""
    return max(1.0 - step / total, 0.0)


def late_decay(step: int, total: int) -> float:
    """Flat for the first fifth, then linear to a tenth: clamp(1.25 (1 - k/K), 0.1, 1); for short runs."""
    return min(1.0, max(0.1, 1.25 * (1.0 - step / total)))


def inverse_sqrt(step: int, total: int) -> float:
    """1 / sqrt(max(k / K, 1)): flat for K steps, then falling without end (EDM2, Karras et al. 2024)."""
    return max(step / total, 1.0) ** -0.5


@dataclass(frozen=True)
class LearningRate:
    """step -> learning rate: a named decay over `total` steps times a linear warm-up."""

    base: float
    schedule: str = "constant"
    total: int = 0
    warmup: int = 0

    def __post_init__(self):
        LR_SCHEDULES[self.schedule]  # refuses unknown names at once
        if self.schedule != "constant" and self.total < 1:
            raise UserError(f"--lr_schedule {self.schedule} needs a number of steps to decay over")

    def __call__(self, step: int, total: int | None = None) -> float:
        """Rate for step k; `total` replaces the decay length (stages of progressive distillation)."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.base * warm * LR_SCHEDULES.load(self.schedule)(step, total or self.total)
