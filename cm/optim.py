"""Optimizers by flag value."""

from collections.abc import Iterable

import torch
from torch import Tensor

from cm.errors import UserError

# --optimizer
OPTIMIZERS = {
    "radam": torch.optim.RAdam,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def make_optimizer(
    name: str,
    params: Iterable[Tensor],
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Optimizer with multi-tensor kernels; RAdam without warm-up is what all released models used."""
    if name not in OPTIMIZERS:
        raise UserError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {name}")
    if lr < 0:
        raise UserError(f"--lr must not be negative, got {lr}")
    return OPTIMIZERS[name](params, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, foreach=True)
