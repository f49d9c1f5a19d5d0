"""Small models for the tests of converters."""

import torch

from cm.config.scripts import ModelFlags, flags_of
from cm.networks.architecture import build_network
from cm.tools.convert.layout import Config, State, architecture
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
