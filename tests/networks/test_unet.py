"""The ADM U-Net: released layout, golden values and gradients, precision, derivatives, bad input."""

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

from cm.errors import UserError
from cm.networks.architecture import Architecture, build_network
from cm.networks.unet import Downsample, ResBlock, TimestepEmbedSequential, UNetModel, Upsample
from cm.nn import GroupNorm32
from cm.objectives.forward_mode import forward_mode
from tests.helpers import golden_data
from tests.helpers.models import golden_model, tiny_unet

GOLDEN = [
    "unet_a_basic",
    "unet_b_classcond_updown",
    "unet_c_64_add_updown",
    "unet_d_learnsigma",
    "unet_e_heads_upsample",
    "unet_f_dropout_eval",
    "unet_g_four_levels",
]


def golden_input(g: golden_data.GoldenFile, i: int) -> list[torch.Tensor]:
    """x, t and, where there are classes, y."""
    return [g.tensor(f"in/{i}/{name}") for name in "xty" if f"in/{i}/{name}" in g]


def small(**changes) -> UNetModel:
    """A two-level network of 8 px with attention at both levels and no zero layer, by the class's own keywords."""
    options = dict(
        image_size=8,
        in_channels=3,
        model_channels=32,
        out_channels=3,
        num_res_blocks=1,
        attention_resolutions=(1, 2),
        channel_mult=(1, 2),
        num_heads=2,
    )
    torch.manual_seed(0)
    model = UNetModel(**{**options, **changes})
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return model


