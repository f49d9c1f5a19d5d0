"""The blocks of a network: what --shard fsdp gathers at a time, and the planner counts."""

from torch import nn


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: residual and attention blocks, and layers beside them in lists."""
    found: list[nn.Module] = []

    def descend(module: nn.Module, listed: bool) -> None:
        for child in module.children():
            parts = [part for part in child.children() if any(True for _ in part.children())]
            if isinstance(child, nn.ModuleList | nn.ModuleDict) or (
                isinstance(child, nn.Sequential) and (listed or parts)
            ):
                descend(child, True)
            elif listed and any(p.ndim > 1 for p in child.parameters()):
                found.append(child)

    descend(network, False)
    return found
