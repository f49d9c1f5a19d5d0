"""Precisions of a network's torso by name."""

import torch

from cm.config.choices import PRECISIONS


def torso_dtype(precision: str) -> torch.dtype:
    """dtype by its flag value: fp32, fp16 or bf16."""
    return PRECISIONS.load(precision)
