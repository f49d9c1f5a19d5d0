"""NCSN++ and DDPM++: parameter counts, names, outputs against a restatement by name, derivatives, precisions."""

import math

import pytest
import torch

from cm.networks.layers import (
    DownConv,
    FourierEmbedding,
    PositionalEmbedding,
    PyramidConv,
    UpConv,
    fir_down,
    fir_kernel,
    fir_up,
)
from cm.networks.song_unet import SongUNet
from cm.objectives.forward_mode import forward_mode
from tests.helpers import edm_reference as reference

VARIANTS = {
    "ncsnpp": dict(embedding="fourier", embedding_mult=2, taps=(1, 3, 3, 1), input_pyramid=True),
    "ddpmpp": dict(embedding="positional", embedding_mult=1, taps=(1, 1), input_pyramid=False),
}


def cifar10(variant: str, **changes) -> SongUNet:
    """The CIFAR-10 network on the meta device."""
    options = dict(
        image_size=32,
        in_channels=3,
        out_channels=3,
        model_channels=128,
        channel_mult=(2, 2, 2),
        num_res_blocks=4,
        attention_resolutions=(16,),
    )
    with torch.device("meta"):
        return SongUNet(**{**options, **VARIANTS[variant], **changes})


def narrow(variant: str, dtype=torch.float64, **changes) -> SongUNet:
    """A small network of three levels with random weights everywhere."""
    options = dict(
        image_size=16,
        in_channels=3,
        out_channels=3,
        model_channels=16,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
    )
    net = SongUNet(**{**options, **VARIANTS[variant], **changes}).to(dtype)
    net.load_state_dict(reference.randomize(net.state_dict()))
    return net.eval()


def batch(size: int = 2, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and c_noise of noise levels from 0.002 to 80."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, 16, 16, generator=generator, dtype=dtype)
    return x, torch.linspace(math.log(0.002), math.log(80), size, dtype=dtype) / 4


@pytest.mark.parametrize(
    ("changes", "ncsnpp", "ddpmpp"),
    [
        ({}, 56_395_523, 55_732_739),
        ({"augment_dim": 9}, 56_397_827, 55_733_891),
        ({"augment_dim": 9, "num_classes": 10}, 56_400_643, 55_735_299),
        ({"num_res_blocks": 8}, 97_610_499, 96_947_715),
        ({"image_size": 64, "channel_mult": (1, 2, 2, 2), "augment_dim": 9}, 62_761_091, 61_805_571),
    ],
)
def test_parameter_counts_of_the_published_networks(changes, ncsnpp, ddpmpp):
    assert sum(p.numel() for p in cifar10("ncsnpp", **changes).parameters()) == ncsnpp
    assert sum(p.numel() for p in cifar10("ddpmpp", **changes).parameters()) == ddpmpp


@pytest.mark.parametrize(("variant", "entries"), [("ncsnpp", 431), ("ddpmpp", 424)])
def test_state_dict_has_the_names_and_order_of_edm(variant, entries):
    assert len(cifar10(variant).state_dict()) == entries
    state = cifar10(variant, num_classes=10, augment_dim=9).state_dict()
    assert len(state) == entries + 3
    names = [n for n in state if n.startswith("map")]
    expected = ["map_label.weight", "map_label.bias", "map_augment.weight"]
    expected += [f"map_layer{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")]
    assert names == (["map_noise.freqs"] if variant == "ncsnpp" else []) + expected

    kinds = [kind for kind, _ in reference.layers(state, "enc")]
    blocks = [f"block{i}" for i in range(4)]
    step = ["down", "aux_residual"] if variant == "ncsnpp" else ["down"]
    assert kinds == ["conv", *blocks, *step, *blocks, *step, *blocks]
    blocks = [f"block{i}" for i in range(5)]
    kinds = [kind for kind, _ in reference.layers(state, "dec")]
    assert kinds == ["in0", "in1", *blocks, "up", *blocks, "up", *blocks, "aux_norm", "aux_conv"]
    attention = {n.rsplit(".", 2)[0] for n in state if n.endswith("qkv.weight")}
    assert attention == {f"enc.16x16_block{i}" for i in range(4)} | {"dec.8x8_in0", "dec.16x16_block4"}

    shapes = {n: tuple(t.shape) for n, t in state.items()}
    taps = 4 if variant == "ncsnpp" else 2
    assert shapes["map_layer0.weight"] == (512, 256 if variant == "ncsnpp" else 128)
    assert shapes["enc.16x16_down.conv0.resample_filter"] == (1, 1, taps, taps)
    assert shapes["dec.32x32_up.skip.resample_filter"] == (1, 1, taps, taps)
    assert shapes["dec.16x16_block4.qkv.weight"] == (768, 256, 1, 1)
    assert shapes["dec.32x32_block4.norm0.weight"] == (384,)
    assert shapes["dec.8x8_block0.conv0.weight"] == (256, 512, 3, 3)
    assert "enc.32x32_block0.skip.weight" in state and "enc.32x32_block1.skip.weight" not in state
    assert "dec.8x8_in1.skip.weight" not in state
    if variant == "ncsnpp":
        assert shapes["enc.16x16_aux_residual.weight"] == (256, 3, 3, 3)
        assert shapes["enc.8x8_aux_residual.weight"] == (256, 256, 3, 3)
        assert shapes["map_noise.freqs"] == (128,)
    members = [n.split("dec.16x16_up.")[1] for n in state if n.startswith("dec.16x16_up.")]
    expected = ["norm0", "conv0", "affine", "norm1", "conv1", "skip"]
    assert list(dict.fromkeys(n.split(".")[0] for n in members)) == expected
    assert [n for n in members if n.startswith("conv0")] == [
        "conv0.weight",
        "conv0.bias",
        "conv0.resample_filter",
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_equals_the_restatement(variant):
    net = narrow(variant, num_classes=5, augment_dim=9)
    x, c_noise = batch(3)
    y = torch.tensor([4, 0, 2])
    augment = torch.randn(3, 9, dtype=torch.float64)
    expected = reference.song_unet(net.state_dict(), x, c_noise, y, augment)
    torch.testing.assert_close(net(x, c_noise, y, augment), expected, rtol=1e-10, atol=1e-10)
    changed = net(x, c_noise, y.roll(1), augment)
    assert (changed - expected).abs().max() > 1e-3
    assert (net(x, c_noise + 0.01, y, augment) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_unconditional_output_in_fp32_equals_the_restatement(variant):
    net = narrow(variant, torch.float32, num_res_blocks=2)
    x, c_noise = batch(2, torch.float32)
    state = {n: t.double() for n, t in net.state_dict().items()}
    expected = reference.song_unet(state, x.double(), c_noise.double())
    torch.testing.assert_close(net(x, c_noise).double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 3, 3, 2, 1)])
