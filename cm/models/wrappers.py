"""State dicts within other things: training checkpoints of other code, and names that begin with a wrapper's.

Readers of models refuse those in a line that says what is around the network; convert_checkpoint takes the network out.
"""

from typing import Any

from torch import Tensor

from cm.errors import UserError

# A tensor that each network of ours, of EDM, of guided-diffusion and of EDM2 has (there `unet.` belongs to the names)
ROOTS = ("time_embed.0.weight", "map_layer0.weight", "unet.emb_noise.weight", "emb_noise.weight")
DEPTH = 5  # wrappers within wrappers
CONVERT = "scripts/convert_checkpoint.py takes the network out"


def require_flat(state: dict[Any, Any], source: str, described: bool = False) -> dict[str, Tensor]:
    """The state dict itself; UserError that names what is around its tensors, or what is no tensor.

    described: the file has a configuration, whose network may have any names.
    """
    wrapped = [str(key) for key, value in state.items() if isinstance(value, dict)]
    if wrapped:
        raise UserError(f"{source} is no state dict: it holds {_listed(wrapped)}; {CONVERT}")
    if other := [str(key) for key, value in state.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{source} is no state dict: {_listed(other)} is no tensor; {CONVERT}")
    prefixes = [] if described else _prefixes(state)
    if prefixes and "" not in prefixes:
        raise UserError(f"{source}: the names of its tensors begin with {_listed(prefixes)}; {CONVERT}")
    return state


def unwrapped(state: dict[Any, Any], source: str, weights: str = "") -> dict[str, Tensor]:
    """The network's tensors in a checkpoint of other code, under the names that the network gives them.

    weights: of several, raw or an average (ema); empty takes the average. UserError where that does not tell one.
    """
    for _ in range(DEPTH):
        parts = {key: value for key, value in state.items() if isinstance(key, str) and _holds_network(value)}
        if not parts:
            break
        state = parts[_choose(list(parts), source, weights)]
    tensors = {key: t for key, t in state.items() if isinstance(key, str) and isinstance(t, Tensor)}
    prefixes = _prefixes(tensors)
    if not prefixes or "" in prefixes:
        return tensors
    prefix = _choose(prefixes, source, weights)
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def _holds_network(value: Any, depth: int = DEPTH) -> bool:
    """Whether a value is a dict that has the tensors of a network, itself or in a dict within."""
    if not isinstance(value, dict) or depth == 0:
        return False
    return bool(_prefixes(value)) or any(_holds_network(inner, depth - 1) for inner in value.values())


def _prefixes(state: dict[Any, Any]) -> list[str]:
    """What stands before the known name of a network's tensor, for every such tensor."""
    names = [key for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)]
    roots = ((n, next((root for root in ROOTS if n.endswith(root)), "")) for n in names)
    found = {n.removesuffix(root) for n, root in roots if root}
    return sorted(prefix for prefix in found if not prefix or prefix.endswith("."))


def _choose(names: list[str], source: str, weights: str) -> str:
    """The name of the average or of the raw weights."""
    if len(names) == 1:
        return names[0]
    averages = [name for name in names if "ema" in name.lower() or "average" in name.lower()]
    raw = [name for name in names if name not in averages]
    wanted = raw if weights == "raw" or (not weights and not averages) else averages
    if len(wanted) != 1:
        raise UserError(f"{source} holds {_listed(names)}: it does not say which is the network (--weights)")
    return wanted[0]


def _listed(names: list[str]) -> str:
    shown = ", ".join(name[:60] for name in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
