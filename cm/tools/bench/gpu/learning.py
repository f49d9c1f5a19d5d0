"""A short run that learns: losses of an EDM teacher over minutes, on prepared images or on drawn discs."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from cm.tools.bench.precision import record_losses
from cm.tools.bench.runs import Options, description, train_config, training
from cm.tools.profiling.report import Row

WINDOWS = 24
NETWORK = (
    *("--image_size", "32", "--num_channels", "128", "--channel_mult", "1,2,2", "--num_res_blocks", "2"),
    *("--attention_resolutions", "16,8", "--num_head_channels", "64", "--batch_size", "128"),
    *("--precision", "bf16", "--lr", "3e-4"),
)
MARGIN = 20.0  # seconds for setting up, which count too
COUNT = 2048


def learn(device: str, data: str, *, seconds: float, tiny: bool) -> Iterator[Row]:
    """One row: the loss over the run in WINDOWS equal windows of steps. data: prepared images, or empty."""
    flags = (*(() if tiny else NETWORK), *(("--image_size", "16") if tiny and data else ()))
    config = train_config(Options("tiny", device, flags=flags), "edm")
    with TemporaryDirectory() as folder:
        source = data or discs(folder, config.image_size)
        losses: list[torch.Tensor] = []
        with training(replace(config, data_dir=source)) as trainer:
            record_losses(trainer, losses)
            start, end = time.monotonic(), 3.0 if tiny else max(seconds - MARGIN, 5.0)
            while time.monotonic() - start < end or trainer.state.step < WINDOWS:
                trainer.run_step(*next(trainer.data))
            curve = torch.stack(losses).float().cpu()
    means = [round(part.mean().item(), 5) for part in curve.tensor_split(WINDOWS)]
    figures = {"losses": means, "steps": len(curve), "first_over_last": means[0] / means[-1]}
    yield Row("learning/edm", description(config) | {"images": data or "discs"}, figures)


def discs(folder: str, side: int, count: int = COUNT) -> str:
    """An npz of images with one disc each: place, radius and both colours are random."""
    random = np.random.RandomState(0)
    y, x = np.mgrid[:side, :side]
    centre = random.uniform(0.25, 0.75, (count, 2, 1, 1)) * side
    radius = random.uniform(0.1, 0.3, (count, 1, 1)) * side
    inside = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2 < radius**2
    colours = random.randint(0, 256, (2, count, 1, 1, 3))
    images = np.where(inside[..., None], *colours).astype(np.uint8)
    path = str(Path(folder, "discs.npz"))
    np.savez(path, arr_0=images)
    return path
