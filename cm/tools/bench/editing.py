"""What an edit costs beside the network: the operators of Algorithm 4 against one network evaluation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cm.sampling.editing import LinearEdit, colorize, inpaint, superres
from cm.tools.profiling.timing import Timing, interleaved


@dataclass(frozen=True)
class EditCost:
    """Times per batch: of one network evaluation, and of each operator's projection, which follows it."""

    network: Timing
    operators: dict[str, Timing]

    def share(self, name: str) -> float:
        """Operator's median time over the network's."""
        return self.operators[name].median / self.network.median


def edit_cost(
    denoiser: Callable[[Tensor, Tensor], Tensor], images: Tensor, *, factor: int = 8, repeats: int = 5
) -> EditCost:
    """Times of denoiser(x, sigma) and of every operator at the shape and on the device of the images.

    images (B, C, H, W) with sides that `factor` divides; colourisation is measured for 3 channels.
    """
    known = (torch.arange(images.shape[-1], device=images.device) < images.shape[-1] // 2).float()
    edits: dict[str, LinearEdit] = {"inpaint": inpaint(known), "superres": superres(factor)}
    if images.shape[1] == 3:
        edits["colorize"] = colorize()
    noise = torch.randn_like(images)
    sigma = torch.ones(len(images), device=images.device)
    projections = {name: lambda e=edit: e.project(images, noise) for name, edit in edits.items()}
    with torch.no_grad():
        evaluation = {"network": lambda: denoiser(noise, sigma)}
        network = interleaved(evaluation, images.device, warmup=1, repeats=repeats)["network"]
        return EditCost(network, interleaved(projections, images.device, warmup=1, repeats=4 * repeats))
