"""Layers and small tensor functions that every network and every loss is made of.

Shapes: B batch, C channels, `*spatial` one, two or three image dimensions.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import SiLU as SiLU
from torch.utils.checkpoint import checkpoint as torch_checkpoint

NORM_GROUPS = 32
NO_CLASS = -1  # the label of an image whose class is not told
# Channels of a group below which torch's kernels for channels-last are slow on CPUs, and pixels of such images from
# which the forward one is not
NARROW, LARGE = 8, 1024
LANES = 64  # elements that the widest vector instructions take at once, or a multiple
UNGUIDED = (1.0, 0.0, 1.0)  # 1 / scale of a guidance, and the first and the last time at which it acts

CONVOLUTIONS = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}

AVERAGE_POOLS = {
    1: nn.AvgPool1d,
    2: nn.AvgPool2d,
    3: nn.AvgPool3d,
}


class Dropout(nn.Dropout):
    """Dropout whose masks belong to the rows of a batch, once `rows` is set; before, as torch's.

    rows (B,) int32: a random number of each row. Element e of a row is dropped where a_e row + b_e (mod 2^32), which
    is uniform, is below 2^32 p. The torch generator gives a and b only, whose number does not depend on B: the same
    state gives a row the same mask in any batch. Masks of two rows or two elements are independent.
    """

    rows: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is None or not self.training or self.p == 0:
            return super().forward(x)
        low, high = -(2**31), 2**31
        draws = torch.randint(low, high, (2, *x.shape[1:]), dtype=torch.int32, device=x.device)
        # In the memory order of x, which may be channels-last.
        a, b = (torch.empty_like(x[:1], dtype=torch.int32).copy_(draw) for draw in draws)
        uniform = (a * append_dims(self.rows[: len(x)], x.ndim)).add_(b)  # int32 wraps around
        kept = uniform >= low + round(self.p * 2**32)
        return torch.where(kept, x / (1 - self.p), 0)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation that computes in fp32 at least and returns the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if _suits_column_norm(x, self.num_groups, self.weight, self.bias):
            return ColumnNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)[0]
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        rows = x.to(dtype)
        if _has_tangent(rows):
            rows = rows.contiguous()  # torch's forward-mode derivative knows no other layout
        return F.group_norm(rows, self.num_groups, weight, bias, self.eps).to(x.dtype)


def _has_tangent(x: Tensor) -> bool:
    """Whether x takes part in forward-mode differentiation; compiled code never does."""
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None


def on_this_cpu(x: Tensor) -> bool:
    """Whether x may go the way that is fast on CPUs; a graph for other machines, of any batch, goes the plain way."""
    return x.device.type == "cpu" and not torch.onnx.is_in_onnx_export()


def modulated_norm(norm: GroupNorm32, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift for x (B, C, *spatial), scale and shift (B, C)."""
    columns = _suits_column_norm(x, norm.num_groups, norm.weight, scale, shift)
    if columns or (on_this_cpu(x) and x.dtype == norm.weight.dtype and x.is_contiguous()):
        # Every image brings its own weight and bias, which costs no pass of their own.
        weight = torch.addcmul(norm.weight, norm.weight, scale)
        bias = torch.addcmul(norm.bias + shift, norm.bias, scale)
        if columns:
            return ColumnNorm.apply(x, weight, bias, norm.num_groups, norm.eps)[0]
        rows, groups = x.reshape(1, -1, *x.shape[2:]), len(x) * norm.num_groups  # as channels of one image
        return F.group_norm(rows, groups, weight.flatten(), bias.flatten(), norm.eps).reshape(x.shape)
    return torch.addcmul(append_dims(shift, x.ndim), norm(x), append_dims(1 + scale, x.ndim))


