"""What an edit costs beside the network: the operators of Algorithm 4 against one network evaluation."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cm.editing import LinearEdit, colorize, inpaint, superres


@dataclass(frozen=True)
class EditCost:
    """Seconds per batch: of one network evaluation, and of each operator's projection, which follows it."""

    network: float
    operators: dict[str, float]

    def share(self, name: str) -> float:
        """Operator's time over the network's."""
        return self.operators[name] / self.network


def edit_cost(
    denoiser: Callable[[Tensor, Tensor], Tensor], images: Tensor, *, factor: int = 8, repeats: int = 5
) -> EditCost:
    """Median times of denoiser(x, sigma) and of every operator at the shape and on the device of the images.

    images (B, C, H, W) with sides that `factor` divides; colourisation is measured for 3 channels.
    """
    known = (torch.arange(images.shape[-1], device=images.device) < images.shape[-1] // 2).float()
    edits: dict[str, LinearEdit] = {"inpaint": inpaint(known), "superres": superres(factor)}
    if images.shape[1] == 3:
        edits["colorize"] = colorize()
    noise = torch.randn_like(images)
    sigma = torch.ones(len(images), device=images.device)
    with torch.no_grad():
        network = median_seconds(lambda: denoiser(noise, sigma), images.device, repeats)
        operators = {
            name: median_seconds(lambda e=edit: e.project(images, noise), images.device, 4 * repeats)
            for name, edit in edits.items()
        }
    return EditCost(network, operators)


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median duration of `run`, kernels on the device included, after one call that warms up."""
    durations = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - start)
    return sorted(durations[1:])[repeats // 2]
