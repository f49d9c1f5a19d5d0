"""EDM2's U-Net and sCM's forms of EDM2 and DDPM++: golden numbers, sizes, uncertainty, forced normalisation."""

import copy
import math

import pytest
import torch

from cm.config.rows import NETWORKS
from cm.config.scripts import CmTrainConfig, EdmTrainConfig, configure
from cm.config.validation import validate
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.precond import EDMPrecond
from cm.errors import UserError
from cm.models.factory import create_network
from cm.networks.architecture import Architecture, build_network
from cm.networks.edm2 import Block, EDM2UNet
from cm.networks.magnitude import MPConv, normalize
from cm.networks.song_unet import SongUNet
from cm.objectives.edm import edm_losses
from cm.objectives.forward_mode import forward_mode
from cm.training.mixed_precision import MixedPrecisionTrainer
from tests.helpers.golden_data import GoldenFile, later

CLOSE = dict(rtol=1e-4, atol=1e-5)


def golden_network(g: GoldenFile) -> EDM2UNet:
    """The whole network of edm2_net.npz, in eval mode."""
    n = g.config["network"]
    same = (
        "label_balance",
        "concat_balance",
        "res_balance",
        "attn_balance",
        "clip_act",
        "dropout",
        "logvar_channels",
    )
    net = unet(n, n["img_channels"], **{name: n[name] for name in same})
    net.load_state_dict({k.removeprefix("unet."): v for k, v in g.state_dict("net/sd/").items()})
    return net.eval()


def unet(n: dict, channels: int, **given) -> EDM2UNet:
    """A network by the names of EDM2's own arguments."""
    return EDM2UNet(
        image_size=n["img_resolution"],
        in_channels=channels,
        out_channels=channels,
        model_channels=n["model_channels"],
        channel_mult=tuple(n["channel_mult"]),
        num_res_blocks=n["num_blocks"],
        attention_resolutions=tuple(n["attn_resolutions"]),
        num_head_channels=n["channels_per_head"],
        num_classes=n["label_dim"] or None,
        **given,
    )


def test_golden_blocks():
    g = later("edm2_net")
    for kind, options in g.config["blocks"].items():
        given = dict(options)
        heads = given["out_channels"] // given.pop("channels_per_head")
        sizes = [given.pop(name) for name in ("in_channels", "out_channels", "emb_channels")]
        block = Block(*sizes, num_heads=heads, **given).eval()
        block.load_state_dict(g.state_dict(f"block/{kind}/sd/"))
        out = block(g.tensor(f"block/{kind}/x"), g.tensor("block/emb"))
        torch.testing.assert_close(out, g.tensor(f"block/{kind}/out"), **CLOSE)


def test_golden_network():
    g = later("edm2_net")
    net = golden_network(g)
    expected = [k.removeprefix("unet.") for k in g.state_dict("net/sd/")]
    assert list(net.state_dict()) == expected, "the state dict is EDM2's, in its order"
    assert sum(p.numel() for p in net.parameters()) == g.config["network"]["params"]
    denoiser = Denoiser(net, EDMPrecond(g.config["network"]["sigma_data"], time_scale=1.0))
    x, sigma, y = (g.tensor(f"net/{name}") for name in ("x_t", "sigma", "y"))
    raw, denoised = denoiser.raw(x, sigma, y=y)
    torch.testing.assert_close(raw, g.tensor("net/unet_out"), **CLOSE)
    torch.testing.assert_close(denoised, g.tensor("net/D"), **CLOSE)
    without = denoiser(x, sigma, y=torch.full_like(y, -1))
    torch.testing.assert_close(without, g.tensor("net/D_without_label"), **CLOSE)
    both = denoiser.with_logvar(x, sigma, y=y)
    torch.testing.assert_close(both[0], denoised, rtol=0, atol=0)
    torch.testing.assert_close(both[1], g.tensor("net/logvar"), **CLOSE)