class ColumnNorm(torch.autograd.Function):
    """Group norm of channels-last images by sums of columns: x (B, C, H, W), weight and bias (C,) or (B, C).

    y = (x - mean) rate weight + bias with rate = 1 / sqrt(variance + eps) of a group; returns (y, mean, rate). For the
    CPU, where torch's kernels walk such images by the few channels of a group.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, channels, *sides = x.shape
        pixels = math.prod(sides)
        if pixels >= LARGE:
            own = weight.ndim == 1
            affine = (weight, bias) if own else (None, None)
            y, mean, rate = torch.native_group_norm(x, *affine, batch, channels, pixels, groups, eps)
            if not own:
                y = torch.addcmul(append_dims(bias, 4), y, append_dims(weight, 4))
            return y, mean[..., None], rate[..., None]
        centred, mean, rate = _moments(_columns(x), groups, eps)
        scale = _each_channel(_grouped(weight, groups) * rate, channels)
        y = torch.addcmul(bias.view(-1, 1, channels), centred, scale, out=centred)
        return y.view(batch, *sides, channels).movedim(-1, 1), mean, rate

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, _, ctx.groups, ctx.eps = inputs
        _, mean, rate = output
        ctx.mark_non_differentiable(mean, rate)
        ctx.save_for_backward(x, weight, mean, rate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rate = ctx.saved_tensors
        rows, grads = _columns(x), _columns(grad)
        if torch.is_grad_enabled():  # second derivatives
            _, mean, rate = _moments(rows, ctx.groups, ctx.eps)
        channels, shared = rows.shape[2], weight.ndim == 1
        elements = rows.shape[1] * channels // ctx.groups
        by_bias = _grouped(grads.sum(1), ctx.groups)
        product = _grouped((grads * rows).sum(1), ctx.groups)
        by_weight = (product - mean * by_bias) * rate
        weight = _grouped(weight, ctx.groups)
        moved = (weight * by_bias).sum(-1, keepdim=True) / elements
        spread = (weight * by_weight).sum(-1, keepdim=True) / elements
        # rate (weight grad - moved - normalised spread)
        slope = -spread * rate.square()
        offset = -(slope * mean + moved * rate)
        by_x = torch.addcmul(_each_channel(offset, channels), rows, _each_channel(slope, channels))
        by_x = by_x.addcmul_(grads, _each_channel(weight * rate, channels))
        by_x = by_x.view(len(x), *x.shape[2:], channels).movedim(-1, 1)
        whole = (by_weight.flatten(1), by_bias.flatten(1))
        if shared:
            whole = tuple(g.sum(0) for g in whole)
        return by_x, *whole, None, None


def _columns(x: Tensor) -> Tensor:
    """(B, C, H, W) in channels-last -> (B, H W, C), contiguous."""
    return x.contiguous(memory_format=torch.channels_last).movedim(1, -1).flatten(1, 2)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(C,) or (B, C) -> (1 or B, groups, C / groups)."""
    return x.view(-1, groups, x.shape[-1] // groups)


def _each_channel(x: Tensor, channels: int) -> Tensor:
    """(B, groups, C / groups or 1) -> (B, 1, C)."""
    return x.expand(-1, -1, channels // x.shape[1]).reshape(len(x), 1, channels)


def _moments(rows: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Columns (B, L, C) less the mean of their group, the mean and 1 / sqrt(variance + eps), (B, groups, 1) both."""
    elements = rows.shape[1] * rows.shape[2] // groups
    mean = _grouped(rows.sum(1), groups).sum(-1, keepdim=True) / elements
    centred = rows - _each_channel(mean, rows.shape[2])
    variance = _grouped(centred.square().sum(1), groups).sum(-1, keepdim=True) / elements
    return centred, mean, (variance + eps).rsqrt()


def _suits_column_norm(x: Tensor, groups: int, *others: Tensor) -> bool:
    """Whether `ColumnNorm` takes an image, and is faster than torch's kernels."""
    if not on_this_cpu(x) or torch.compiler.is_compiling() or x.ndim != 4 or x.shape[1] >= NARROW * groups:
        return False
    if x.is_contiguous() or not x.is_contiguous(
        memory_format=torch.channels_last
    ):  # vmap knows the first only
        return False
    return all(a.dtype == torch.float32 and not _has_tangent(a) for a in (x, *others))


# A 4x4 kernel that does what doubling by nearest neighbour and a 3x3 kernel do: element k of the former is the sum of
# the elements of the latter that meet the same pixel of the small image, along each axis.
_ALONG = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float32)
DOUBLED = torch.kron(_ALONG, _ALONG)  # (16, 9)


def conv_doubled(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x doubled by nearest neighbour) for a convolution that keeps the size of an image, (B, C, *spatial).

    3x3 on CPUs: by 4 products in the place of 9.
    """
    if pays_doubled(conv, x):
        return of_doubled(conv, x)
    scale = [float(factor) for factor in doubling(x.ndim - 2)]
    return conv(F.interpolate(x, scale_factor=scale, mode="nearest"))


def of_doubled(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The same for a 3x3 convolution as one transposed convolution of the small image."""
    out_channels, channels = conv.weight.shape[:2]
    # channels_last: the gradient must come back with the parameter's strides for DDP
    if conv.weight.stride(1) == 1:
        kernel = DOUBLED @ conv.weight.permute(0, 2, 3, 1).reshape(out_channels, 9, channels)
        kernel = kernel.view(out_channels, 4, 4, channels).permute(3, 0, 1, 2)
    else:
        kernel = (conv.weight.flatten(2) @ DOUBLED.T).view(out_channels, channels, 4, 4).transpose(0, 1)
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


def pays_doubled(conv: nn.Module, x: Tensor) -> bool:
    """Whether the products that are saved cost more than the kernel; not a question of the batch."""
    if not (isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and on_this_cpu(x)):
        return False
    return x.dtype == conv.weight.dtype == torch.float32 and 2 * x.shape[2] * x.shape[3] >= x.shape[1]


def doubling(dims: int) -> tuple[int, ...]:
    """Factor of one resampling by dimension: 2, but volumes keep the size of their first dimension."""
    return (1, 2, 2) if dims == 3 else (2,) * dims


def normalization(channels: int) -> GroupNorm32:
    """The networks' normalisation: 32 groups over `channels`, which must be a multiple of 32."""
    if channels < 1 or channels % NORM_GROUPS:
        raise ValueError(f"a layer of {channels} channels cannot be normalised in {NORM_GROUPS} equal groups")
    return GroupNorm32(NORM_GROUPS, channels)


def conv_nd(
    dims: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: bool = True,
) -> nn.Module:
    """Convolution over `dims` (1, 2 or 3) spatial dimensions."""
    convolution = _of_dims(CONVOLUTIONS, dims)
    return convolution(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)


def avg_pool_nd(
    dims: int, kernel_size: int | Sequence[int], stride: int | Sequence[int] | None = None
) -> nn.Module:
    """Average pooling over `dims` (1, 2 or 3) spatial dimensions; `stride` None means the kernel's size."""
    return _of_dims(AVERAGE_POOLS, dims)(kernel_size, stride)


def _of_dims(layers: dict[int, type[nn.Module]], dims: int) -> type[nn.Module]:
    if dims not in layers:
        raise ValueError(f"dims must be 1, 2 or 3, not {dims}")
    return layers[dims]


def linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """Fully connected layer."""
    return nn.Linear(in_features, out_features, bias)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of a module to zero and return it."""
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    return module


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply all parameters of a module by `scale` and return it."""
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(scale)
    return module


@torch.no_grad()
def update_ema(target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99) -> None:
    """Exponential moving average in place: target <- rate * target + (1 - rate) * source.

    Rate 0 copies and rate 1 leaves the target alone, whatever the other side holds (inf and NaN included).
    The two sides may differ in dtype: the average is taken in the target's.
    """
    targets, sources = list(target_params), list(source_params)
    if len(targets) != len(sources):
        raise ValueError(f"an average of {len(targets)} tensors cannot follow {len(sources)} tensors")
    for target, source in zip(targets, sources):
        if target.shape != source.shape:
            raise ValueError(
                f"an average of shape {tuple(target.shape)} cannot follow a tensor of shape {tuple(source.shape)}"
            )
    if rate == 1 or not targets:
        return
    if rate == 0:
        torch._foreach_copy_(targets, sources)
        return
    sources = [source.to(target.dtype) for target, source in zip(targets, sources)]
    torch._foreach_lerp_(targets, sources, 1 - rate)


def mean_flat(tensor: Tensor) -> Tensor:
    """Mean over all dimensions but the first: (B, ...) -> (B,)."""
    return tensor.flatten(1).mean(1)


def alike(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), elementwise, like x: an element's value is the same in a tensor of any length.

    On CPUs torch computes powers and sigmoids of the last elements, which fill no vector register, by other code, which
    rounds otherwise: a row would depend on the rows that a rank has beside it.
    """
    if x.device.type != "cpu":
        return function(x)
    padded = F.pad(x.flatten(), (0, -x.numel() % LANES), value=1.0)
    return function(padded)[: x.numel()].view(x.shape)


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """Add trailing dimensions of size 1 until `x` has `target_dims` dimensions."""
    missing = target_dims - x.ndim
    if missing < 0:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} has more than {target_dims} dimensions")
    return x.reshape(*x.shape, *[1] * missing)


def append_zero(x: Tensor) -> Tensor:
    """Append a zero to a 1-D tensor: the noise level at which a sampler ends."""
    return torch.cat([x, x.new_zeros(1)])


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal features of a time: cos(t w_i), then sin(t w_i), with w_i = max_period^(-i / (dim // 2)).

    timesteps (B,) may be fractional. The result is (B, dim) in fp32, or fp64 for fp64 times; an odd
    `dim` ends in a column of zeros. Frequencies are fp32 always: |t| reaches 1554, and the phases of the
    released networks hang on their rounding.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * steps / half)
    phases = timesteps.to(torch.promote_types(timesteps.dtype, torch.float32))[:, None] * frequencies
    return F.pad(torch.cat([phases.cos(), phases.sin()], dim=1), (0, dim % 2))


def checkpoint(func: Callable, inputs: Sequence, params: Iterable[Tensor], flag: bool):
    """func(*inputs); with `flag`, activations are recomputed in the backward pass instead of kept.

    Random numbers (dropout) are the same in both passes. `params` are the tensors that `func` uses beside its
    inputs; they receive their gradients in any case and are named for the reader only.
    """
    del params
    if flag and torch.is_grad_enabled():
        return torch_checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)
