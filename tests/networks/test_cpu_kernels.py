"""What networks do otherwise on CPUs, against the plain operations: norms in channels-last, doubling convolutions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cm.networks.layers import UpConv, fir_up
from cm.nn import ColumnNorm, GroupNorm32, append_dims, conv_doubled, conv_nd, modulated_norm

LAST = torch.channels_last
GROUPS = 4


def norm_inputs(side, per_image):
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(3, 8, side, side + 1, dtype=torch.float64)).to(memory_format=LAST)
    weight, bias = torch.randn(2, *((3, 8) if per_image else (8,)), dtype=torch.float64)
    return tuple(v.requires_grad_() for v in (x, weight, bias))


def column_norm(x, weight, bias):
    return ColumnNorm.apply(x, weight, bias, GROUPS, 1e-5)[0]


def plain_norm(x, weight, bias):
    weight, bias = weight.view(-1, 8), bias.view(-1, 8)
    return append_dims(bias, 4) + append_dims(weight, 4) * F.group_norm(x, GROUPS, eps=1e-5)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("side", [5, 32])  # by column sums, and by torch's kernel forwards
def test_norm_of_columns(side, per_image):
    inputs = norm_inputs(side, per_image)
    found, expected = column_norm(*inputs), plain_norm(*inputs)
    assert found.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(found, expected)
    target = torch.randn_like(expected).contiguous()  # a gradient of another layout
    first = [torch.autograd.grad(y, inputs, target, create_graph=True) for y in (found, expected)]
    for a, b, v in zip(*first, inputs):
        torch.testing.assert_close(a, b)
        assert a.shape == v.shape
    second = [torch.autograd.grad(sum((g**3).sum() for g in grads), inputs[:2]) for grads in first]
    for a, b in zip(*second):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("side", "mean"), [(8, 100), (40, 0)])  # large images: as exact as torch's kernel
def test_a_norm_in_channels_last_goes_by_columns_and_keeps_small_differences(side, mean):
    torch.manual_seed(0)
    norm = GroupNorm32(32, 64)
    x = mean + torch.randn(2, 64, side, side)
    found = norm(x.to(memory_format=LAST))
    assert "ColumnNorm" in type(found.grad_fn).__name__
    exact = F.group_norm(x.double(), 32, eps=norm.eps).float()
    torch.testing.assert_close(found, exact, atol=2e-4, rtol=0)
    wide = GroupNorm32(8, 64)(x.to(memory_format=LAST))
    assert "NativeGroupNorm" in type(wide.grad_fn).__name__


def test_a_tangent_of_the_modulation_alone():
    torch.manual_seed(0)
    norm, x = GroupNorm32(32, 64), torch.randn(2, 64, 4, 4)
    scale, shift, *moved = torch.randn(4, 2, 64)
    found, expected = (
        torch.func.jvp(lambda *v, x=x: modulated_norm(norm, x, *v), (scale, shift), tuple(moved))
        for x in (x.to(memory_format=LAST), x)
    )
    torch.testing.assert_close(found, expected)


def test_norms_of_a_batch_of_batches():
    norm, rows = GroupNorm32(32, 64), torch.randn(3, 2, 64, 4, 4)
    torch.testing.assert_close(torch.func.vmap(norm)(rows), torch.stack([norm(x) for x in rows]))


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("sides", [(4, 6), (2, 8)])
def test_a_convolution_of_a_doubled_image(layout, sides):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 5, 3, padding=1).to(memory_format=layout)
    x = torch.randn(2, 8, *sides).to(memory_format=layout).requires_grad_()
    found, expected = conv_doubled(conv, x), conv(F.interpolate(x, scale_factor=2.0))
    torch.testing.assert_close(found, expected)
    target = torch.randn_like(expected)
    weights = (x, *conv.parameters())
    for a, b in zip(*(torch.autograd.grad(y, weights, target, retain_graph=True) for y in (found, expected))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    found.backward(target)
    assert conv.weight.grad.stride() == conv.weight.stride()


def test_up_blocks_of_the_score_sde_networks():
    torch.manual_seed(0)
    for taps, transposed in (([1, 1], True), ([1, 3, 3, 1], False)):
        conv, x = UpConv(8, 5, 3, taps), torch.randn(2, 8, 4, 6)
        expected = F.conv2d(fir_up(x, conv.resample_filter), conv.weight, conv.bias, padding=1)
        torch.testing.assert_close(conv(x), expected)
        assert (products(conv, x) < 2 * expected.numel() * 8 * 9) == transposed


def products(conv, x):
    with FlopCounterMode(display=False) as counter:
        conv(x) if isinstance(conv, UpConv) else conv_doubled(conv, x)
    return counter.get_total_flops()


def test_products_of_a_doubled_image():
    conv, x = nn.Conv2d(16, 16, 3, padding=1), torch.randn(2, 16, 4, 4)
    plain = 2 * 2 * 64 * 16 * 16 * 9
    kernel = 2 * 16 * 16 * 9 * 16
    assert products(conv, x) - kernel == plain * 4 / 9
    assert products(conv, x[..., :2, :2]) == plain / 4  # so small that the kernel costs more
    for dims in (1, 3):
        volume = torch.randn(2, 16, *[4] * dims)
        wider = conv_nd(dims, 16, 16, 3, padding=1)
        assert conv_doubled(wider, volume).shape[2:] == ((8,) if dims == 1 else (4, 8, 8))
