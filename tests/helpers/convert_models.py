"""Small models for the tests of converters."""

import torch

from cm.config.scripts import ModelFlags, flags_of
from cm.errors import UserError
from cm.networks.architecture import build_network
from cm.tools.convert.edm_layout import HEAD_CHANNELS, adapt, adm_prefixes, edm_name
from cm.tools.convert.layout import (
    AdmShape,
    Config,
    State,
    architecture,
    rename,
    require_resblock_updown,
    with_leaves,
)
from tests.helpers.edm_reference import randomize

# Released networks in small: blocks, attention and resampling where those have them
SHAPES: dict[str, Config] = {
    "imagenet": dict(
        image_size=16,
        channel_mult="1,2",
        num_res_blocks=2,
        attention_resolutions="8",
        class_cond=True,
        num_classes=10,
        use_scale_shift_norm=True,
    ),
    "lsun": dict(
        image_size=32,
        channel_mult="1,1,2,2",
        num_res_blocks=1,
        attention_resolutions="8,4",
        use_scale_shift_norm=False,
    ),
}


def flags(**given) -> Config:
    """All model flags, of a consistency model if not said otherwise, with the given ones."""
    config = {name: field.default for name, field in flags_of(ModelFlags).items()}
    config |= {"in_channels": 3, "training_mode": "consistency_distillation", "steps": 40}
    return config | given


def adm(shape: str, **given) -> Config:
    """Flags of a narrow ADM U-Net of one of the SHAPES."""
    narrow = {"num_channels": 32, "num_head_channels": 32, "resblock_updown": True}
    return flags(**{**narrow, **SHAPES[shape], **given})


def network(config: Config, seed: int = 0) -> torch.nn.Module:
    """The network of `config` with random weights everywhere, in eval mode."""
    net = build_network(architecture(config))
    net.load_state_dict(randomize(net.state_dict(), seed))
    return net.eval()


def assert_same(a: State, b: State) -> None:
    """Equal names, order and values, bit by bit."""
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def to_edm(state: State, config: Config, source: str = "the model") -> State:
    """An ADM U-Net of ours in EDM's layout (SongUNet networks are in it already).

    What the network expects as noise level stays what it was: --time_scale of EDM's own code is 1.
    """
    if config["network"] != "adm":
        return dict(state)
    require_resblock_updown(config, "EDM's layout")
    if config["num_head_channels"] != HEAD_CHANNELS:
        raise UserError(f"EDM's ADM network has heads of {HEAD_CHANNELS} channels, {source} does not")
    shape = AdmShape.of(config)
    prefixes = adm_prefixes(shape)
    converted = rename(state, with_leaves(prefixes, state), source)
    resampling = {edm_name(layer, shape) for layer in shape.layers() if layer.resample}
    complete: State = {}
    for name, tensor in converted.items():
        complete[name] = adapt(name, tensor, _to_interleaved)
        # Filters are tensors of EDM's networks, behind those of the convolution that they belong to.
        for last, branch in ((".conv0.bias", "conv0"), (".conv1.bias", "skip")):
            block = name.removesuffix(last)
            if block in resampling:
                complete[f"{block}.{branch}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    return complete


def _to_interleaved(rows: torch.Tensor) -> torch.Tensor:
    """({q, k, v}, head, channel) -> (head, channel, {q, k, v})."""
    split = rows.unflatten(0, (3, -1, HEAD_CHANNELS))
    return split.movedim(0, 2).reshape(rows.shape)


def qkv_new_to_legacy(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a qkv weight or bias from (three, head, channel) to (head, three, channel)."""
    return weight.unflatten(0, (3, heads, -1)).transpose(0, 1).reshape(weight.shape)
