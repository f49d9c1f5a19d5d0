"""Networks in the layout of EDM2's checkpoints (Karras et al. 2024): the names of `cm.networks.edm2` behind `unet.`.

Beside the U-Net stands the head for the uncertainty, `logvar_fourier` and `logvar_linear`, which our network holds.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cm.errors import UserError
from cm.tools.convert.edm_pickle import Record
from cm.tools.convert.layout import Config, State, check_fits

PREFIX = "unet."
HEAD_CHANNELS = 64  # of every released network
# Attributes of the objects in a pickle that our network has as constants
CONSTANTS = {
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256,
    "resample_filter": [1, 1],
}
# network-snapshot-1073741-0.100.pkl, edm2-img64-s-1073741-0.075.pkl: the relative length of the average
_LENGTH = re.compile(r"-(0\.\d{3})\.pkl$")


def is_edm2(state: State) -> bool:
    """Whether these are the tensors of one of EDM2's networks, with or without `unet.` before the names."""
    return any({f"{p}emb_noise.weight", f"{p}out_gain"} <= state.keys() for p in ("", PREFIX))


def from_edm2(
    state: State, source: str = "the checkpoint", head_channels: int = HEAD_CHANNELS
) -> tuple[State, Config]:
    """(our state dict, model flags) of a network in EDM2's layout; UserError unless every tensor has its place."""
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    config = identify(bare, source, head_channels)
    return check_fits(bare, config, source), config


def identify(state: State, source: str, head_channels: int = HEAD_CHANNELS) -> Config:
    """Model flags of a network by EDM2's names, from the shapes of its tensors, which do not tell the heads' width."""
    sides = list(dict.fromkeys(int(m[1]) for n in state if (m := re.match(r"enc\.(\d+)x\1_", n))))
    sides.sort(reverse=True)
    try:
        channels, inputs = state[f"enc.{sides[0]}x{sides[0]}_conv.weight"].shape[:2]
        widths = [state[f"enc.{s}x{s}_block0.conv_res1.weight"].shape[0] for s in sides]
        outputs = state["out_conv.weight"].shape[0]
    except (KeyError, IndexError) as error:
        missing = error.args[0] if isinstance(error, KeyError) else "encoder"
        raise UserError(f"{source} has no {missing}: it is not one of EDM2's networks") from None
    blocks = [n for n in state if re.fullmatch(rf"enc\.{sides[0]}x{sides[0]}_block\d+\.conv_res1\.weight", n)]
    attended = [s for s in sides if f"enc.{s}x{s}_block0.attn_qkv.weight" in state]
    if uneven := [
        w for s, w in zip(sides, widths) if (s in attended or s == sides[-1]) and w % head_channels
    ]:
        raise UserError(f"{source}: {head_channels} channels of an attention head do not divide {uneven[0]}")
    labels, head = state.get("emb_label.weight"), state.get("logvar_fourier.freqs")
    return {
        "network": "edm2_scm" if "emb_pos.freqs" in state else "edm2",
        "image_size": sides[0],
        "in_channels": inputs - 1,
        "num_channels": channels,
        "channel_mult": ",".join(f"{width / channels:g}" for width in widths),
        "num_res_blocks": len(blocks),
        "attention_resolutions": ",".join(map(str, attended)),
        "num_head_channels": head_channels,
        "class_cond": labels is not None,
        "num_classes": 0 if labels is None else labels.shape[1],
        "learn_sigma": outputs == 2 * (inputs - 1),
        "logvar_channels": 0 if head is None else len(head),
        "time_scale": 0.0,
    }


def pickled_facts(network: Record, path: str) -> dict[str, Any]:
    """What the objects of a pickle say beyond their tensors; UserError where our network cannot follow.

    head_channels, sigma_data, and the relative length of the average if the file's name has it.
    """
    heads = set()
    for record in _records(network):
        for name, value in CONSTANTS.items():
            found = record.state.get(name, value)
            if found != value and (name != "resample_filter" or list(found) != value):
                raise UserError(f"{path}: {record.class_name} has {name} {found}; our network has {value}")
        weight = (record.state.get("_modules") or {}).get("attn_qkv")
        if isinstance(weight, Record) and record.state.get("num_heads"):
            width = weight.state["_parameters"]["weight"].shape[0] // 3
            heads.add(width // record.state["num_heads"])
    if len(heads) > 1:
        raise UserError(f"{path} has attention heads of different widths: {sorted(heads)}")
    facts = {"head_channels": heads.pop() if heads else HEAD_CHANNELS}
    facts["sigma_data"] = float(network.state.get("sigma_data", 0.5))
    if length := _LENGTH.search(Path(path).name):
        facts["ema_sigma_rel"] = float(length[1])
    return facts


def _records(record: Record) -> Iterator[Record]:
    yield record
    for child in (record.state.get("_modules") or {}).values():
        if isinstance(child, Record):
            yield from _records(child)
