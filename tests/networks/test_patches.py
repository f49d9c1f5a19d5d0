"""Patches as channels: an exact inverse, the layout of parameters, and everything that networks can do within them."""

import copy

import pytest
import torch

from cm.commands.cli import parse_config
from cm.config.inherit import adopt_teacher
from cm.config.rows import NETWORKS
from cm.config.scripts import CmTrainConfig, EdmTrainConfig, configure
from cm.errors import UserError
from cm.networks.architecture import Architecture, build_network
from cm.networks.patches import patched
from cm.objectives.forward_mode import forward_mode
from cm.training.memory import bytes_per_image

SMALL = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "num_classes": 3}


def network(name: str = "adm", patch: int = 2, side: int = 16, **flags):
    """A small network without layers that are zero; its own images have 8 pixels."""
    torch.manual_seed(0)
    given = {"attention_resolutions": "4", "in_channels": 1, **SMALL, **flags}
    net = build_network(Architecture(network=name, image_size=side, patch_size=patch, **given))
    for p in net.parameters():
        if p.detach().abs().max() < 1e-3:
            torch.nn.init.normal_(p, std=0.3)
    return net.eval()


def by_hand(x: torch.Tensor, p: int) -> torch.Tensor:
    """Pixel (i, j) of each patch of channel c is channel c p^2 + i p + j."""
    return torch.stack(
        [x[:, c, i::p, j::p] for c in range(x.shape[1]) for i in range(p) for j in range(p)], 1
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_patches_around_nothing_are_nothing(size):
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(patched(torch.nn.Identity(), size)(x), x)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_the_network_sees_patches_as_channels(learn_sigma):
    outer, inner = (
        network(learn_sigma=learn_sigma),
        network(patch=1, side=8, in_channels=4, learn_sigma=learn_sigma),
    )
    assert {k: v.shape for k, v in outer.state_dict().items()} == {
        k: v.shape for k, v in inner.state_dict().items()
    }
    inner.load_state_dict(outer.state_dict())
    x, t, y = torch.randn(2, 1, 16, 16), torch.randn(2), torch.tensor([0, 2])
    expected = inner(by_hand(x, 2), t, y)
    assert torch.equal(by_hand(outer(x, t, y), 2), expected)
    assert torch.equal(by_hand(copy.deepcopy(outer)(x, t, y=y), 2), expected)


def test_released_layouts_stay():
    plain = build_network(Architecture(image_size=16, in_channels=3, **SMALL))
    assert not plain._forward_hooks and not plain._forward_pre_hooks
    assert plain.input_blocks[0][0].weight.shape[1] == 3


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_and_its_forward_derivative(name):
    net = network(name, side=8, attention_resolutions="2").double()
    x, dx = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64)
    t, dt = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([0.1, 0.2], dtype=torch.float64)
    y = torch.tensor([0, 2])
    with forward_mode():
        out, moved = torch.func.jvp(lambda x, t: net(x, t, y), (x, t), (dx, dt))
    assert out.shape == x.shape
    with torch.no_grad():
        step = 1e-6
        difference = (net(x + step * dx, t + step * dt, y) - net(x - step * dx, t - step * dt, y)) / (
            2 * step
        )
    torch.testing.assert_close(moved, difference, rtol=0, atol=1e-5 * float(difference.abs().max()))


def test_the_head_of_edm2_is_no_image():
    net = network("edm2")
    out, logvar = net(torch.randn(2, 1, 16, 16), torch.randn(2), torch.tensor([0, 2]), return_logvar=True)
    assert out.shape == (2, 1, 16, 16) and logvar.shape == (2,)


def test_a_classifier_takes_patches_and_gives_logits():
    architecture = Architecture(image_size=16, patch_size=2, attention_resolutions="8", **SMALL)
    assert build_network(architecture, classifier=True)(torch.randn(2, 3, 16, 16), torch.randn(2)).shape == (
        2,
        3,
    )


FLAGS = "--image_size 28 --patch_size 2 --num_channels 32 --channel_mult 1,1 --num_heads 1"


def test_flags_that_do_not_fit():
    assert parse_config(EdmTrainConfig, FLAGS.split()).patch_size == 2
    with pytest.raises(UserError, match="--image_size 28 is not a multiple of --patch_size 3"):
        parse_config(EdmTrainConfig, [*FLAGS.split(), "--patch_size", "3"])
    with pytest.raises(UserError, match="--image_size 28 / --patch_size 2 is not a multiple of 4"):
        parse_config(EdmTrainConfig, [*FLAGS.split(), "--channel_mult", "1,1,1"])
    with pytest.raises(
        UserError, match=r"--attention_resolutions 28 is not a resolution of the network \(14, 7\)"
    ):
        parse_config(EdmTrainConfig, [*FLAGS.split(), "--attention_resolutions", "28"])


def test_a_student_takes_the_patches_of_its_teacher():
    stored = {"network": "adm", "image_size": 28, "patch_size": 2, "channel_mult": "1,1", "num_channels": 32}
    student = adopt_teacher(configure(CmTrainConfig, num_heads=1), stored, "teacher.pt")
    assert (student.image_size, student.patch_size) == (28, 2)


def test_a_patched_network_keeps_what_one_of_its_own_side_keeps():
    shape = {"num_channels": 32, "channel_mult": "1,1", "num_heads": 1, "in_channels": 1}
    outer = configure(EdmTrainConfig, image_size=16, patch_size=2, **shape)
    inner = configure(EdmTrainConfig, image_size=8, **shape)
    assert bytes_per_image(outer) - bytes_per_image(inner) == 40 * (16**2 - 8**2)
