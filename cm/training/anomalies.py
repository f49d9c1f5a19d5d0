"""NaN guard: steps that are not finite are skipped and explained, too many end the run; loss spikes are warned of."""

import statistics
from collections import deque

import torch
from torch import Tensor

from cm.errors import BadNumbers
from cm.runtime import distributed, logger
from cm.training.mixed_precision import MIN_LG_LOSS_SCALE
from cm.training.state import TrainState

# A logged mean this many times above the running median of the last rows is a spike.
SPIKE = 10.0
ROWS, LEAST_ROWS = 50, 10
WATCHED = ("loss", "grad_norm")


class NanGuard:
    """Watches losses and gradients. Every rank calls every method, with its own rows."""

    def __init__(self, max_bad_steps: int):
        self.max_bad_steps = max_bad_steps
        self.forget()

    def forget(self) -> None:
        """Losses before now say nothing of those to come (a new stage of distillation)."""
        self._rows = {name: deque(maxlen=ROWS) for name in WATCHED}
        self._spiking: set[str] = set()

    def skipped(self, state: TrainState, x0: Tensor, t: Tensor, losses: Tensor) -> None:
        """Log why the step was skipped; BadNumbers after max_bad_steps in a row.

        x0, t and losses (B, ...): this rank's images, noise levels and losses of the step.
        """
        cause = cause_of_skip(state, x0, t, losses)
        logger.warn(f"warning: step {state.step} skipped: {cause}")
        if state.bad_steps >= self.max_bad_steps:
            raise BadNumbers(
                f"{state.bad_steps} steps in a row had no finite gradients, the last at step {state.step}: {cause}; "
                f"{advice(state)}, or raise --max_bad_steps"
            )

    def check_trained(self, state: TrainState) -> None:
        """BadNumbers at the end of a run in which no step had finite gradients: its weights are the first ones."""
        if 0 < state.skipped == state.step:
            raise BadNumbers(
                f"none of the {state.step} steps had finite gradients: nothing was learned; {advice(state)}"
            )

    def watch(self, step: int, row: dict[str, float]) -> None:
        """Warn once when the loss or the gradient norm of a logged row rises far above its running median."""
        for name in WATCHED:
            value, rows = row.get(name), self._rows[name]
            if value is None:
                continue
            median = statistics.median(rows) if len(rows) >= LEAST_ROWS else float("inf")
            if value > SPIKE * median and name not in self._spiking:
                logger.warn(
                    f"warning: {name} {value:.4g} at step {step} is {value / median:.0f} times its median of the last "
                    f"{len(rows)} rows: training may be diverging"
                )
                self._spiking.add(name)
            elif value <= SPIKE * median:
                self._spiking.discard(name)
            rows.append(value)


def cause_of_skip(state: TrainState, x0: Tensor, t: Tensor, losses: Tensor) -> str:
    """What was not finite in a step: images, losses (at which noise levels, on any rank) or only gradients."""
    bad = ~torch.isfinite(losses)
    mine = (t[bad].tolist(), len(losses), bool(torch.isfinite(x0).all()))
    everyone = distributed.all_gather_object(mine)
    levels = [level for part, _, _ in everyone for level in part]
    scale = f"; loss scale 2^{state.student.lg_loss_scale:g}" if state.student.use_fp16 else ""
    if not all(finite for _, _, finite in everyone):
        return f"images that are not finite{scale}"
    if not levels:
        return f"finite losses, but gradients that are not{scale}"
    total = sum(count for _, count, _ in everyone)
    where = f"at noise levels {min(levels):.4g} to {max(levels):.4g}"
    return f"{len(levels)} of {total} losses not finite, {where}{scale}"


def advice(state: TrainState) -> str:
    """What to try against steps that are not finite."""
    if not all(bool(torch.isfinite(p).all()) for p in state.student.master_params):
        return "the weights themselves are not finite: go on from an earlier checkpoint with a lower --lr"
    if state.student.use_fp16 and state.student.lg_loss_scale <= MIN_LG_LOSS_SCALE:
        return "the loss scale has reached its floor: use --precision bf16"
    return "lower --lr, use --grad_clip" + (" or --precision bf16" if state.student.use_fp16 else "")
