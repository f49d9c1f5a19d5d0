"""Edited pictures at the size that they came with: --resize True crops and shrinks them, this puts results back."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from cm.data.images import from_uint8, to_uint8
from cm.sampling.editing import luma


def paste_back(original: np.ndarray, result: Tensor, task: str, mask: Tensor | None = None) -> np.ndarray:
    """The original uint8 (H, W, C) with its central square edited; result (C, side, side) in [-1, 1].

    In-painting (mask (side, side), 1 = known) leaves what is known as it was, colourisation the luma of every pixel;
    other tasks replace the square.
    """
    height, width = original.shape[:2]
    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    pasted = original.copy()
    window = pasted[top : top + square, left : left + square]
    size = (square, square)
    large = F.interpolate(result[None].float(), size, mode="bicubic", antialias=True, align_corners=False)
    if task == "colorize":
        large = luma(from_uint8(window[None])) + large - luma(large)
    edited = to_uint8(large.clamp(-1, 1))[0].numpy()
    if mask is not None:
        known = F.interpolate(mask.float()[None, None], size, mode="nearest-exact")[0, 0].bool()
        edited = np.where(known[..., None].numpy(), window, edited)
    window[...] = edited
    return pasted
