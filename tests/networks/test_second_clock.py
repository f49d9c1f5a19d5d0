"""The second clock of networks: layouts and numbers of CTM's and MeanFlow's U-Nets, and one-time weights that go on."""

import pytest
import torch

from cm.networks.architecture import Architecture, build_network
from cm.networks.second_clock import widened
from cm.networks.song_unet import SongUNet
from cm.objectives.forward_mode import forward_mode
from tests.helpers.golden_data import later

CLOSE = dict(rtol=1e-4, atol=1e-4)


def published(arguments: dict, form: str, **more: bool) -> SongUNet:
    """A SongUNet by the arguments that the golden files list."""
    a = arguments
    return SongUNet(
        image_size=a["img_resolution"],
        in_channels=a["in_channels"],
        out_channels=a["out_channels"],
        model_channels=a["model_channels"],
        channel_mult=tuple(a["channel_mult"]),
        num_res_blocks=a["num_blocks"],
        attention_resolutions=tuple(a["attn_resolutions"]),
        num_classes=a.get("label_dim"),
        augment_dim=a.get("augment_dim", 0),
        embedding=a["embedding_type"],
        embedding_mult=a["channel_mult_noise"],
        emb_mult=a["channel_mult_emb"],
        taps=tuple(a["resample_filter"]),
        input_pyramid=a["encoder_type"] == "residual",
        second_clock=form,
        qkv_first=form == "joined",
        **more,
    ).eval()


def check_norms(net: torch.nn.Module, norms: dict[str, float]) -> None:
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert set(norms) == set(gradients)
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp_cond"])
def test_golden_ctm(name):
    g = later("ctm_unet")
    about = g.config[name]
    net = published(about["arguments"], "added")
    state = g.state_dict(f"{name}/sd/")
    assert list(net.state_dict()) == list(state)
    assert sum(p.numel() for p in net.parameters()) == about["parameters"]
    net.load_state_dict(state)
    x, t, s = (g.tensor(f"{name}/{key}") for key in "xts")
    t, s = t.log() / 4, s.log() / 4
    one_hot = g.tensor(f"{name}/labels_onehot") if net.num_classes else None
    x.requires_grad_()
    out = net(x, t, None if one_hot is None else one_hot.argmax(1), second=s)
    torch.testing.assert_close(out, g.tensor(f"{name}/out"), **CLOSE)
    (out * g.tensor(f"{name}/v")).sum().backward()
    expected = g.tensor(f"{name}/grad_x")
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    check_norms(net, about["grad_norms"])


def test_golden_meanflow():
    g = later("meanflow")
    about = g.config["unet"]
    net = published(about["arguments"], "joined")
    state = g.state_dict("unet/sd/")
    assert list(net.state_dict()) == list(state)
    assert sum(p.numel() for p in net.parameters()) == about["parameters"]
    net.load_state_dict(state)
    x, t, h, aug, v = (g.tensor(f"unet/{key}") for key in ("x", "t", "h", "aug", "v"))
    torch.testing.assert_close(net(x, t, second=h), g.tensor("unet/out"), **CLOSE)
    torch.testing.assert_close(net(x, t, None, aug, h), g.tensor("unet/out_aug"), **CLOSE)
    # t moves and r does not, so h moves as t does.
    with forward_mode():
        directions = (v, torch.ones_like(t), torch.ones_like(h))
        _, moved = torch.func.jvp(lambda x, t, h: net(x, t, second=h), (x, t, h), directions)
    expected = g.tensor("unet/dudt")
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


SECOND = torch.tensor([-1.5, 0.9]).double()
SMALL = dict(image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1,1", attention_resolutions="4")
CASES = [
    ("adm", {"num_classes": 3, "num_channels": 64}),  # of 32, a norm of one channel each forgets the time
    ("adm", {"use_scale_shift_norm": True, "resblock_updown": True, "use_checkpoint": True}),
    ("ncsnpp", {"num_classes": 3, "augment_dim": 9}),
    ("ddpmpp", {"use_checkpoint": True}),
    ("ddpmpp_scm", {}),
    ("ddpmpp_meanflow", {"num_classes": 3, "augment_dim": 9}),
    ("edm2", {"num_classes": 3}),
    ("edm2_scm", {"use_checkpoint": True}),
]


def pair(network: str, changes: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A network with random weights everywhere, and the same with a second clock."""
    torch.manual_seed(0)
    old, new = (
        build_network(Architecture(network=network, **(SMALL | changes), two_times=two))
        for two in (False, True)
    )
    with torch.no_grad():
        for p in old.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return old.double().eval(), new.double().eval()


def inputs(net: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, dict]:
    y = {"y": torch.tensor([2, 0])} if net.num_classes else {}
    return torch.randn(2, 3, 8, 8).double(), torch.tensor([0.3, -1.0]).double(), y


@pytest.mark.parametrize(("network", "changes"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_a_checkpoint_of_one_time_goes_on_as_one_of_two(network, changes):
    old, new = pair(network, changes)
    new.load_state_dict(widened(new, old.state_dict()))
    x, t, y = inputs(old)
    expected = old(x, t, **y)
    for second in (torch.zeros(2).double(), SECOND):
        torch.testing.assert_close(new(x, t, second=second, **y), expected, rtol=1e-12, atol=1e-12)
    assert all(
        torch.equal(a, b) for a, b in zip(widened(new, new.state_dict()).values(), new.state_dict().values())
    )
    # It learns to listen: the gradient of what was zero is not.
    (new(x, t, second=SECOND, **y) ** 2).sum().backward()
    with torch.no_grad():
        for p in new.parameters():
            if p.grad is not None:
                p.sub_(0.1 * p.grad / (p.grad.norm() + 1e-12))
    low, high = (new(x, t, second=torch.full_like(t, s), **y) for s in (-1.0, 1.0))
    assert (low - high).abs().max() > 1e-9
    # Both clocks of an image are its own.
    swapped = new(x.flip(0), t.flip(0), second=SECOND.flip(0), **{k: v.flip(0) for k, v in y.items()})
    torch.testing.assert_close(swapped.flip(0), new(x, t, second=SECOND, **y), rtol=1e-10, atol=1e-12)


def test_a_second_clock_is_given_to_those_that_have_one():
    old, new = pair("ddpmpp", {})
    x, t, _ = inputs(old)
    with pytest.raises(ValueError, match="the network has two times"):
        new(x, t)
    with pytest.raises(ValueError, match="the network has one time, not two"):
        old(x, t, second=t)
    with pytest.raises(ValueError, match="the second clock has shape"):
        new(x, t, second=t[:1])
    with pytest.raises(ValueError, match="second_clock must be empty or one of added"):
        published(later("ctm_unet").config["ddpmpp"]["arguments"], "first")


def test_weights_that_do_not_fit_stay_as_they_are():
    old, new = pair("ddpmpp_meanflow", {})
    state = old.state_dict()
    state["map_layer0.weight"] = state["map_layer0.weight"][:, :5]
    assert widened(new, state)["map_layer0.weight"].shape[1] == 5
    assert widened(old, state) == state