@pytest.mark.parametrize("name", ["imagenet64_edm_cd_ct", "lsun256_edm_cd_ct"])
def test_layout_of_the_released_checkpoints(name):
    layout = golden_data.json("checkpoint_layouts")[name]
    options = dict(layout["config"])
    options["num_classes"] = 1000 if options.pop("class_cond") else None
    with torch.device("meta"):
        model = build_network(Architecture(**options))
    assert [[n, list(t.shape)] for n, t in model.state_dict().items()] == layout["state_dict"]
    assert [n for n, _ in model.named_parameters()] == layout["parameter_order"]
    assert sum(p.numel() for p in model.parameters()) == layout["num_parameters"]
    assert (
        layout["num_parameters"]
        == {"imagenet64_edm_cd_ct": 295_899_267, "lsun256_edm_cd_ct": 526_304_771}[name]
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_outputs(name):
    g = golden_data.load(name)
    model = golden_model(g)
    assert list(model.state_dict()) == list(g.state_dict())
    with torch.no_grad():
        for i in range(g.config["n_inputs"]):
            assert_close(model(*golden_input(g, i)), g.tensor(f"out/{i}"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "name", [n for n in GOLDEN if n not in ("unet_c_64_add_updown", "unet_g_four_levels")]
)
def test_golden_gradients(name, memory_format):
    g = golden_data.load(name)
    model = golden_model(g).to(memory_format=memory_format)
    x, *rest = golden_input(g, 0)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    out = model(x, *rest)
    assert out.is_contiguous(memory_format=memory_format)
    (out * g.tensor("grad/v")).sum().backward()
    gradients = {"grad/x": x.grad} | {f"grad/param/{n}": p.grad for n, p in model.named_parameters()}
    for key in g.keys("grad/"):
        if key != "grad/v":
            expected = g.tensor(key)
            assert_close(gradients[key], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    norms = dict(g.config["grad_norms"])
    for n, p in model.named_parameters():
        assert p.grad.norm().item() == pytest.approx(norms[n], rel=1e-3, abs=1e-3)
        assert p.grad.stride() == p.stride(), f"DDP would copy the gradient of {n}"


def test_fresh_network_predicts_zero():
    model = UNetModel(8, 3, 32, 3, 1, (1,), channel_mult=(1,))
    assert not model(torch.randn(1, 3, 8, 8), torch.ones(1)).any()


@pytest.mark.parametrize("scale_shift", [False, True])
def test_residual_block_by_its_parts(scale_shift):
    torch.manual_seed(0)
    block = ResBlock(64, 16, 0.0, 96, use_scale_shift_norm=scale_shift)
    nn.init.normal_(block.out_layers[3].weight, std=0.1)
    nn.init.normal_(block.out_layers[0].weight)
    x, emb = torch.randn(2, 64, 4, 4), torch.randn(2, 16)
    e = block.emb_layers(emb)[:, :, None, None]
    h = block.in_layers(x)
    norm = block.out_layers[0]
    h = norm(h) * (1 + e[:, :96]) + e[:, 96:] if scale_shift else norm(h + e)
    expected = block.skip_connection(x) + block.out_layers[1:](h)
    assert_close(block(x, emb), expected, rtol=1e-5, atol=1e-5)


def test_resampling_blocks_resample_both_paths():
    x, emb = torch.randn(1, 32, 4, 4), torch.zeros(1, 8)
    averaged = nn.functional.avg_pool2d(x, 2)
    assert torch.equal(ResBlock(32, 8, 0.0, down=True)(x, emb), averaged)  # the other path is zero when fresh
    assert torch.equal(
        ResBlock(32, 8, 0.0, up=True)(averaged, emb), averaged.repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    down = ResBlock(32, 8, 0.0, down=True)
    nn.init.normal_(down.out_layers[3].weight)
    norm, activation, conv = down.in_layers
    h = conv(nn.functional.avg_pool2d(activation(norm(x)), 2)) + down.emb_layers(emb)[:, :, None, None]
    assert_close(down(x, emb), averaged + down.out_layers(h))


@pytest.mark.parametrize("use_conv", [False, True])
def test_resampling_layers_in_every_dimension(use_conv):
    for dims, size, up, down in (
        (1, (4,), (8,), (2,)),
        (2, (4, 6), (8, 12), (2, 3)),
        (3, (3, 4, 4), (3, 8, 8), (3, 2, 2)),
    ):
        x = torch.randn(1, 4, *size)
        assert Upsample(4, use_conv, dims, 6)(x).shape == (1, 6 if use_conv else 4, *up)
        assert Downsample(4, use_conv, dims, 6)(x).shape == (1, 6 if use_conv else 4, *down)
    with pytest.raises(ValueError, match=r"\(1, 4, 3, 4, 4\) enter a layer made for 5 channels"):
        Upsample(5, use_conv, 3)(x)


@pytest.mark.parametrize(
    "updown", [{"resblock_updown": True}, {"conv_resample": True}, {"conv_resample": False}]
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_network_in_every_dimension(dims, updown):
    model = small(dims=dims, out_channels=5, **updown)
    x = torch.randn(2, 3, *[3, 4, 6][-dims:])
    out = model(x, torch.tensor([1.0, 500.0]))
    assert out.shape == (2, 5, *x.shape[2:])
    assert not torch.allclose(out[0], out[1])


def test_embedding_goes_to_the_layers_that_take_one():
    # Wider than 32: with one channel per norm group, what is added to a channel cancels.
    sequence = TimestepEmbedSequential(nn.Conv2d(64, 64, 1), ResBlock(64, 8, 0.0))
    nn.init.normal_(sequence[1].out_layers[3].weight)
    x = torch.randn(1, 64, 2, 2)
    assert not torch.allclose(sequence(x, torch.ones(1, 8)), sequence(x, torch.zeros(1, 8)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_torso(dtype):
    model = small(use_scale_shift_norm=True, num_classes=4)
    inputs = torch.randn(2, 3, 8, 8), torch.tensor([-1554.0, 1095.0]), torch.tensor([0, 3])
    assert model.dtype == torch.float32
    exact = model(*inputs)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.convert_torso(dtype)
    assert model.dtype == dtype
    halves = {n for n, p in model.named_parameters() if p.dtype == dtype}
    convolutions = {
        f"{n}.{kind}"
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and not n.startswith("out.")
        for kind in ("weight", "bias")
    }
    assert halves == convolutions
    assert all(m.weight.dtype == torch.float32 for m in model.modules() if isinstance(m, GroupNorm32))
    out = model(*inputs)
    assert out.dtype == torch.float32
    scale = exact.abs().max().item()
    assert 0 < (out - exact).abs().max() < (0.01 if dtype == torch.float16 else 0.08) * scale
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    model.convert_to_fp32()
    assert model.dtype == torch.float32
    model.convert_to_fp16()
    assert model.dtype == torch.float16
    model.convert_to_fp32()
    unchanged = [torch.equal(p, weights[n]) for n, p in model.named_parameters() if n not in convolutions]
    assert all(unchanged)


def test_use_fp16_alone_rounds_nothing():
    model = small(use_fp16=True)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert model(torch.randn(1, 3, 8, 8), torch.ones(1)).dtype == torch.float32


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_forward_derivative_in_image_and_time_equals_finite_differences(use_checkpoint):
    model = tiny_unet(use_checkpoint=use_checkpoint).double()
    torch.manual_seed(1)
    x, dx = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64)
    t, dt = torch.tensor([[10.0, 700.0], [1.0, -1.0]], dtype=torch.float64)
    with forward_mode():
        out, tangent = torch.func.jvp(model, (x, t), (dx, dt))
    assert out.dtype == torch.float64
    step = 1e-5
    difference = (model(x + step * dx, t + step * dt) - model(x - step * dx, t - step * dt)) / (2 * step)
    assert_close(tangent, difference, rtol=1e-5, atol=1e-7)
    if not use_checkpoint:  # recomputation happens outside the forward-mode context, so torch refuses it
        (gradient,) = torch.autograd.grad(tangent.square().sum(), [model.input_blocks[0][0].weight])
        assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("updown", [False, True])
def test_checkpointing_gives_equal_gradients_with_dropout(updown):
    model = small(dropout=0.3, resblock_updown=updown).train()
    recomputing = small(dropout=0.3, resblock_updown=updown, use_checkpoint=True).train()
    recomputing.load_state_dict(model.state_dict())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0])

    def gradients(net):
        torch.manual_seed(5)
        return torch.autograd.grad(net(x, t).square().sum(), list(net.parameters()))

    for plain, recomputed in zip(gradients(model), gradients(recomputing)):
        assert torch.equal(plain, recomputed)


def test_heads_on_the_way_up_may_differ():
    model = small(num_heads=4, num_heads_upsample=2)
    assert model.input_blocks[1][1].num_heads == model.middle_block[1].num_heads == 4
    assert model.output_blocks[0][1].num_heads == 2
    assert small(num_heads=4).output_blocks[0][1].num_heads == 4


@pytest.mark.parametrize("updown", [False, True])
def test_dropout_acts_on_the_chosen_resolutions(updown):
    """By the side of what each layer is given, in the blocks that resample too."""
    model = small(
        image_size=16, channel_mult=(1, 1, 1), resblock_updown=updown, dropout=0.4, dropout_resolutions=(4, 8)
    )
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda m, args, out: seen.append((args[0].shape[-1], m.p)))
    model(torch.zeros(1, 3, 16, 16), torch.ones(1))
    assert {side for side, _ in seen} == {16, 8, 4}
    assert all(p == (0.0 if side == 16 else 0.4) for side, p in seen)
    everywhere = small(dropout=0.4)
    assert {m.p for m in everywhere.modules() if isinstance(m, nn.Dropout)} == {0.4}
    with pytest.raises(
        UserError, match=r"--dropout_resolutions 7 is not a resolution of the network \(8, 4\)"
    ):
        build_network(
            Architecture(
                image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1,1", attention_resolutions="4"
            ),
            options={"dropout_resolutions": "7"},
        )


def test_constructor_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="image_size = 9 is not a multiple of 2"):
        small(image_size=9)
    with pytest.raises(ValueError, match="48 channels cannot be normalised"):
        small(model_channels=48, channel_mult=(1, 2))
    with pytest.raises(ValueError, match="num_head_channels = 24"):
        small(num_head_channels=24)


@pytest.mark.parametrize(
    ("x", "t", "y", "message"),
    [
        ((2, 1, 8, 8), 2, 2, r"\(2, 1, 8, 8\); the network takes \(B, 3, side, side\)"),
        ((2, 3, 8), 2, 2, "the network takes"),
        ((2, 3, 8, 7), 2, 2, r"\(2, 3, 8, 7\); .* sides divisible by 2"),
        ((2, 3, 8, 8), 1, 2, r"times have shape \(1,\)"),
        ((2, 3, 8, 8), 2, None, "needs labels of 4 classes, but y is missing"),
        ((2, 3, 8, 8), 2, 3, r"labels have shape \(3,\)"),
    ],
)
def test_forward_refuses_wrong_shapes(x, t, y, message):
    labels = None if y is None else torch.zeros(y, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        small(num_classes=4)(torch.zeros(x), torch.ones(t), labels)


def test_unconditional_network_takes_no_labels():
    with pytest.raises(ValueError, match="takes no labels, but y is given"):
        small()(torch.zeros(1, 3, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.int64))