def test_golden_uncertainty_loss():
    g = later("edm2_net")
    net = golden_network(g)
    sigma_data = g.config["network"]["sigma_data"]
    denoiser = Denoiser(net, EDMPrecond(sigma_data, time_scale=1.0))
    x0, noise, sigma, y = (g.tensor(f"net/{name}") for name in ("x0", "noise", "sigma", "y"))
    torch.testing.assert_close(sigma**-2 + sigma_data**-2, g.tensor("net/edm2_loss_weight"), **CLOSE)
    found = edm_losses(denoiser, x0, sigma, noise, lambda t: t**-2 + sigma_data**-2, uncertainty=True, y=y)
    torch.testing.assert_close(found["loss"], g.tensor("net/edm2_loss_per_sample"), **CLOSE)
    found["loss"].mean().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    for name, norm in g.config["grad_norms"].items():
        gradient = gradients[name.removeprefix("unet.")]
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3), name
    for key in g.keys("net/grad_of_mean_loss/"):
        expected = g.tensor(key)
        gradient = gradients[key.removeprefix("net/grad_of_mean_loss/").removeprefix("unet.")]
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_golden_forced_normalisation():
    g = later("edm2_net")
    net = golden_network(g).train()
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net(g.tensor("net/x_t"), g.tensor("net/sigma").log() / 4, g.tensor("net/y"))
    assert all(torch.equal(before[k], t) for k, t in net.state_dict().items()), "a pass changes nothing"
    net.project(dict(net.named_parameters()))
    for key in g.keys("net/after_train_forward/"):
        name = key.removeprefix("net/after_train_forward/").removeprefix("unet.")
        torch.testing.assert_close(net.state_dict()[name], g.tensor(key), **CLOSE)
    filters = [m.weight.flatten(1).square().mean(1).sqrt() for m in net.modules() if isinstance(m, MPConv)]
    sizes = torch.cat(filters)
    low, high = g.config["rms_after_forced_wn_range"]
    assert (sizes.min().item(), sizes.max().item()) == pytest.approx((low, high), rel=1e-5)
    for name in ("out_gain", "emb_fourier.freqs", "enc.8x8_block0.emb_gain"):
        if name in before:
            assert torch.equal(net.state_dict()[name], before[name]), "gains and buffers are left alone"


@pytest.mark.parametrize("network", ["edm2", "ddpmpp"])
def test_golden_double_normalisation(network):
    """out, jvp and gradient; ddpmpp's numbers are float64, edm2's fp32."""
    g = later("scm_net")
    n = g.config["networks"][network]
    state = g.state_dict(f"{network}/sd/")
    channels = g[f"{network}/u"].shape[1]
    if network == "edm2":
        net = unet(n, channels, logvar_channels=0, double_norm=True)
    else:
        net = SongUNet(
            in_channels=channels,
            out_channels=channels,
            embedding="positional",
            embedding_mult=1,
            taps=(1, 1),
            input_pyramid=False,
            double_norm=True,
            **{
                k: tuple(v) if isinstance(v, list) else v
                for k, v in n.items()
                if k not in ("rule", "grad_norms")
            },
        )
    assert list(net.state_dict()) == list(state)
    net.load_state_dict(state)
    dtype = g.tensor(f"{network}/out").dtype
    net = net.to(dtype).eval()
    exact = CLOSE if dtype == torch.float32 else dict(rtol=1e-6, atol=1e-7)
    u, t, y = (g.tensor(f"{network}/{name}") for name in ("u", "t", "y"))
    torch.testing.assert_close(net(u, t, y), g.tensor(f"{network}/out"), **exact)
    directions = (g.tensor(f"{network}/du"), g.tensor(f"{network}/dt"))
    with forward_mode():
        _, moved = torch.func.jvp(lambda u, t: net(u, t, y), (u, t), directions)
    expected = g.tensor(f"{network}/jvp")
    tolerance = 1e-4 if dtype == torch.float32 else 1e-7
    torch.testing.assert_close(moved, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    if f"{network}/v" in g:
        (net(u, t, y) * g.tensor(f"{network}/v")).sum().backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        for name, norm in n["grad_norms"].items():
            assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-6), name
        for key in g.keys(f"{network}/grad_of_sum_out_v/"):
            gradient = gradients[key.rpartition("/")[2]]
            torch.testing.assert_close(gradient.float(), g.tensor(key), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "millions"),
    [(128, 124.7), (192, 280.2), (256, 497.8), (320, 777.5), (384, 1119.3), (448, 1523.2)],
)
def test_sizes_of_the_published_networks(width, millions):
    flags = {
        "num_channels": width,
        "num_res_blocks": 3,
        "num_head_channels": 64,
        "attention_resolutions": "16,8",
    }
    with torch.device("meta"):
        net = build_network(Architecture(network="edm2", image_size=64, num_classes=1000, **flags))
        scm = build_network(Architecture(network="edm2_scm", image_size=64, num_classes=1000, **flags))
    count = sum(p.numel() for p in net.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)
    if width == 192:
        assert (sum(p.numel() for p in scm.parameters()) - count) / 1e6 == pytest.approx(13.7, abs=0.06)


TINY = {
    "image_size": 8,
    "num_channels": 16,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": "4",
    "num_heads": 1,
}


def tiny(network: str = "edm2", **options):
    """A small network without labels whose output is not zero."""
    torch.manual_seed(0)
    given = {k: options.pop(k) for k in ("dropout",) if k in options}
    net = build_network(Architecture(network=network, **TINY, **given), options=options)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("gain"):
                p.fill_(0.7)
    return net


