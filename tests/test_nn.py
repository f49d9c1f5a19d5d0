"""Layers and tensor functions of cm.nn."""

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

from cm import nn as cm_nn
from cm.seeding import StepRandom
from tests.helpers import golden_data


def test_timestep_embedding_of_one_is_cosines_then_sines_of_the_frequencies():
    out = cm_nn.timestep_embedding(torch.tensor([1.0]), 4, max_period=100)
    expected = torch.tensor([1.0, 0.1, 1.0, 0.1])
    expected[:2], expected[2:] = expected[:2].cos(), expected[2:].sin()
    assert_close(out, expected[None])


@pytest.mark.parametrize("case", ["32_10000", "33_10000", "192_10000", "64_100"])
def test_timestep_embedding_golden(case):
    g = golden_data.load("misc")
    dim, max_period = (int(part) for part in case.split("_"))
    out = cm_nn.timestep_embedding(g.tensor(f"timestep_embedding/{case}/t"), dim, max_period)
    assert_close(out, g.tensor(f"timestep_embedding/{case}/out"), rtol=0, atol=2e-6)


def test_timestep_embedding_keeps_double_precision():
    assert cm_nn.timestep_embedding(torch.ones(2, dtype=torch.float64), 8).dtype == torch.float64
    assert cm_nn.timestep_embedding(torch.ones(2, dtype=torch.float16), 8).dtype == torch.float32
    assert cm_nn.timestep_embedding(torch.ones(2, dtype=torch.int64), 8).dtype == torch.float32


def test_update_ema_golden():
    g = golden_data.load("misc")
    for rate, expected in zip(g["ema/rates"], g.tensor("ema/out")):
        target = g.tensor("ema/target").requires_grad_()
        cm_nn.update_ema([target], [g.tensor("ema/source").requires_grad_()], float(rate))
        assert_close(target.detach(), expected, rtol=1e-6, atol=1e-7)
        assert target.is_leaf and target.grad_fn is None


def test_update_ema_at_the_ends_of_the_range_ignores_bad_numbers():
    bad = torch.tensor([float("inf"), float("nan")])
    good = torch.tensor([1.0, 2.0])
    target = bad.clone()
    cm_nn.update_ema([target], [good], 0)
    assert torch.equal(target, good)
    cm_nn.update_ema([target], [bad], 1)
    assert torch.equal(target, good)


def test_update_ema_takes_generators_and_other_dtypes():
    target, source = nn.Linear(2, 2), nn.Linear(2, 2).half()
    expected = [
        0.25 * t.detach() + 0.75 * s.detach().float()
        for t, s in zip(target.parameters(), source.parameters())
    ]
    cm_nn.update_ema(target.parameters(), source.parameters(), 0.25)
    for p, e in zip(target.parameters(), expected):
        assert_close(p.detach(), e)


def test_update_ema_refuses_lists_that_do_not_fit():
    with pytest.raises(ValueError, match="2 tensors cannot follow 1"):
        cm_nn.update_ema([torch.ones(1)] * 2, [torch.ones(1)])
    with pytest.raises(ValueError, match=r"\(2,\) cannot follow a tensor of shape \(1,\)"):
        cm_nn.update_ema([torch.ones(2)], [torch.ones(1)])


