"""Schedules: the Karras noise grid, N(k), mu(k), stages of progressive distillation, learning rates.

The noise grid returns float64 tensors; everything else is a pure function of the step in plain Python.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cm.config.rules import check_scales
from cm.errors import UserError


def karras_sigma(u: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise level at grid position u in [0, 1] (EDM, Karras et al. 2022, Eq. 5; 0 is sigma_max).

    sigma(u) = (sigma_max^(1/rho) + u (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, in float64, exact at both ends.
    """
    u = u.to(torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigma = (high + u * (low - high)) ** rho
    sigma = torch.where(u == 0, sigma_max, sigma)
    return torch.where(u == 1, sigma_min, sigma)


def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Decreasing grid of n noise levels from sigma_max to sigma_min, float64 (n,); n = 1 is sigma_max alone."""
    if n < 1:
        raise ValueError(f"the noise grid needs at least 1 point, got {n}")
    return karras_sigma(torch.linspace(0, 1, n, dtype=torch.float64), sigma_min, sigma_max, rho)


def num_scales_progressive(step: int, start: int, end: int, total: int) -> int:
    """N(k) of consistency training (Song et al. 2023, App. C): grid points at step k.

    N(k) = ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1, with k clamped to K so that it never passes s1 + 1.
    """
    progress = min(max(step, 0), total) / total
    root = math.sqrt(progress * ((end + 1) ** 2 - start**2) + start**2)
    return max(math.ceil(root - 1), 1) + 1


def mu_adaptive(num_scales: int, start_ema: float, start_scales: int, printed: bool = False) -> float:
    """mu(k) of consistency training (Song et al. 2023, App. C): decay of the target network.

    mu = exp(s0 ln(mu0) / (N(k) - 1)), as the released models were trained; `printed` divides by N(k), as in the paper.
    """
    return math.exp(start_scales * math.log(start_ema) / (num_scales if printed else num_scales - 1))


@dataclass(frozen=True)
class Stage:
    """One stage of progressive distillation: steps start .. start+length-1 with num_scales intervals."""

    index: int
    start: int
    length: int
    num_scales: int


def progdist_stage(step: int, start_scales: int, stage_length: int) -> Stage:
    """Stage that `step` belongs to: intervals halve every stage_length steps.

    The stages with 2 and 1 intervals last twice as long (Salimans & Ho 2022, App. D). The last stage goes on for
    ever: `total_training_steps` ends it. start_scales is a power of two.
    """
    halvings = int(math.log2(start_scales))
    long_from = max(halvings - 1, 0)  # index of the first double-length stage
    index = step // stage_length
    if index < long_from:
        return Stage(index, index * stage_length, stage_length, start_scales >> index)
    start = long_from * stage_length
    index = min(long_from + (step - start) // (2 * stage_length), halvings)
    start += (index - long_from) * 2 * stage_length
    return Stage(index, start, 2 * stage_length, start_scales >> index)


def progdist_steps(start_scales: int, stage_length: int) -> int:
    """Steps after which the one-interval stage is complete: the natural end of progressive distillation."""
    last = progdist_stage(10**15, start_scales, stage_length)
    return last.start + last.length


@dataclass(frozen=True)
class EmaAndScales:
    """step -> (decay of the target network, number of grid points), the pair that a consistency loss needs."""

    target_ema_mode: str
    start_ema: float
    scale_mode: str
    start_scales: int
    end_scales: int
    total_steps: int
    distill_steps_per_iter: int
    printed_mu: bool = False

    def __post_init__(self):
        check_scales(
            target_ema_mode=self.target_ema_mode,
            start_ema=self.start_ema,
            scale_mode=self.scale_mode,
            start_scales=self.start_scales,
            end_scales=self.end_scales,
        )
        if (self.target_ema_mode, self.scale_mode) not in MODES:
            known = ", ".join(f"{t}+{s}" for t, s in MODES)
            raise UserError(
                f"--target_ema_mode {self.target_ema_mode} with --scale_mode {self.scale_mode} is not defined "
                f"(known: {known})"
            )
        if self.scale_mode == "progdist" and self.distill_steps_per_iter < 1:
            raise UserError(f"--distill_steps_per_iter must be positive, got {self.distill_steps_per_iter}")
        if self.scale_mode == "progressive" and self.total_steps < 1:
            raise UserError(f"--total_training_steps must be positive, got {self.total_steps}")

    def __call__(self, step: int) -> tuple[float, int]:
        return MODES[self.target_ema_mode, self.scale_mode](self, step)

    def _fixed(self, step: int) -> tuple[float, int]:
        return float(self.start_ema), int(self.start_scales)

    def _progressive(self, step: int) -> tuple[float, int]:
        return float(self.start_ema), self._num_scales(step)

    def _adaptive(self, step: int) -> tuple[float, int]:
        num_scales = self._num_scales(step)
        return mu_adaptive(num_scales, self.start_ema, self.start_scales, self.printed_mu), num_scales

    def _progdist(self, step: int) -> tuple[float, int]:
        return 1.0, progdist_stage(step, self.start_scales, self.distill_steps_per_iter).num_scales

    def _num_scales(self, step: int) -> int:
        return num_scales_progressive(step, self.start_scales, self.end_scales, self.total_steps)


# (target_ema_mode, scale_mode) -> how both are computed
MODES: dict[tuple[str, str], Callable[[EmaAndScales, int], tuple[float, int]]] = {
    ("fixed", "fixed"): EmaAndScales._fixed,
    ("fixed", "progressive"): EmaAndScales._progressive,
    ("adaptive", "progressive"): EmaAndScales._adaptive,
    ("fixed", "progdist"): EmaAndScales._progdist,
}


def constant(step: int, total: int) -> float:
    """Factor 1."""
    return 1.0


def linear_to_zero(step: int, total: int) -> float:
    """1 - k/K, never below 0."""
    return max(1.0 - step / total, 0.0)


def late_decay(step: int, total: int) -> float:
    """Flat for the first fifth, then linear to a tenth: clamp(1.25 (1 - k/K), 0.1, 1); for short runs."""
    return min(1.0, max(0.1, 1.25 * (1.0 - step / total)))


LEARNING_RATES: dict[str, Callable[[int, int], float]] = {
    "constant": constant,
    "linear": linear_to_zero,
    "late_decay": late_decay,
}


@dataclass(frozen=True)
class LearningRate:
    """step -> learning rate: a named decay over `total` steps times a linear warm-up."""

    base: float
    schedule: str = "constant"
    total: int = 0
    warmup: int = 0

    def __post_init__(self):
        if self.schedule not in LEARNING_RATES:
            raise UserError(f"--lr_schedule must be one of {', '.join(LEARNING_RATES)}, got {self.schedule}")
        if self.schedule != "constant" and self.total < 1:
            raise UserError(f"--lr_schedule {self.schedule} needs a number of steps to decay over")

    def __call__(self, step: int, total: int | None = None) -> float:
        """Rate for step k; `total` replaces the decay length (stages of progressive distillation)."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.base * warm * LEARNING_RATES[self.schedule](step, total or self.total)