def test_resampling_equals_its_definition(taps):
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    kernel = fir_kernel(taps).double()
    assert kernel.sum() == pytest.approx(1)
    torch.testing.assert_close(fir_up(x, kernel), reference.up(x, kernel))
    torch.testing.assert_close(fir_down(x, kernel), reference.down(x, kernel))
    if taps == (1, 1):
        torch.testing.assert_close(fir_up(x, kernel), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        torch.testing.assert_close(fir_down(x, kernel), torch.nn.functional.avg_pool2d(x, 2))


def test_filter_of_odd_or_lopsided_taps_is_refused():
    for taps in ((1, 2, 1), (1, 2), ()):
        with pytest.raises(ValueError, match="symmetric taps"):
            fir_kernel(taps)


@pytest.mark.parametrize("kernel", [1, 3])
def test_resampling_convolutions_filter_first(kernel):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for layer, resample in ((UpConv, reference.up), (DownConv, reference.down)):
        conv = layer(3, 5, kernel, (1, 3, 3, 1)).double()
        state = {f"c.{n}": t for n, t in conv.state_dict().items()}
        expected = reference.conv(resample(x, state["c.resample_filter"]), state, "c")
        torch.testing.assert_close(conv(x), expected)


def test_pyramid_step_convolves_and_filters_the_padded_image():
    conv = PyramidConv(3, 5, (1, 3, 3, 1)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    wide = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=2)
    expected = reference.correlate(wide, conv.resample_filter, 0, 0)[:, :, ::2, ::2]
    torch.testing.assert_close(conv(x), expected)


def test_embeddings_put_sine_first():
    t = torch.tensor([0.3, -1.5], dtype=torch.float64)
    positional = PositionalEmbedding(6)(t)
    torch.testing.assert_close(positional[:, 0], t.sin())
    torch.testing.assert_close(positional[:, 1], (t / 100).sin())
    torch.testing.assert_close(positional[:, 5], (t / 10000).cos())
    torch.manual_seed(0)
    fourier = FourierEmbedding(4096, scale=0.02)
    assert fourier.freqs.std() == pytest.approx(0.02, rel=0.05)
    features = fourier(t.float())
    torch.testing.assert_close(features[:, 2048], (2 * math.pi * t.float() * fourier.freqs[0]).cos())
    torch.testing.assert_close(features[:, 0], (2 * math.pi * t.float() * fourier.freqs[0]).sin())


def test_initial_weights():
    torch.manual_seed(0)
    net = SongUNet(
        image_size=8,
        in_channels=3,
        out_channels=3,
        model_channels=64,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
    )
    block = net.enc["4x4_block0"]
    for layer, fans, scale in [
        (block.conv0, 9 * (64 + 128), 1),
        (block.affine, 256 + 128, 1),
        (block.skip, 64 + 128, 1),
        (block.conv1, 9 * (128 + 128), 1e-10),
        (block.qkv, 128 + 384, 0.2),
        (block.proj, 128 + 128, 1e-10),
        (net.map_layer0, 128 + 256, 1),
        (net.dec["8x8_aux_conv"], 9 * (64 + 3), 1e-10),
    ]:
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 * scale / fans), rel=0.05)
        assert layer.weight.abs().max() <= math.sqrt(6 * scale / fans)
        assert not layer.bias.any()
    assert net.map_noise.freqs.std() == pytest.approx(16, rel=0.25)
    assert net(torch.randn(2, 3, 8, 8), torch.zeros(2)).abs().max() < 1e-4


