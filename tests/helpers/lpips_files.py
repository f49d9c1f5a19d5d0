"""The two weights files of LPIPS, made by the rule of the golden files or small ones of noise."""

import numpy as np
import torch
from torch import Tensor

from cm.objectives.lpips import FEATURES, LINEAR_FILE, VGG_FILE

# Convolutions of VGG16 by their position in torchvision's stack: channels in, channels out.
CONVOLUTIONS = {
    0: (3, 64),
    2: (64, 64),
    5: (64, 128),
    7: (128, 128),
    10: (128, 256),
    12: (256, 256),
    14: (256, 256),
    17: (256, 512),
    19: (512, 512),
    21: (512, 512),
    24: (512, 512),
    26: (512, 512),
    28: (512, 512),
}


def write_golden_files(folder) -> None:
    """Files with the weights of tests/golden/loss_lpips.npz (rule in tests/golden/README.md)."""
    state = {}
    for i, (position, (channels, width)) in enumerate(CONVOLUTIONS.items()):
        draw = np.random.RandomState(5000 + 2 * i).standard_normal((width, channels, 3, 3))
        state[f"features.{position}.weight"] = torch.tensor(
            draw * np.sqrt(2 / (9 * channels)), dtype=torch.float32
        )
        draw = np.random.RandomState(5001 + 2 * i).standard_normal(width)
        state[f"features.{position}.bias"] = torch.tensor(0.05 * draw, dtype=torch.float32)
    linear = [
        torch.tensor(np.random.RandomState(6000 + j).uniform(size=(1, channels, 1, 1)), dtype=torch.float32)
        for j, channels in enumerate(FEATURES.values())
    ]
    _write(folder, state, linear)


def write_small_files(folder) -> None:
    """Files of 0.3 MB: all convolutions are windows of one short piece of noise, which torch stores once."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 16, generator=generator)
    state = {}
    for position, (channels, width) in CONVOLUTIONS.items():
        scale = (2 / (9 * channels)) ** 0.5
        step = (len(noise) - 9 * channels) // width
        state[f"features.{position}.weight"] = (noise * scale).as_strided(
            (width, channels, 3, 3), (step, 9, 3, 1)
        )
        state[f"features.{position}.bias"] = torch.zeros(width)
    _write(folder, state, [torch.rand(1, c, 1, 1, generator=generator) for c in FEATURES.values()])


def _write(folder, state: dict[str, Tensor], linear: list[Tensor]) -> None:
    # The classifier of a real file is not needed; it is there as one number.
    torch.save(state | {"classifier.0.weight": torch.zeros(1).expand(4096, 25088)}, folder / VGG_FILE)
    torch.save(linear, folder / LINEAR_FILE)
