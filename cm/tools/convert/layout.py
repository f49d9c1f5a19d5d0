"""The ADM U-Net as a list of layers, under the names of each code that has one, and the checks that all share.

Levels count from the finest, 0. A "place" is `enc`, `mid` or `dec`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from cm.config.derived import stored_scales
from cm.config.fields import flags_of
from cm.config.rows import NETWORKS, OBJECTIVES
from cm.errors import UserError
from cm.networks.architecture import Architecture, build_network
from cm.storage.shapes import shapes_only
from cm.storage.weights import check_matching

Config = dict[str, Any]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Layer:
    """A residual block, or the attention behind one.

    name: prefix of its tensors in `cm.networks.unet`. level and index: which level, and which block of its way down
    or up (or of the middle). resample: the block that changes the level; `level` is the one it leads to.
    """

    name: str
    place: str
    level: int
    index: int
    attention: bool = False
    resample: bool = False


@dataclass(frozen=True)
class AdmShape:
    """What decides the names of an ADM U-Net's tensors."""

    image_size: int
    levels: int
    num_res_blocks: int
    attention: frozenset[int]  # levels

    @classmethod
    def of(cls, config: Config) -> "AdmShape":
        """From model flags."""
        a = architecture(config)
        attention = frozenset(factor.bit_length() - 1 for factor in a.attention_factors)
        return cls(a.image_size, len(a.widths), a.num_res_blocks, attention)

    def side(self, level: int) -> int:
        """Image side at a level."""
        return self.image_size >> level

    def layers(self) -> Iterator[Layer]:
        """All blocks and attention layers, in the network's order; blocks resample inside (resblock_updown)."""
        n = 1  # input_blocks.0 is the first convolution
        for level in range(self.levels):
            if level > 0:
                yield Layer(f"input_blocks.{n}.0", "enc", level, 0, resample=True)
                n += 1
            for i in range(self.num_res_blocks):
                yield from self._block(f"input_blocks.{n}", "enc", level, i)
                n += 1
        last = self.levels - 1
        yield Layer("middle_block.0", "mid", last, 0)
        yield Layer("middle_block.1", "mid", last, 0, attention=True)
        yield Layer("middle_block.2", "mid", last, 1)
        n = 0
        for level in reversed(range(self.levels)):
            for i in range(self.num_res_blocks + 1):
                yield from self._block(f"output_blocks.{n}", "dec", level, i)
                if level > 0 and i == self.num_res_blocks:
                    place = 1 + (level in self.attention)
                    yield Layer(f"output_blocks.{n}.{place}", "dec", level - 1, 0, resample=True)
                n += 1

    def _block(self, prefix: str, place: str, level: int, index: int) -> Iterator[Layer]:
        yield Layer(f"{prefix}.0", place, level, index)
        if level in self.attention:
            yield Layer(f"{prefix}.1", place, level, index, attention=True)


def architecture(config: Config) -> Architecture:
    """The network that model flags describe, with the inputs that the objective of a training asks for."""
    names = {f.name for f in fields(Architecture)} - {"num_classes"}
    known = {name: value for name, value in config.items() if name in names}
    if (mode := config.get("training_mode")) in OBJECTIVES and OBJECTIVES[mode].two_times:
        known |= {"two_times": True, "told_guidance": OBJECTIVES[mode].told_guidance}
    known["told_scale"] = bool(stored_scales(config))
    return Architecture(**known, num_classes=config["num_classes"] if config["class_cond"] else None)


def require_image_and_level(config: Config, target: str) -> None:
    """UserError for a network that is given more than an image, its noise level and a class."""
    a = architecture(config)
    if a.two_times or a.told_scale:
        what = "a second time" if a.two_times else "the scale of its guidance"
        raise UserError(f"{target} has no input for {what}, which this network takes")


def network_options(config: Config) -> dict[str, Any]:
    """The options of the network's row, from model flags; defaults where they are not given."""
    options = NETWORKS[config["network"]].options
    found = flags_of(options) if options else {}
    return {name: config.get(name, field.default) for name, field in found.items()}


def check_fits(state: State, config: Config, source: str) -> State:
    """The state dict in the order of the network in `config`; UserError names the first tensors that differ from it."""
    with shapes_only():
        network = build_network(architecture(config), options=network_options(config))
    check_matching(network, state, source)
    return {name: state[name] for name in network.state_dict()}


def require_resblock_updown(config: Config, target: str) -> None:
    """UserError for an ADM U-Net whose resampling has no counterpart in the target layout."""
    if config["network"] != "adm" or not config["resblock_updown"]:
        raise UserError(f"{target} holds ADM U-Nets with --resblock_updown True only")


def rename(state: State, names: dict[str, str], source: str) -> State:
    """Tensors under their new names (old -> new), in the order of `names`; UserError for a missing or unknown one."""
    missing = [name for name in names if name not in state]
    extra = [name for name in state if name not in names]
    if missing or extra:
        what = f"misses {missing[0]}" if missing else f"has {extra[0]}"
        raise UserError(f"{source} {what}, unlike the network that its other tensors describe")
    return {new: state[old] for old, new in names.items()}


def with_leaves(prefixes: dict[str, str], state: State) -> dict[str, str]:
    """Old tensor name -> new one for every tensor of `state` that sits right under an old prefix."""
    split = {name: name.rpartition(".") for name in state}
    return {name: f"{prefixes[p]}.{leaf}" for name, (p, _, leaf) in split.items() if p in prefixes}
