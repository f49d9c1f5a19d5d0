"""Whether half precision trains alike: loss curves of the same draws in fp32, bf16 and fp16, laid over each other."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cm.config.choices import PRECISIONS
from cm.tools.bench.runs import Options, TrainConfig, description, train_cases, train_config, training
from cm.tools.profiling.report import Row
from cm.training.trainer import Trainer

STEPS = 200
WINDOWS = 10


def bench_precision(options: Options, steps: int = STEPS) -> list[Row]:
    """A row per objective and half precision: how far its losses are from those of fp32 over `steps` steps.

    The yardstick is a second fp32 run with other draws.
    """
    rows = []
    for case in train_cases(options):
        config = train_config(options, case)
        exact = losses(replace(config, precision="fp32"), steps)
        other = losses(replace(config, precision="fp32", seed=config.seed + 1), steps)
        for precision in PRECISIONS:
            if precision != "fp32":
                rough = losses(replace(config, precision=precision), steps)
                figures = overlay(exact, rough) | {"gap_of_other_draws": overlay(exact, other)["largest_gap"]}
                described = description(replace(config, precision=precision))
                rows.append(Row(f"precision/{case}/{precision}", described | {"steps": steps}, figures))
    return rows


def losses(config: TrainConfig, steps: int) -> Tensor:
    """The weighted mean loss of each of the first steps, (steps,) on the CPU."""
    kept: list[Tensor] = []
    with training(config) as trainer:
        record_losses(trainer, kept)
        for _ in range(steps):
            trainer.run_step(*next(trainer.data))
    return torch.stack(kept).float().cpu()


def record_losses(trainer: Trainer, kept: list[Tensor]) -> None:
    """Append the mean loss of every step to come; nothing is read from the device."""
    original = trainer.forward_backward

    def recording(batch: Tensor, cond: dict[str, Tensor]) -> tuple:
        draw, terms = original(batch, cond)
        kept.append((terms["loss"] * draw.weight).mean())
        return draw, terms

    trainer.forward_backward = recording


def overlay(exact: Tensor, rough: Tensor, windows: int = WINDOWS) -> dict[str, Any]:
    """Means of both curves over equal windows of steps, and the largest and mean relative gap between the means."""
    a, b = ([part.mean().item() for part in curve.chunk(windows)] for curve in (exact, rough))
    gaps = [abs(y - x) / abs(x) for x, y in zip(a, b, strict=True)]
    return {
        "fp32_losses": a,
        "losses": b,
        "largest_gap": max(gaps),
        "mean_gap": sum(gaps) / len(gaps),
    }
