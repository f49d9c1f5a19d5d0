"""Optimizers by name, and the shape of their state."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cm.config.choices import OPTIMIZERS
from cm.errors import choose


def make_optimizer(
    name: str,
    params: Iterable[Tensor] | Iterable[dict],
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """One of torch's optimizers; RAdam without warm-up is what all released models used.

    foreach, and not Adam's fused: on a CPU the fused kernel does not look at strides, and moments of a contiguous run,
    loaded into a channels-last one, would silently meet the wrong weights.
    """
    make = choose(OPTIMIZERS, name, "optimizer").load()
    return make(params, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, foreach=True)


def state_per_parameter(state: dict[int, dict], shapes: list[torch.Size]) -> dict[int, dict]:
    """An optimizer's state {parameter number: moments} with every moment in its parameter's shape.

    The original's fp16 runs step on two flat tensors, of all parameters with at most one dimension and of all others,
    each in parameter order; they are cut up here. No tensor is shared between parameters: optimizers count steps in
    place. ValueError when the state is neither that nor one entry for each.
    """
    if len(state) == 2 < len(shapes):
        groups = [
            [i for i, shape in enumerate(shapes) if (len(shape) <= 1) == vectors] for vectors in (True, False)
        ]
        vectors, matrices = (_cut(state[i], group, shapes) for i, group in enumerate(groups))
        state = {**vectors, **matrices}
    if sorted(state) not in ([], list(range(len(shapes)))):
        raise ValueError(f"it holds {len(state)} states for {len(shapes)} parameters")
    for number, moments in state.items():
        for key, value in moments.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != shapes[number]:
                raise ValueError(
                    f"{key} of parameter {number} has shape {tuple(value.shape)}, not {tuple(shapes[number])}"
                )
    return {number: {key: _own(value) for key, value in moments.items()} for number, moments in state.items()}


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.ndim == 0 else value


def _cut(flat: dict, group: list[int], shapes: list[torch.Size]) -> dict[int, dict]:
    """Pieces of flat moments, in the order and shapes of the parameters of a group; scalars go to each."""
    sizes = [shapes[i].numel() for i in group]
    pieces: dict[int, dict] = {i: {} for i in group}
    for key, value in flat.items():
        is_scalar = not isinstance(value, Tensor) or value.numel() == 1 < sum(sizes)
        if not is_scalar and value.numel() != sum(sizes):
            raise ValueError(f"{key} has {value.numel()} values for {sum(sizes)} weights")
        parts = [value] * len(group) if is_scalar else value.flatten().split(sizes)
        for i, part in zip(group, parts, strict=True):
            pieces[i][key] = part if is_scalar else part.view(shapes[i])
    return pieces
