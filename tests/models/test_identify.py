"""Architectures from tensor shapes: released layouts, networks built here, and what shapes cannot tell."""

import pytest
import torch

from cm.errors import UserError
from cm.models.identify import identify
from cm.networks.architecture import Architecture, build_network
from tests.helpers import golden_data


def meta_state(**flags) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return build_network(Architecture(**flags)).state_dict()


def rebuilt(found: dict) -> dict[str, torch.Tensor]:
    flags = {k: v for k, v in found.items() if k not in ("class_cond", "num_classes")}
    return meta_state(**flags, num_classes=found["num_classes"] if found["class_cond"] else None)


@pytest.mark.parametrize("layout", ["imagenet64_edm_cd_ct", "lsun256_edm_cd_ct"])
def test_released_layouts(layout):
    golden = golden_data.json("checkpoint_layouts")[layout]
    state = {name: torch.empty(shape, device="meta") for name, shape in golden["state_dict"]}
    found = identify(state)
    expected = golden["config"]
    told = [name for name in expected if name not in ("use_fp16", "dropout")]
    assert {name: found[name] for name in told} == {name: expected[name] for name in told}
    # Building from what was found gives the file's tensors, in the file's order.
    ours = rebuilt(found)
    assert [(name, list(tensor.shape)) for name, tensor in ours.items()] == [
        tuple(x) for x in golden["state_dict"]
    ]


COMMON = {"image_size": 64, "num_channels": 64, "num_res_blocks": 1, "num_head_channels": 64}
NETWORKS = [
    COMMON | {"num_res_blocks": 2, "attention_resolutions": "16,8"},
    COMMON | {"attention_resolutions": "", "resblock_updown": True},
    COMMON | {"attention_resolutions": "32", "image_size": 128, "learn_sigma": True},
    COMMON
    | {
        "attention_resolutions": "64,32,16,8",
        "use_scale_shift_norm": True,
        "num_classes": 7,
        "in_channels": 1,
    },
]


@pytest.mark.parametrize("flags", NETWORKS, ids=[str(i) for i in range(len(NETWORKS))])
def test_round_trip(flags):
    state = meta_state(**flags)
    found = identify(state)
    assert {name: found[name] for name in flags} == flags
    assert found["class_cond"] == ("num_classes" in flags)
    again = rebuilt(found)
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}


def test_unknown_widths_need_the_image_size():
    flags = dict(
        image_size=32, num_channels=64, num_res_blocks=1, channel_mult="1,2", attention_resolutions="16"
    )
    state = meta_state(**flags, num_head_channels=64)
    with pytest.raises(UserError, match=r"model\.pt.*--image_size"):
        identify(state, "model.pt")
    assert identify(state, "model.pt", image_size=32)["attention_resolutions"] == "16"


def test_what_shapes_cannot_tell_is_said():
    heads = meta_state(
        image_size=64, num_channels=32, num_res_blocks=1, attention_resolutions="64", num_heads=2
    )
    with pytest.raises(UserError, match="attention heads"):
        identify(heads)
    with pytest.raises(UserError, match=r"x\.pt is not"):
        identify({"weight": torch.zeros(1)}, "x.pt")
    good = meta_state(**NETWORKS[0])
    with pytest.raises(UserError, match="not an ADM U-Net"):
        identify({k: v for k, v in good.items() if not k.startswith("output_blocks.0.")})
    old = {k: v[..., 0] if k.endswith("qkv.weight") else v for k, v in good.items()}
    with pytest.raises(UserError, match="guided-diffusion"):
        identify(old)
