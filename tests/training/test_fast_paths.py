"""Every fast path of the networks gives the numbers and gradients of the plain formula."""

import pytest
import torch
import torch.nn.functional as F

from cm.config.scripts import SampleConfig, configure
from cm.models.factory import create_network
from cm.networks.attention import AttentionBlock, channel_mix, pointwise
from cm.networks.song_unet import SKIP_SCALE, SongBlock
from cm.nn import append_dims, conv_nd, modulated_norm, normalization
from cm.objectives.forward_mode import forward_mode
from cm.tools.bench.runs import randomized


def plain_modulation(norm, x, scale, shift):
    """norm(x) (1 + scale) + shift, operation by operation."""
    return norm(x) * append_dims(1 + scale, x.ndim) + append_dims(shift, x.ndim)


def modulation_inputs(spatial, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    norm = normalization(64).to(dtype)
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_(generator=generator)
    x = 3 + torch.randn(3, 64, *spatial, generator=generator, dtype=dtype)
    scale, shift = torch.randn(2, 3, 64, generator=generator, dtype=dtype)
    return norm, x, scale, shift


@pytest.mark.parametrize("spatial", [(8,), (4, 6), (2, 4, 6)])
def test_modulation_inside_the_norm(spatial):
    norm, *inputs = modulation_inputs(spatial, torch.float64)
    inputs = [v.requires_grad_() for v in inputs]
    weights = [*inputs, *norm.parameters()]
    fast, plain = modulated_norm(norm, *inputs), plain_modulation(norm, *inputs)
    torch.testing.assert_close(fast, plain)
    target = torch.randn(fast.shape, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((y * target).sum(), weights) for y in (fast, plain))):
        torch.testing.assert_close(a, b)


def test_modulation_in_forward_mode():
    norm, *inputs = modulation_inputs((4, 4), torch.float64)
    tangents = tuple(torch.randn_like(v) for v in inputs)
    found, expected = (
        torch.func.jvp(lambda *v, f=f: f(norm, *v), tuple(inputs), tangents)[1]
        for f in (modulated_norm, plain_modulation)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modulation_in_half_precision_and_other_layouts(dtype):
    norm, x, scale, shift = modulation_inputs((4, 4))
    expected = plain_modulation(norm, x, scale, shift)
    last = modulated_norm(norm, x.to(memory_format=torch.channels_last), scale, shift)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, expected)
    half = modulated_norm(norm, x.to(dtype), scale.to(dtype), shift.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), expected, atol=0.15, rtol=0.05)


@pytest.mark.parametrize(("batch", "length"), [(2, 8), (3, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_channel_mix_is_a_linear_layer(batch, length, transposed):
    tokens = torch.randn(batch, length, 32)
    if transposed:  # the view that a feature map in torch's default layout gives
        tokens = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    weight, bias = torch.randn(48, 32), torch.randn(48)
    inputs = [v.requires_grad_() for v in (tokens, weight, bias)]
    found, expected = channel_mix(*inputs), F.linear(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    target = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad((y * target).sum(), inputs) for y in (found, expected))):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
def test_gradients_of_pointwise_layers_keep_the_layout_of_their_weights(dims, last):
    conv = conv_nd(dims, 32, 96, 1)
    if last and dims == 2:
        conv = conv.to(memory_format=torch.channels_last)
    pointwise(conv, torch.randn(2, 8, 32)).sum().backward()
    assert conv.weight.grad.stride() == conv.weight.stride()


@pytest.mark.parametrize("last", [False, True])
def test_attention_by_its_formula(last):
    block = randomized(AttentionBlock(64, num_heads=2))
    x = torch.randn(2, 64, 4, 4)
    qkv = F.conv2d(F.group_norm(x, 32, block.norm.weight, block.norm.bias), block.qkv.weight, block.qkv.bias)
    q, k, v = qkv.reshape(2, 3, 2, 32, 16).unbind(1)
    weights = torch.softmax(torch.einsum("bhcq,bhck->bhqk", q, k) * 32**-0.5, dim=-1)
    attended = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(2, 64, 4, 4)
    expected = x + F.conv2d(attended, block.proj_out.weight, block.proj_out.bias)
    if last:
        block, x = (v.to(memory_format=torch.channels_last) for v in (block, x))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("resample", ["none", "up", "down"])
def test_sums_in_place_of_the_score_sde_block(resample):
    block = randomized(SongBlock(32, 64, 16, resample=resample, attention=True)).double()
    x, emb = torch.randn(2, 32, 8, 8, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)

    def plain(x):
        h = block.conv0(F.silu(block.norm0(x))) + block.affine(emb)[:, :, None, None]
        y = (block.skip(x) + block.conv1(F.silu(block.norm1(h)))) * SKIP_SCALE
        return (y + block._attend(y)) * SKIP_SCALE

    before = x.clone()
    torch.testing.assert_close(block(x, emb), plain(x))
    assert torch.equal(x, before)
    with forward_mode():
        found, expected = (
            torch.func.jvp(f, (x,), (torch.ones_like(x),))[1] for f in (lambda v: block(v, emb), plain)
        )
    torch.testing.assert_close(found, expected)
    leaves = [x.requires_grad_(), *block.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (block(x, emb), plain(x)))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("network", ["adm", "ncsnpp"])
def test_forward_mode_of_channels_last_networks(network):
    flags = {"image_size": 8, "num_channels": 32, "channel_mult": "1,2", "attention_resolutions": "4"}
    config = configure(SampleConfig, network=network, num_res_blocks=1, in_channels=3, **flags)
    net = randomized(create_network(config))
    x, direction = torch.randn(2, 2, 3, 8, 8)
    times = torch.randn(2)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net, image, slope = (v.to(memory_format=layout) for v in (net, x, direction))
        with forward_mode():
            found.append(torch.func.jvp(net, (image, times), (slope, times)))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)
