"""Curricula of consistency models: grid points N(k), target decay mu(k), stages of progressive distillation.

Pure functions of the training step in plain Python.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from cm.config.rules import check_scales
from cm.errors import UserError


def num_scales_progressive(step: int, start: int, end: int, total: int) -> int:
    """N(k) of consistency training (Song et al. 2023, App. C): grid points at step k.

    N(k) = ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) + 1, with k clamped to K so that it never passes s1 + 1.
    """
    progress = min(max(step, 0), total) / total
    root = math.sqrt(progress * ((end + 1) ** 2 - start**2) + start**2)
    return max(math.ceil(root - 1), 1) + 1


def num_scales_doubling(step: int, start: int, end: int, total: int) -> int:
    """N(k) of improved consistency training (Song & Dhariwal 2023, Eq. 10): s0, 2 s0, 4 s0 ... intervals, at most s1.

    N(k) = min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (log2 floor(s1 / s0) + 1)).
    """
    length = max(math.floor(total / (math.log2(end // start) + 1)), 1)
    doublings = min(max(step, 0) // length, end.bit_length())
    return min(start << doublings, end) + 1


@dataclass(frozen=True)
class Ratio:
    """step -> r / t of far noise levels, 1 - q^-(s+1) at stage s (Geng et al. 2024, section 3), at most `limit`.

    interval: steps of a stage; 0: there is one.
    """

    q: float = 2.0
    interval: int = 25000
    limit: float = 1.0

    def __call__(self, step: int) -> float:
        stage = step // self.interval if self.interval else 0
        return min(1 - self.q ** -(stage + 1.0), self.limit)


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
        check_scales(self)
        if (self.target_ema_mode, self.scale_mode) not in MODES:
            known = ", ".join(f"{t}+{s}" for t, s in MODES)
            raise UserError(
                f"--target_ema_mode {self.target_ema_mode} with --scale_mode {self.scale_mode} is not defined "
                f"(known: {known})"
            )
        if self.scale_mode == "progdist" and self.distill_steps_per_iter < 1:
            raise UserError(f"--distill_steps_per_iter must be positive, got {self.distill_steps_per_iter}")
        if self.scale_mode in NUM_SCALES and self.total_steps < 1:
            raise UserError(f"--total_training_steps must be positive, got {self.total_steps}")

    @property
    def copies_student(self) -> bool:
        """mu is 0 at every step: the target network is the student."""
        return self.target_ema_mode == "fixed" and self.start_ema == 0 and self.scale_mode != "progdist"

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
        return NUM_SCALES[self.scale_mode](step, self.start_scales, self.end_scales, self.total_steps)


# scale_mode -> N(k) of (step, s0, s1, K)
NUM_SCALES: dict[str, Callable[[int, int, int, int], int]] = {
    "progressive": num_scales_progressive,
    "doubling": num_scales_doubling,
}
# (target_ema_mode, scale_mode) -> how both are computed
MODES: dict[tuple[str, str], Callable[[EmaAndScales, int], tuple[float, int]]] = {
    ("fixed", "fixed"): EmaAndScales._fixed,
    ("fixed", "progressive"): EmaAndScales._progressive,
    ("fixed", "doubling"): EmaAndScales._progressive,
    ("adaptive", "progressive"): EmaAndScales._adaptive,
    ("fixed", "progdist"): EmaAndScales._progdist,
}
