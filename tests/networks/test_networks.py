"""Networks by name: sizes of the published ones, clocks, and combinations that are refused."""

import dataclasses

import pytest
import torch

from cm.config import presets
from cm.config.rows import NETWORKS
from cm.config.scripts import ModelFlags, SampleConfig, configure, flags_of
from cm.errors import UserError
from cm.models.factory import create_network, create_precond
from cm.networks.architecture import Architecture, build_network

CIFAR10 = {
    "image_size": 32,
    "num_channels": 128,
    "channel_mult": "2,2,2",
    "num_res_blocks": 4,
    "attention_resolutions": "16",
}
TINY = {
    "image_size": 8,
    "num_channels": 32,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": "4",
}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"network": "ncsnpp"}, 56_395_523),
        ({"network": "ddpmpp"}, 55_732_739),
        ({"network": "ncsnpp", "num_classes": 10, "augment_dim": 9}, 56_400_643),
    ],
)
def test_sizes_of_the_cifar10_networks(flags, expected):
    with torch.device("meta"):
        network = build_network(Architecture(**CIFAR10, **flags))
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("cifar10_cd_l2", 56_395_523),
        ("imagenet64_cd_lpips", 295_899_267),
        ("bedroom256_ct", 526_304_771),
    ],
)
def test_sizes_of_presets(preset, expected):
    config = configure(SampleConfig, **presets.values(preset, "release", "image_sample"))
    with torch.device("meta"):
        assert sum(p.numel() for p in create_network(config).parameters()) == expected


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_takes_images_times_and_labels(network):
    net = build_network(Architecture(network=network, num_classes=3, in_channels=1, learn_sigma=True, **TINY))
    out = net(torch.randn(2, 1, 8, 8), torch.randn(2), torch.tensor([0, 2]))
    assert out.shape == (2, 2, 8, 8)
    assert net.dtype == torch.float32


def test_every_flag_of_an_architecture_is_a_flag_of_the_model():
    fields = {f.name for f in dataclasses.fields(Architecture)}
    own = {"two_times", "told_guidance", "told_scale"}  # the objective says so
    assert fields - own <= set(flags_of(ModelFlags))


@pytest.mark.parametrize(("network", "scale"), [("adm", 1000.0), ("ncsnpp", 1.0), ("ddpmpp", 1.0)])
def test_clocks(network, scale):
    sigma = torch.tensor([0.002, 80.0])
    for consistency in (False, True):
        own = create_precond(SampleConfig(network=network), consistency=consistency)
        torch.testing.assert_close(own(sigma).c_noise, scale * sigma.log() / 4)
        given = create_precond(SampleConfig(network=network, time_scale=7.0), consistency=consistency)
        torch.testing.assert_close(given(sigma).c_noise, 7 * sigma.log() / 4)


def test_combinations_that_no_network_has():
    with pytest.raises(UserError, match=r"network must be one of adm, ncsnpp, ddpmpp, .*, got 'dit'"):
        build_network(Architecture(network="dit", **TINY))
    with pytest.raises(UserError, match="--network adm takes no augmentation labels"):
        build_network(Architecture(network="adm", augment_dim=9, **TINY))
    with pytest.raises(UserError, match="not a multiple of 2"):
        build_network(
            Architecture(network="ncsnpp", **{**TINY, "image_size": 9, "attention_resolutions": ""})
        )


# Of a network at seed 0: the sum of its weights, each times its place among them modulo 7
INITIAL = {
    "adm": 3990.9058,
    "ncsnpp": 4368.3068,
    "ddpmpp": 3978.8589,
    "ddpmpp_scm": 4494.4544,
    "edm2": -1941.8596,
    "edm2_scm": -2482.4333,
}


@pytest.mark.parametrize("network", INITIAL)
def test_initial_weights_are_a_function_of_the_seed(network):
    """Their order is fixed, too: a run that starts from random weights is the same with every version."""
    torch.manual_seed(0)
    net = build_network(Architecture(network=network, num_classes=10, **TINY))
    flat = torch.cat([p.detach().double().flatten() for p in net.parameters()])
    assert (flat * (torch.arange(len(flat)) % 7)).sum().item() == pytest.approx(INITIAL[network], rel=1e-5)
