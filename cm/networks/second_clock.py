"""The second clock of networks for flow maps Phi(z, t, r): beside t they are told r, t - r, or a function of it.

| form | how it enters | layout of |
|---|---|---|
| added | an embedding of its own, whose contribution is added in every block and begins at 0 | CTM (Kim et al. 2024) |
| joined | its features stand beside those of t in one embedding | MeanFlow (Geng et al. 2025) |

So a checkpoint of one time goes on as one of two: `widened` completes it, and the output stays what it was.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cm.nn import SiLU, linear

ADDED, JOINED = "added", "joined"


def check_form(form: str, known: Sequence[str]) -> str:
    """The form of a network's second clock, or "" for a network of one time; ValueError for others."""
    if form and form not in known:
        raise ValueError(f"second_clock must be empty or one of {', '.join(known)}, got {form!r}")
    return form


def check_second(second: Tensor | None, timesteps: Tensor, form: str) -> None:
    """ValueError unless the second clock is given to the networks that have one, with a value for each image."""
    if (second is None) == bool(form):
        raise ValueError("the network has two times" if form else "the network has one time, not two")
    if second is not None and second.shape != timesteps.shape:
        raise ValueError(
            f"the second clock has shape {tuple(second.shape)}, the first {tuple(timesteps.shape)}"
        )


def at_all_times(scale: Tensor) -> Tensor:
    """guidance_inputs (B, 3) of scales w (B,) above 0 that act at all times: 1 / w, 0 and 1."""
    return torch.stack([1 / scale, torch.zeros_like(scale), torch.ones_like(scale)], dim=1)


def clock_mlp(features: int, emb_channels: int) -> nn.Sequential:
    """From the waves of a time (B, features) to its embedding (B, emb_channels), as in ADM."""
    return nn.Sequential(linear(features, emb_channels), SiLU(), linear(emb_channels, emb_channels))


def scale_clock(scale: Tensor | None, second: Tensor | None, speed: float = 0.25) -> Tensor | None:
    """The second clock of a network that is told a scale of guidance w >= 0 (B,): speed ln(1 + w), like that of sigma.

    Without a scale `second` as it is; ValueError for both, which one slot cannot take.
    """
    if scale is None:
        return second
    if second is not None:
        raise ValueError("the network has one slot, for a second time or for a scale of guidance")
    return speed * torch.log1p(scale)


def widened(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a one-time network, completed for the same network with a second clock.

    The output is the old one whatever the second clock says: what is new is either multiplied by zeros already
    (added: the network's own fresh values), or the columns and rows that meet its features are zeros (joined).
    A state dict that has the second clock comes back as it is; what does not fit is left for the caller to find.
    """
    if not getattr(network, "second_clock", ""):
        return dict(state)
    own, complete = network.state_dict(), dict(state)
    for name, tensor in own.items():
        if name not in state:
            if _is_second(name):
                complete[name] = tensor
            elif name == "map_guidance.weight":
                complete[name] = torch.zeros_like(tensor)
        elif network.second_clock == JOINED and name.startswith("map_"):
            complete[name] = _padded(state[name], tensor)
    return {
        name: complete[name] for name in (*own, *(n for n in complete if n not in own)) if name in complete
    }


def _is_second(name: str) -> bool:
    return any(part.endswith("_s") for part in name.split("."))


def _padded(given: Tensor, like: Tensor) -> Tensor:
    """The tensor with zeros behind it, where the other is twice as long in one dimension."""
    longer = [b != a for a, b in zip(given.shape, like.shape)]
    if given.ndim != like.ndim or sum(longer) != 1 or 2 * given.numel() != like.numel():
        return given
    return torch.cat([given, torch.zeros_like(given)], dim=longer.index(True))
