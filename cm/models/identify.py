"""Files without a configuration: what the shapes of a state dict say about its network.

Shapes tell the architecture of an ADM U-Net except the number of attention heads and the image size; those are taken
from the released networks, which have heads of 64 channels and one image size for each list of level widths, unless the
caller knows them. Shapes say nothing about preconditioning, noise grid or dropout.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from cm.config.parsing import CHANNEL_MULT
from cm.errors import UserError
from cm.storage.unpickle import one_line

HEAD_CHANNELS = 64
# Image size of the networks that were released, by their default widths
IMAGE_SIZES = {mult: size for size, mult in CHANNEL_MULT.items() if size >= 64}


class Heads(NamedTuple):
    """How attention is cut into heads: a number of them in every layer, or (num_heads 0) a width of each."""

    num_heads: int = 0
    num_head_channels: int = HEAD_CHANNELS

    def of(self, channels: int) -> int:
        """Number of heads in a layer of this width; 0 where it cannot be cut so."""
        heads = self.num_heads or channels // self.num_head_channels
        width = self.num_head_channels if not self.num_heads else channels // heads
        return heads if heads * width == channels else 0

    def __str__(self) -> str:
        return (
            f"--num_heads {self.num_heads}"
            if self.num_heads
            else f"--num_head_channels {self.num_head_channels}"
        )

    def flags(self) -> dict[str, int]:
        """As flags of the model."""
        if self.num_heads:
            return {"num_heads": self.num_heads, "num_head_channels": -1}
        return {"num_head_channels": self.num_head_channels}


RELEASED_HEADS = Heads()


class Encoder(NamedTuple):
    """A U-Net's way down: width and attention of each level, finest first."""

    widths: list[int]
    num_res_blocks: int
    attention: list[bool]
    resblock_updown: bool


def identify(
    state_dict: Mapping[str, Any],
    source: str = "the model file",
    image_size: int = 0,
    heads: Heads = RELEASED_HEADS,
) -> dict[str, Any]:
    """Model flags of a bare state dict, from the shapes of its tensors.

    image_size: where the list of widths does not tell it; heads: where they are not those of the released networks.
    UserError names what shapes cannot tell and which flags do.
    """
    # Tensors of unlikely shapes make this fail in any way.
    with one_line(f"{source} is not the state dict of an ADM U-Net"):
        return _flags_of(
            {name: tuple(tensor.shape) for name, tensor in state_dict.items()}, source, image_size, heads
        )


def _flags_of(
    shapes: Mapping[str, tuple[int, ...]], source: str, image_size: int, heads: Heads
) -> dict[str, Any]:
    required = ("input_blocks.0.0.weight", "time_embed.0.weight", "out.2.weight", "middle_block.1.qkv.weight")
    if not all(name in shapes for name in required):
        raise UserError(f"{source} is not the state dict of an ADM U-Net")
    if len(shapes["middle_block.1.qkv.weight"]) != 4:
        raise UserError(
            f"{source} is a guided-diffusion U-Net, whose attention is laid out in another way: convert it"
        )
    num_channels, in_channels = shapes["input_blocks.0.0.weight"][:2]
    encoder = _encoder(shapes, source)
    mult = tuple(ratio(width, num_channels) for width in encoder.widths)
    size = image_size or IMAGE_SIZES.get(mult, 0)
    if not size:
        raise UserError(
            f"{source}: tensor shapes do not tell the image size of a network with --channel_mult "
            f"{','.join(map(str, mult))}: give --image_size"
        )
    attended = [width for width, attention in zip(encoder.widths, encoder.attention) if attention]
    if not all(map(heads.of, (*attended, encoder.widths[-1]))):
        raise UserError(
            f"{source}: tensor shapes do not tell the number of attention heads: give all flags of the model, or "
            "--num_heads or --num_head_channels to convert_checkpoint"
        )
    return {
        "network": "adm",
        "image_size": size,
        "in_channels": in_channels,
        "num_channels": num_channels,
        "num_res_blocks": encoder.num_res_blocks,
        "channel_mult": ",".join(map(str, mult)),
        "attention_resolutions": ",".join(str(size >> i) for i, has in enumerate(encoder.attention) if has),
        **heads.flags(),
        "class_cond": "label_emb.weight" in shapes,
        "num_classes": shapes.get("label_emb.weight", (0,))[0],
        "use_scale_shift_norm": uses_scale_shift(shapes),
        "resblock_updown": encoder.resblock_updown,
        "learn_sigma": shapes["out.2.weight"][0] == 2 * in_channels,
    }


def ratio(width: int, base: int) -> int | float:
    """A width in units of the finest one, as --channel_mult writes it."""
    return width // base if width % base == 0 else width / base


def uses_scale_shift(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """The embedding gives a scale and a shift per channel instead of one summand."""
    return (
        shapes["middle_block.0.emb_layers.1.weight"][0] == 2 * shapes["middle_block.0.out_layers.0.weight"][0]
    )


def _encoder(shapes: Mapping[str, tuple[int, ...]], source: str) -> Encoder:
    """Read the levels off the blocks.

    There are levels * (blocks + 1) blocks on either way: per level one residual block less on the way down, where the
    last place holds the step to the next level. On the way up such steps sit behind the blocks, which counts levels.
    """
    total = count_blocks(shapes, "input_blocks")
    ups = [
        name
        for name in shapes
        if re.fullmatch(r"output_blocks\.\d+\.[12]\.(in_layers\.2|conv)\.weight", name)
    ]
    levels = len(ups) + 1
    if total % levels or count_blocks(shapes, "output_blocks") != total:
        raise UserError(f"{source} is not an ADM U-Net with equally many residual blocks on each level")
    stride = total // levels
    firsts = [f"input_blocks.{1 + level * stride}" for level in range(levels)]
    widths = [shapes.get(f"{first}.0.in_layers.2.weight", (0,))[0] for first in firsts]
    if stride < 2 or not all(widths):
        raise UserError(f"{source} is not an ADM U-Net with equally many residual blocks on each level")
    return Encoder(
        widths,
        num_res_blocks=stride - 1,
        attention=[f"{first}.1.qkv.weight" in shapes for first in firsts],
        resblock_updown=any("in_layers" in name for name in ups),
    )


def count_blocks(shapes: Mapping[str, tuple[int, ...]], stack: str) -> int:
    """How many blocks a stack such as input_blocks has."""
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{stack}.")})
