"""Where a student's error comes from: its distance to the end of the teacher's trajectory from each of its levels."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cm.commands.cli import parse
from cm.config.derived import lowest_level
from cm.config.scripts import SampleConfig
from cm.diffusion.denoiser import DenoiseFn
from cm.diffusion.grid import karras_sigmas
from cm.models.pretrained import Pretrained, load_pretrained
from cm.objectives.consistency import heun_step
from cm.storage.filesystem import write_atomic

COUNT, STEPS, SEED = 256, 18, 2000
SHOWN = (0, 5, 8, 10, 12, 14)  # of the levels, in the table: 80 to 0.06


def load_model(path: Path) -> Pretrained[SampleConfig]:
    """A model on the CPU."""
    return load_pretrained(parse(SampleConfig, ["--model_path", str(path), "--device", "cpu"]))


def denoiser_of(model: Pretrained[SampleConfig]) -> DenoiseFn:
    """As it was trained, without clamping, for COUNT images whose classes come in turn."""
    labels = torch.arange(COUNT) % model.config.num_classes
    return model.denoise(labels, clip=False)


@torch.no_grad()
def trajectory(denoise: DenoiseFn, shape: tuple[int, ...], sigmas: Tensor) -> Tensor:
    """Heun's steps from noise: x (levels, COUNT, *shape) at every level, the last one being 0."""
    generator = torch.Generator().manual_seed(SEED)
    levels = sigmas.float()
    points = [levels[0] * torch.randn(COUNT, *shape, generator=generator)]
    for t, r in pairwise(levels):
        points.append(heun_step(denoise, points[-1], t.expand(COUNT), r.expand(COUNT)))
    return torch.stack(points)


def fine(images: Tensor) -> float:
    """Root mean square of what a mean over 3 x 3 pixels takes away: edges, and speckle."""
    return float((images - F.avg_pool2d(images, 3, 1, 1)).square().mean().sqrt())


@torch.no_grad()
def errors_by_level(teacher: Path, student: Path, cache: Path) -> dict[str, Any]:
    """Of f(x_i, sigma_i) along the teacher's trajectory x_i: distance to its end, and fine structure.

    Down to the lowest level that the student knows.
    cache: npz of the trajectory, made where there is none.
    """
    model = load_model(student)
    c = model.config
    sigmas = karras_sigmas(STEPS, c.sigma_min, c.sigma_max, c.rho)
    if not cache.exists():
        shape = (c.in_channels, c.image_size, c.image_size)
        made = trajectory(denoiser_of(load_model(teacher)), shape, torch.cat([sigmas, torch.zeros(1)]))
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cache, lambda file: np.savez(file, points=made.numpy()))
    with np.load(cache, allow_pickle=False) as arrays:
        points = torch.from_numpy(arrays["points"])
    end, denoise, rows = points[-1], denoiser_of(model), []
    for sigma, x in zip(sigmas.float(), points):
        if sigma < lowest_level(c):
            break
        ended = denoise(x, sigma.expand(COUNT))
        distance = float((ended - end).square().mean().sqrt())
        rows.append({"sigma": float(sigma), "distance": distance, "fine": fine(ended)})
    return {"levels": rows, "end": {"fine": fine(end)}}


def levels_table(results: Mapping[str, dict[str, Any]], titles: Mapping[str, str]) -> list[str]:
    """Markdown. results: method -> what errors_by_level found."""
    if not results:
        return []
    every = max((found["levels"] for found in results.values()), key=len)
    names = [f"from {every[i]['sigma']:.2g}" for i in SHOWN if i < len(every)]
    lines = ["| model | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for method, found in results.items():
        rows = [found["levels"][i] if i < len(found["levels"]) else None for i in SHOWN[: len(names)]]
        cells = [f"{row['distance']:.3f} / {row['fine']:.3f}" if row else "" for row in rows]
        lines.append(f"| {titles[method]} | " + " | ".join(cells) + " |")
    return lines
