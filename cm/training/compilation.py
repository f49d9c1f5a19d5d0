"""Settings of torch for a training run: device, deterministic algorithms, torch.compile."""

import contextlib
import os
from collections.abc import Iterable

import torch
from torch import nn

from cm.models.factory import choose_device
from cm.runtime import distributed, logger
from cm.runtime.cpu import keep_freed_memory


def configure_torch(device: str, *, deterministic: bool = False) -> torch.device:
    """Prepare this process for training; returns its device. device: auto, cpu or cuda."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    chosen = choose_device(device)
    if chosen.type == "cpu":
        keep_freed_memory()
    return chosen


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
            f"warning: torch.compile does not work here, training goes on without: {problems[0]} (--compile)"
        )
    return not problems


def compile_in_place(networks: Iterable[nn.Module]) -> None:
    """Compile the calls of networks at their first use; parameters and state dicts stay what they are."""
    import torch._inductor.config

    # The dropout masks of the uncompiled network, which student and target share.
    torch._inductor.config.fallback_random = True
    for network in networks:
        network.compile()


def uncompiled() -> contextlib.AbstractContextManager:
    """Within the body, calls of compiled networks run as they were before."""
    known = hasattr(torch.compiler, "set_stance")
    return torch.compiler.set_stance("force_eager") if known else contextlib.nullcontext()
