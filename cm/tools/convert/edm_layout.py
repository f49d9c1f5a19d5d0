"""Networks in the layout of EDM's released checkpoints (Karras et al. 2022): SongUNet is ours, DhariwalUNet is not.

SongUNet (NCSN++, DDPM++) has the names of `cm.networks.song_unet`. DhariwalUNet is the ADM U-Net of `cm.networks.unet`
under other names, with two differences: rows of qkv are numbered (head, channel, {q, k, v}), and the noise level
enters as ln(sigma) / 4, without the factor 1000.
"""

import re
from collections.abc import Callable

from torch import Tensor

from cm.errors import UserError
from cm.tools.convert.layout import (
    AdmShape,
    Config,
    Layer,
    State,
    check_fits,
    rename,
    with_leaves,
)

HEAD_CHANNELS = 64

# Layers inside a block: EDM's name -> ours
RESIDUAL = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {
    "norm2": "norm",
    "qkv": "qkv",
    "proj": "proj_out",
}


def is_edm(state: State) -> bool:
    """Whether these are the tensors of one of EDM's networks."""
    return "map_layer0.weight" in state and any(name.startswith("enc.") for name in state)


def identify(state: State, source: str) -> Config:
    """Model flags of a network in EDM's layout, from the names and shapes of its tensors."""
    # Finest first, whatever the order of the tensors: a tree of JAX is sorted by name.
    sides = sorted({int(m[1]) for n in state if (m := re.match(r"enc\.(\d+)x\1_", n))}, reverse=True)
    first = f"enc.{sides[0]}x{sides[0]}" if sides else ""
    if f"{first}_conv.weight" not in state:
        raise UserError(f"{source} has no first convolution: it is not one of EDM's networks")
    channels, in_channels = state[f"{first}_conv.weight"].shape[:2]
    blocks = [n for n in state if re.fullmatch(rf"{re.escape(first)}_block\d+\.conv1\.weight", n)]
    try:
        widths = [state[f"enc.{s}x{s}_block0.conv1.weight"].shape[0] for s in sides]
    except KeyError as error:
        raise UserError(f"{source} has no {error.args[0]}: it is not one of EDM's networks") from None
    is_adm = "out_norm.weight" in state
    song = "ncsnpp" if "map_noise.freqs" in state else "ddpmpp"
    output = state.get("out_conv.weight" if is_adm else f"dec.{sides[0]}x{sides[0]}_aux_conv.weight")
    labels = state.get("map_label.weight")
    augment = state.get("map_augment.weight")
    return {
        "network": "adm" if is_adm else song,
        "image_size": sides[0],
        "in_channels": in_channels,
        "num_channels": channels,
        "channel_mult": ",".join(f"{width / channels:g}" for width in widths),
        "num_res_blocks": len(blocks),
        "attention_resolutions": ",".join(str(s) for s in sides if f"enc.{s}x{s}_block0.qkv.weight" in state),
        "num_head_channels": HEAD_CHANNELS if is_adm else -1,
        "class_cond": labels is not None,
        "num_classes": 0 if labels is None else labels.shape[1],
        "augment_dim": 0 if augment is None or is_adm else augment.shape[1],
        "use_scale_shift_norm": True,
        "resblock_updown": is_adm,
        "learn_sigma": output is not None and output.shape[0] == 2 * in_channels,
        "time_scale": 1.0 if is_adm else 0.0,  # 0: the architecture's own clock
    }


def from_edm(state: State, source: str = "the checkpoint") -> tuple[State, Config]:
    """(our state dict, model flags) of a network in EDM's layout; UserError unless every tensor has its place.

    An ADM network's augmentation input is dropped: ours has none, and without augmentation it adds nothing.
    """
    config = identify(state, source)
    if config["network"] != "adm":
        check_fits(state, config, source)
        return dict(state), config
    bare = {n: t for n, t in state.items() if not n.endswith("resample_filter") and n != "map_augment.weight"}
    _check_filters(state, source)
    for name, tensor in bare.items():
        if re.search(r"norm\d?\.weight$", name) and (len(tensor) < 128 or len(tensor) % 32):
            raise UserError(
                f"{source}: {name} has {len(tensor)} channels; our norms have 32 groups, EDM's do not"
            )
    edm_to_ours = {edm: ours for ours, edm in adm_prefixes(AdmShape.of(config)).items()}
    converted = rename(bare, with_leaves(edm_to_ours, bare), source)
    converted = {name: adapt(name, tensor, _from_interleaved) for name, tensor in converted.items()}
    check_fits(converted, config, source)
    return converted, config


def adm_prefixes(shape: AdmShape) -> dict[str, str]:
    """Our layer -> EDM's, for every layer with tensors."""
    side = shape.side(0)
    prefixes = {
        "time_embed.0": "map_layer0",
        "time_embed.2": "map_layer1",
        "label_emb": "map_label",
        "input_blocks.0.0": f"enc.{side}x{side}_conv",
    }
    for layer in shape.layers():
        parts = ATTENTION if layer.attention else RESIDUAL
        prefixes |= {f"{layer.name}.{ours}": f"{edm_name(layer, shape)}.{edm}" for edm, ours in parts.items()}
    return {**prefixes, "out.0": "out_norm", "out.2": "out_conv"}


def edm_name(layer: Layer, shape: AdmShape) -> str:
    """Prefix of a layer's tensors in EDM's code."""
    side = shape.side(layer.level)
    if layer.place == "mid":
        return f"dec.{side}x{side}_in{layer.index}"
    if layer.resample:
        return f"{layer.place}.{side}x{side}_{'down' if layer.place == 'enc' else 'up'}"
    return f"{layer.place}.{side}x{side}_block{layer.index}"


def adapt(name: str, tensor: Tensor, reorder: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor that both layouts name alike, as the other one has it; reorder: of the rows of qkv."""
    if name in ("map_label.weight", "label_emb.weight"):
        return tensor.T.contiguous()  # a matrix for one-hot vectors, or a table
    return reorder(tensor) if ".qkv." in name else tensor


def _from_interleaved(rows: Tensor) -> Tensor:
    """(head, channel, {q, k, v}) -> ({q, k, v}, head, channel)."""
    split = rows.unflatten(0, (-1, HEAD_CHANNELS, 3))
    return split.movedim(2, 0).reshape(rows.shape)


def _check_filters(state: State, source: str) -> None:
    for name, tensor in state.items():
        if name.endswith("resample_filter") and not (tensor.numel() == 4 and tensor.eq(0.25).all()):
            raise UserError(f"{source}: {name} is not the box filter of our ADM U-Net")
