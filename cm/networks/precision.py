"""Precisions of a network's torso by name."""

import torch

from cm.errors import UserError

# --precision: dtype of the network's torso
PRECISIONS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def torso_dtype(precision: str) -> torch.dtype:
    """dtype by its flag value."""
    if precision not in PRECISIONS:
        raise UserError(f"--precision must be one of {', '.join(PRECISIONS)}, got {precision}")
    return PRECISIONS[precision]