def test_group_norm_computes_in_fp32_and_returns_the_inputs_dtype():
    norm = cm_nn.normalization(64)
    nn.init.normal_(norm.weight)
    x = 300 * torch.randn(2, 64, 5, 5)  # squares overflow fp16
    exact = norm(x)
    assert norm(x.half()).dtype == torch.float16
    assert_close(norm(x.half()).float(), exact, rtol=5e-3, atol=5e-3)
    groups = x.reshape(2, 32, -1)
    plain = (groups - groups.mean(2, keepdim=True)) / (
        groups.var(2, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    assert_close(exact, plain.reshape(x.shape) * norm.weight[:, None, None])
    assert_close(norm.double()(x.double()).float(), exact)


def test_normalization_names_the_width_it_cannot_split():
    with pytest.raises(ValueError, match="48 channels"):
        cm_nn.normalization(48)


def test_layers_by_number_of_dimensions():
    for dims, conv, pool in (
        (1, nn.Conv1d, nn.AvgPool1d),
        (2, nn.Conv2d, nn.AvgPool2d),
        (3, nn.Conv3d, nn.AvgPool3d),
    ):
        layer = cm_nn.conv_nd(dims, 4, 6, 3, stride=2, padding=1, groups=2, bias=False)
        assert type(layer) is conv and layer.bias is None and layer.groups == 2
        assert layer(torch.ones(1, 4, *[8] * dims)).shape == (1, 6, *[4] * dims)
        assert type(cm_nn.avg_pool_nd(dims, 2)) is pool
    assert cm_nn.linear(3, 5, bias=False).weight.shape == (5, 3)
    with pytest.raises(ValueError, match="dims must be 1, 2 or 3, not 4"):
        cm_nn.conv_nd(4, 1, 1, 1)


def test_scale_and_zero_module_change_all_parameters_in_place():
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    assert cm_nn.scale_module(layer, 0.5) is layer
    assert torch.equal(layer.weight, 0.5 * before)
    assert not any(p.any() for p in cm_nn.zero_module(layer).parameters())
    assert layer.weight.requires_grad


def test_small_tensor_functions():
    x = torch.arange(12.0).reshape(2, 2, 3)
    assert cm_nn.mean_flat(x).tolist() == [2.5, 8.5]
    assert cm_nn.append_dims(torch.ones(2), 4).shape == (2, 1, 1, 1)
    assert cm_nn.append_zero(torch.tensor([2.0, 1.0])).tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="more than 2 dimensions"):
        cm_nn.append_dims(x, 2)


def test_checkpoint_gives_the_same_gradients_with_dropout():
    layer = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8))
    x = torch.randn(4, 8, requires_grad=True)

    def gradients(flag):
        torch.manual_seed(3)
        out = cm_nn.checkpoint(layer, (x,), layer.parameters(), flag).square().sum()
        return torch.autograd.grad(out, [x, *layer.parameters()])

    for plain, recomputed in zip(gradients(False), gradients(True)):
        assert torch.equal(plain, recomputed)


def test_checkpoint_of_a_frozen_module_passes_the_inputs_gradient():
    layer = nn.Linear(3, 3).requires_grad_(False)
    x = torch.randn(2, 3, requires_grad=True)
    cm_nn.checkpoint(layer, (x,), layer.parameters(), True).sum().backward()
    assert_close(x.grad, layer.weight.sum(0).expand(2, 3))


def row_masks(rows, shape, p=0.3, seed=3):
    drop = cm_nn.Dropout(p)
    drop.rows = rows
    torch.manual_seed(seed)
    return drop(torch.ones(len(rows), *shape)) > 0


def test_a_rows_dropout_mask_is_its_own_in_any_batch_and_memory_order():
    rows = StepRandom(0, 5, 0, 6, 6).row_numbers("dropout")
    whole = row_masks(rows, (8, 4, 4))
    assert torch.equal(row_masks(rows[2:5], (8, 4, 4)), whole[2:5])
    later = StepRandom(0, 5, 3, 6, 6).row_numbers("dropout")
    assert torch.equal(row_masks(later, (8, 4, 4)), whole[3:])
    drop = cm_nn.Dropout(0.3)
    drop.rows = rows
    torch.manual_seed(3)
    x = torch.randn(6, 8, 4, 4).to(memory_format=torch.channels_last)
    torch.manual_seed(3)
    out = drop(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, torch.where(whole, x / 0.7, 0))
    assert drop.eval()(x) is x


def test_dropout_masks_of_rows_and_elements_are_independent():
    """Frequencies of single elements, of pairs and of triples of rows or elements, within five standard errors."""
    p, rows = 0.3, StepRandom(0, 0, 0, 64, 64).row_numbers("dropout")
    kept = torch.stack([row_masks(rows, (32, 16), p, seed) for seed in range(100)]).double()  # (N, B, C, L)
    dropped = 1 - kept
    many = dropped.numel()
    for product, factors in (
        (dropped, 1),
        (dropped * dropped.roll(1, 1), 2),
        (dropped * dropped.roll(1, 2), 2),
        (dropped * dropped.roll(1, 0), 2),
        (dropped * dropped.roll(1, 1) * dropped.roll(2, 1), 3),
        (dropped * dropped.roll(1, 1) * dropped.roll((1, 1), (1, 2)), 3),
    ):
        q = p**factors
        assert abs(product.mean().item() - q) < 5 * (2 * factors * q * (1 - q) / many) ** 0.5
