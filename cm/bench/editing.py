"""What an edit costs beside the network: the operators of Algorithm 4 against one network evaluation.

python -m cm.bench.editing [PRESET]     the network of a preset, default bedroom256_cd_lpips (256 pixels)
"""

import sys
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


def main(argv: list[str]) -> None:
    """Print the share of each operator for the network of a preset, with random weights and a batch of one."""
    from cm.cli import parse_config
    from cm.config import SampleConfig
    from cm.denoiser import Denoiser
    from cm.factory import choose_device, create_network, create_precond

    config = parse_config(SampleConfig, ["--preset", argv[0] if argv else "bedroom256_cd_lpips"])
    device = choose_device(config.device)
    network = create_network(config).to(device).eval()
    cond = {"y": torch.zeros(1, dtype=torch.int64, device=device)} if config.class_cond else {}
    denoiser = Denoiser(network, create_precond(config, consistency=True))
    images = torch.randn(1, config.in_channels or 3, config.image_size, config.image_size, device=device)
    cost = edit_cost(lambda x, sigma: denoiser(x, sigma, **cond), images, repeats=1)
    print(f"{config.preset}, {device}: network {cost.network:.3f} s")
    for name, seconds in cost.operators.items():
        print(f"{name}: {seconds:.6f} s, {cost.share(name):.4%} of the network")


if __name__ == "__main__":
    main(sys.argv[1:])
