"""The twelve released models fit the networks that presets and published command lines build."""

import pytest
import torch

from cm.commands.cli import parse_config
from cm.config.scripts import SampleConfig
from cm.errors import UserError
from cm.models.factory import create_network
from cm.storage.weights import check_matching
from tests.helpers import golden_data

RELEASED = {
    "edm_imagenet64_ema": "imagenet64_edm",
    "cd_imagenet64_l2": "imagenet64_cd_l2",
    "cd_imagenet64_lpips": "imagenet64_cd_lpips",
    "ct_imagenet64": "imagenet64_ct",
    "edm_bedroom256_ema": "bedroom256_edm",
    "cd_bedroom256_l2": "bedroom256_cd_l2",
    "cd_bedroom256_lpips": "bedroom256_cd_lpips",
    "ct_bedroom256": "bedroom256_ct",
    "edm_cat256_ema": "cat256_edm",
    "cd_cat256_l2": "cat256_cd_l2",
    "cd_cat256_lpips": "cat256_cd_lpips",
    "ct_cat256": "cat256_ct",
}


def layout(image_size: int) -> dict:
    name = {64: "imagenet64_edm_cd_ct", 256: "lsun256_edm_cd_ct"}[image_size]
    return golden_data.json("checkpoint_layouts")[name]


def build(argv: list[str]):
    config = parse_config(SampleConfig, argv)
    with torch.device("meta"):
        return config, create_network(config)


def fits(network, golden) -> None:
    state = {name: torch.empty(shape, device="meta") for name, shape in golden["state_dict"]}
    check_matching(network, state, "a released file")
    assert list(network.state_dict()) == list(state)
    assert sum(p.numel() for p in network.parameters()) == golden["num_parameters"]


@pytest.mark.parametrize("file", RELEASED)
def test_presets_fit_the_released_files(file):
    config, network = build(["--preset", RELEASED[file], "--model_path", f"{file}.pt"])
    fits(network, layout(config.image_size))
    assert config.training_mode.startswith(
        {"e": "edm", "cd": "consistency_d", "ct": "consistency_t"}[
            file.split("_")[0] if not file.startswith("edm") else "e"
        ]
    )


SAMPLING = [c["argv"] for c in golden_data.json("launch_commands") if c["script"] == "image_sample"]


@pytest.mark.parametrize("argv", SAMPLING, ids=lambda a: a[a.index("--model_path") + 1])
def test_published_command_lines_fit_the_released_files(argv):
    config, network = build(argv)
    fits(network, layout(config.image_size))


def test_a_file_of_the_other_kind_is_refused():
    _, network = build(["--preset", "imagenet64_cd_l2"])
    with pytest.raises(UserError, match="in the file"):
        fits(network, layout(256))