def test_dropout_acts_on_the_chosen_resolutions():
    net = tiny(dropout=0.4, dropout_resolutions="4")
    rates = {name: m.p for name, m in net.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {rate for name, rate in rates.items() if ".4x4_" in name} == {0.4}
    assert {rate for name, rate in rates.items() if ".8x8_" in name} == {0.0}
    everywhere = tiny(dropout=0.4)
    assert {m.p for m in everywhere.modules() if isinstance(m, torch.nn.Dropout)} == {0.4}
    with pytest.raises(
        UserError, match=r"--dropout_resolutions 16 is not a resolution of the network \(8, 4\)"
    ):
        tiny(dropout_resolutions="16")


@pytest.mark.parametrize("network", ["edm2", "edm2_scm"])
def test_the_head_is_trained_on_request_and_takes_part_always(network):
    net = tiny(network)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([-1.0, 0.1, 1.0])
    plain, (out, u) = net(x, t), net(x, t, return_logvar=True)
    assert torch.equal(plain, out) and u.shape == (3,)
    plain.sum().backward()
    head = net.logvar_linear.weight
    assert head.grad is not None and not head.grad.any()
    net.logvar(t).sum().backward()
    assert head.grad.any()
    bare = tiny(network, logvar_channels=0)
    assert not any(name.startswith("logvar") for name in bare.state_dict())
    with pytest.raises(ValueError, match="no head"):
        bare(x, t, return_logvar=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_optimizer_step_ends_with_weights_of_unit_size(precision):
    net = tiny()
    trainer = MixedPrecisionTrainer(model=net, precision=precision)
    optimizer = torch.optim.SGD(trainer.master_params, lr=1.0)
    names = dict(zip(trainer.weights.names, trainer.master_params, strict=True))
    gain = names["out_gain"].item()
    x, t = torch.randn(4, 3, 8, 8), torch.linspace(-1, 1, 4)
    trainer.backward(net(x, t).square().sum())
    assert trainer.optimize(optimizer)
    weight = names["enc.8x8_block0.conv_res0.weight"]
    torch.testing.assert_close(weight.detach(), normalize(weight.detach()), rtol=1e-3, atol=1e-3)
    assert weight.square().mean().sqrt().item() == pytest.approx(1, abs=1e-3)
    assert names["out_gain"].item() != gain
    model = dict(net.named_parameters())["enc.8x8_block0.conv_res0.weight"]
    torch.testing.assert_close(model.detach().float(), weight.detach(), rtol=1e-2, atol=1e-3)


def test_a_missing_label_is_an_error():
    g = later("edm2_net")
    with pytest.raises(ValueError, match=r"needs labels of .* classes, but y is missing"):
        golden_network(g)(g.tensor("net/x_t"), g.tensor("net/sigma").log() / 4)


def test_half_precision_follows_single():
    net = tiny()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([-1.0, 1.0])
    expected = net(x, t)
    net.convert_torso(torch.bfloat16)
    assert net.dtype == torch.bfloat16 and net.out_conv.weight.dtype == torch.float32
    out = net(x, t)
    assert out.dtype == torch.float32
    assert (out - expected).norm() < 0.03 * expected.norm()


def test_checkpointing_changes_nothing():
    net, x = tiny(), torch.randn(2, 3, 8, 8)
    t = torch.tensor([-1.0, 1.0])
    again = copy.deepcopy(net)
    for module in again.modules():
        if isinstance(module, Block):
            module.use_checkpoint = True
    for n in (net, again):
        n(x, t).square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_flags_that_do_not_fit():
    def refuses(message, cls=EdmTrainConfig, **flags):
        with pytest.raises(UserError, match=message) as caught:
            validate(configure(cls, **{**TINY, "network": "edm2", **flags}))
        assert "\n" not in str(caught.value)

    refuses("--uncertainty True needs a network with a head", uncertainty=True, logvar_channels=0)
    refuses("--uncertainty True needs a network with a head", uncertainty=True, network="ddpmpp")
    refuses("--uncertainty True is not for", uncertainty=True, diffusion_schedule="cosine")
    refuses(
        "--lr_schedule inverse_sqrt needs --lr_anneal_steps",
        lr_schedule="inverse_sqrt",
        total_training_steps=9,
    )
    refuses("--num_head_channels 24 does not divide a level of 32 channels", num_head_channels=24)
    config = configure(CmTrainConfig, **TINY, network="edm2", logvar_channels=32, dropout_resolutions="8")
    with torch.device("meta"):
        assert create_network(config).state_dict()["logvar_fourier.freqs"].shape == (32,)
    assert NETWORKS["edm2"].clock == 1.0
    assert math.isclose(configure(EdmTrainConfig, network="ncsnpp", fourier_scale=0.02).fourier_scale, 0.02)


def test_frequencies_of_ncsnpp_have_the_chosen_scale():
    torch.manual_seed(0)
    net = build_network(
        Architecture(network="ncsnpp", **{**TINY, "num_channels": 256}), options={"fourier_scale": 0.02}
    )
    assert net.map_noise.freqs.std().item() == pytest.approx(0.02, rel=0.15)