def test_augmentation_labels_of_zero_mean_none():
    net = narrow("ncsnpp", augment_dim=9)
    x, c_noise = batch()
    none = net(x, c_noise)
    torch.testing.assert_close(net(x, c_noise, augment_labels=torch.zeros(2, 9)), none)
    none.sum().backward()
    assert all(p.grad is not None for p in net.parameters())  # or data-parallel training would fail
    assert (net(x, c_noise, augment_labels=torch.ones(2, 9)) - none).abs().max() > 1e-3


def test_inputs_that_do_not_fit_are_refused_with_both_shapes():
    net = narrow("ddpmpp")
    x, c_noise = batch()
    with pytest.raises(ValueError, match=r"augment_dim 0 needs \(2, 0\)"):
        net(x, c_noise, augment_labels=torch.zeros(2, 9))
    with pytest.raises(ValueError, match="takes no labels"):
        net(x, c_noise, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\(2, 3, 15, 16\)"):
        net(x[:, :, 1:], c_noise)
    with pytest.raises(ValueError, match=r"times have shape \(1,\)"):
        net(x, c_noise[:1])
    with pytest.raises(ValueError, match="needs labels of 5 classes"):
        narrow("ddpmpp", num_classes=5)(x, c_noise)
    with pytest.raises(ValueError, match="image_size 18 is not a multiple of 4"):
        narrow("ddpmpp", image_size=18)
    with pytest.raises(ValueError, match="fourier or positional"):
        narrow("ddpmpp", embedding="learned")


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_mode_derivative_equals_a_finite_difference(variant):
    net = narrow(variant)
    x, c_noise = batch()
    dx, dt = torch.randn_like(x), torch.randn_like(c_noise)
    with forward_mode():
        out, tangent = torch.func.jvp(net, (x, c_noise), (dx, dt))
    step = 1e-5
    difference = (net(x + step * dx, c_noise + step * dt) - net(x - step * dx, c_noise - step * dt)) / (
        2 * step
    )
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, net(x, c_noise))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torso_in_half_precision(dtype):
    net = narrow("ncsnpp", torch.float32)
    x, c_noise = batch(2, torch.float32)
    expected = net(x, c_noise)
    net.convert_torso(dtype)
    assert net.dtype == dtype
    assert net.enc["8x8_aux_residual"].weight.dtype == dtype
    kept = ("enc.8x8_down.conv0.resample_filter", "enc.8x8_block0.norm2.weight", "map_layer0.weight")
    kept += ("enc.8x8_block0.affine.weight", "dec.16x16_aux_conv.weight", "map_noise.freqs")
    assert all(net.state_dict()[name].dtype == torch.float32 for name in kept)
    out = net(x, c_noise)
    assert out.dtype == torch.float32
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()
    net.convert_torso(torch.float32)
    assert net.dtype == torch.float32


def test_checkpointing_changes_no_gradient():
    x, c_noise = batch()
    gradients = []
    for use_checkpoint in (False, True):
        net = narrow("ncsnpp", use_checkpoint=use_checkpoint, dropout=0.3).train()
        torch.manual_seed(3)
        net(x, c_noise).square().sum().backward()
        gradients.append({n: p.grad for n, p in net.named_parameters()})
    assert all(g is not None for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_dropout_acts_in_training_only():
    net = narrow("ddpmpp", dropout=0.5)
    x, c_noise = batch()
    torch.testing.assert_close(net(x, c_noise), net(x, c_noise))
    net.train()
    assert (net(x, c_noise) - net(x, c_noise)).abs().max() > 1e-3


def test_other_image_sides_are_accepted():
    net = narrow("ncsnpp")
    x = torch.randn(1, 3, 8, 12, dtype=torch.float64)
    assert net(x, torch.zeros(1, dtype=torch.float64)).shape == x.shape


def test_the_graph_has_no_breaks():
    net = narrow("ncsnpp", torch.float32, channel_mult=(1, 2))
    x, c_noise = batch(2, torch.float32)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, c_noise), net(x, c_noise))
