"""Attention over pixels: values, order of the weights, derivatives."""

import pytest
import torch
from torch.testing import assert_close

from cm.networks.attention import AttentionBlock, qkv_attention, qkv_legacy_to_new
from cm.objectives.forward_mode import forward_mode
from tests.helpers import golden_data
from tests.helpers.convert_models import qkv_new_to_legacy
from tests.helpers.models import golden_model


def filled(block: AttentionBlock) -> AttentionBlock:
    """The block with a projection that is not zero."""
    torch.nn.init.normal_(block.proj_out.weight, std=0.2)
    return block


def by_hand(block: AttentionBlock, x: torch.Tensor) -> torch.Tensor:
    """The block's output by loops over images and heads."""
    width = block.channels // block.num_heads
    rows = block.norm(x).flatten(2)
    qkv = torch.einsum("oc,bcl->bol", block.qkv.weight.flatten(1), rows) + block.qkv.bias[:, None]
    out = torch.empty_like(rows)
    for b in range(len(x)):
        for h in range(block.num_heads):
            q, k, v = (qkv[b, part * block.channels + h * width :][:width] for part in range(3))
            weights = torch.softmax(q.T @ k / width**0.5, dim=1)  # (queries, keys)
            out[b, h * width : (h + 1) * width] = v @ weights.T
    out = torch.einsum("oc,bcl->bol", block.proj_out.weight.flatten(1), out) + block.proj_out.bias[:, None]
    return x + out.reshape(x.shape)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("heads", [{"num_heads": 4}, {"num_head_channels": 32}])
def test_block_equals_attention_by_hand(dims, heads):
    torch.manual_seed(0)
    block = filled(AttentionBlock(96 if "num_heads" in heads else 64, dims=dims, **heads))
    x = torch.randn(2, block.channels, *[4, 3, 2][:dims])
    assert block.num_heads == (4 if "num_heads" in heads else 2)
    assert_close(block(x), by_hand(block, x), rtol=1e-4, atol=1e-5)
    if dims == 2:
        assert_close(block(x.contiguous(memory_format=torch.channels_last)), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 4])
def test_channels_last_weights_change_nothing(batch):
    """4 x 12 positions can be cut into the 16 images that oneDNN is given, 2 x 12 cannot."""
    torch.manual_seed(0)
    block = filled(AttentionBlock(64, num_heads=2))
    x = torch.randn(batch, 64, 4, 3)
    expected = block(x)
    expected_gradient = torch.autograd.grad(expected.square().sum(), block.qkv.weight)[0]
    block = block.to(memory_format=torch.channels_last)
    for images in (x, x.contiguous(memory_format=torch.channels_last)):
        out = block(images)
        assert_close(out, expected, rtol=1e-4, atol=1e-5)
        gradient = torch.autograd.grad(out.square().sum(), block.qkv.weight)[0]
        assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4)


def test_fresh_block_is_the_identity():
    x = torch.randn(1, 32, 2, 2)
    assert torch.equal(AttentionBlock(32)(x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_attention_in_every_dtype(dtype):
    qkv = torch.randn(2, 9, 3 * 24, generator=torch.Generator().manual_seed(0))
    out = qkv_attention(qkv.to(dtype), 3)
    assert out.dtype == dtype
    assert_close(out.float(), qkv_attention(qkv, 3), rtol=2e-2, atol=2e-2)


def test_conversion_of_the_row_order():
    rows = torch.tensor([h * 100 + part * 10 + c for h in range(2) for part in range(3) for c in range(4)])
    new = qkv_legacy_to_new(rows, 2)
    assert new.tolist() == [h * 100 + part * 10 + c for part in range(3) for h in range(2) for c in range(4)]
    weight = torch.randn(24, 8, 1, 1)
    assert torch.equal(qkv_new_to_legacy(qkv_legacy_to_new(weight, 2), 2), weight)
    assert not torch.equal(qkv_legacy_to_new(weight, 2), weight)
    assert torch.equal(qkv_legacy_to_new(weight, 1), weight)
    with pytest.raises(ValueError, match=r"\(24, 8, 1, 1\) does not hold 3 x 5"):
        qkv_legacy_to_new(weight, 5)


def test_released_weights_in_the_legacy_order_give_another_image():
    g = golden_data.load("unet_b_classcond_updown")
    model = golden_model(g)
    expected = g.tensor("out/0")
    inputs = g.tensor("in/0/x"), g.tensor("in/0/t"), g.tensor("in/0/y")
    attention = [m for m in model.modules() if isinstance(m, AttentionBlock)]

    def reorder(convert):
        for block in attention:
            for p in (block.qkv.weight, block.qkv.bias):
                p.data = convert(p.data, block.num_heads)

    with torch.no_grad():
        reorder(qkv_new_to_legacy)
        assert (model(*inputs) - expected).abs().max() > 0.05
        reorder(qkv_legacy_to_new)
        assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-4)


def test_forward_derivative_equals_finite_differences():
    torch.manual_seed(0)
    block = filled(AttentionBlock(32, num_heads=2)).double()
    x, direction = torch.randn(2, 1, 32, 3, 3, dtype=torch.float64)
    with forward_mode():
        _, tangent = torch.func.jvp(block, (x,), (direction,))
    difference = (block(x + 1e-5 * direction) - block(x - 1e-5 * direction)) / 2e-5
    assert_close(tangent, difference, rtol=1e-6, atol=1e-8)


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="64 channels cannot be split into num_heads = 3"):
        AttentionBlock(64, num_heads=3)
    with pytest.raises(ValueError, match="num_head_channels = 48"):
        AttentionBlock(64, num_head_channels=48)
