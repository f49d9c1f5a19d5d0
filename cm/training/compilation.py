"""torch.compile: whether it works here, asked before a long run relies on it, and how networks are compiled."""

from collections.abc import Iterable

import torch
from torch import nn

from cm.runtime import distributed, logger


def can_compile(device: torch.device) -> bool:
    """Compile a tiny function for the device; on any rank's failure warn once and say no to all. Takes seconds."""
    problem = ""
    try:
        x = torch.ones(8, device=device)
        torch.compile(lambda x: torch.sin(x) + 1)(x).sum().item()
    except Exception as error:  # a missing compiler, Triton or Python header: each raises its own kind
        problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    problems = [text for text in distributed.all_gather_object(problem) if text]
    if problems:
        logger.warn(
            f"warning: --compile True: torch.compile does not work here, training goes on without ({problems[0]})"
        )
    return not problems


def compile_in_place(networks: Iterable[nn.Module]) -> None:
    """Compile the calls of networks at their first use; parameters and state dicts stay what they are."""
    import torch._inductor.config

    # The dropout masks of the uncompiled network, which student and target share.
    torch._inductor.config.fallback_random = True
    for network in networks:
        network.compile()
