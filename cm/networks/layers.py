"""Layers of the score-SDE networks: resampling convolutions, noise embeddings, normalisation.

Shapes: B batch, C channels, H and W image sides. Filters are symmetric, so that convolution and correlation agree.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from cm.nn import GroupNorm32, of_doubled, pays_doubled


def fir_kernel(taps: Sequence[float]) -> Tensor:
    """Separable low-pass filter of sum 1: outer product of `taps` with itself, (1, 1, T, T) fp32."""
    taps = list(taps)
    if len(taps) < 2 or len(taps) % 2 or taps != taps[::-1]:
        raise ValueError(f"a resampling filter needs an even number of symmetric taps, got {taps}")
    row = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(row, row) / row.sum() ** 2)[None, None]


def fir_down(x: Tensor, kernel: Tensor) -> Tensor:
    """Filter, then keep every other pixel: (B, C, H, W) -> (B, C, H/2, W/2). Outside the image is zero."""
    return F.conv2d(
        x, _per_channel(kernel, x), stride=2, padding=kernel.shape[-1] // 2 - 1, groups=x.shape[1]
    )


def fir_up(x: Tensor, kernel: Tensor) -> Tensor:
    """Insert zeros, then filter with gain 4: (B, C, H, W) -> (B, C, 2H, 2W). Outside the image is zero."""
    kernel = _per_channel(4 * kernel, x)
    return F.conv_transpose2d(x, kernel, stride=2, padding=kernel.shape[-1] // 2 - 1, groups=x.shape[1])


def _per_channel(kernel: Tensor, x: Tensor) -> Tensor:
    # A real copy per channel: convolutions with an expanded (stride 0) filter are several times slower.
    return kernel.to(x.dtype).repeat(x.shape[1], 1, 1, 1)


class DownConv(nn.Conv2d):
    """Halve the image by a FIR filter, then convolve (kernel 1 or 3, "same" padding)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, taps: Sequence[float]):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.register_buffer("resample_filter", fir_kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(fir_down(x, self.resample_filter))


class UpConv(nn.Conv2d):
    """Double the image by a FIR filter, then convolve (kernel 1 or 3, "same" padding)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, taps: Sequence[float]):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.register_buffer("resample_filter", fir_kernel(taps))
        self.nearest = list(taps) == [1, 1]

    def forward(self, x: Tensor) -> Tensor:
        if self.nearest and pays_doubled(self, x):
            return of_doubled(self, x)
        if self.kernel_size == (1, 1):
            # Mixing channels commutes with filtering and is four times cheaper on the small image.
            # The bias does not: the filter meets zeros outside the border.
            x = fir_up(F.conv2d(x, self.weight), self.resample_filter)
            return x + self.bias[:, None, None]
        return super().forward(fir_up(x, self.resample_filter))


class PyramidConv(nn.Conv2d):
    """One step of the input pyramid: filter, then a 3x3 convolution of stride 2, zeros outside the image.

    Both see an image padded by 2 on each side; nothing is padded between them.
    """

    def __init__(self, in_channels: int, out_channels: int, taps: Sequence[float]):
        super().__init__(in_channels, out_channels, 3, stride=2)
        self.register_buffer("resample_filter", fir_kernel(taps))

    def forward(self, x: Tensor) -> Tensor:
        kernel = _per_channel(self.resample_filter, x)
        return super().forward(F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=x.shape[1]))


class FourierEmbedding(nn.Module):
    """Random Fourier features of a time: sin(2 pi w t), then cos(2 pi w t), with w ~ N(0, scale^2) fixed.

    times (B,) -> (B, channels) (Song et al. 2021, score SDE, App. C).
    """

    def __init__(self, channels: int, scale: float = 16.0):
        super().__init__()
        self.channels = channels
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, times: Tensor) -> Tensor:
        phases = times[:, None] * (2 * math.pi * self.freqs)
        return torch.cat([phases.sin(), phases.cos()], dim=1)


class PositionalEmbedding(nn.Module):
    """Sinusoidal features of a time: sin(w_i t), then cos(w_i t), with w_i from 1 down to 1/10000 inclusive.

    times (B,) -> (B, channels). The ADM embedding differs in both order and last frequency.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, times: Tensor) -> Tensor:
        half = self.channels // 2
        steps = torch.arange(half, dtype=times.dtype, device=times.device)
        phases = times[:, None] * 10000 ** (-steps / (half - 1))
        return torch.cat([phases.sin(), phases.cos()], dim=1)


def group_norm(channels: int) -> GroupNorm32:
    """Normalisation of the score-SDE networks: groups of four channels or more, 32 groups at most, eps 1e-6."""
    return GroupNorm32(min(32, channels // 4), channels, eps=1e-6)


def pixel_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean of x^2 over the channels + 1e-8): (B, C, ...) -> the same (Karras et al. 2018, ProGAN, 4.2)."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def xavier_(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """Initialise in place: weights uniform with variance 2 scale / (fan_in + fan_out), zero bias; returns the layer."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def one_hot(y: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """(B, num_classes): 1 at the label y (B,) int64, and zeros for the label -1, no class."""
    return F.one_hot(y + 1, num_classes + 1)[:, 1:].to(dtype)


def check_inputs(
    x: Tensor,
    timesteps: Tensor,
    y: Tensor | None,
    in_channels: int,
    divisor: int,
    num_classes: int | None,
    dims: int = 2,
) -> None:
    """ValueError unless images, times and labels have the shapes that a U-Net takes; divisor: of the image's sides."""
    batch = x.shape[0]  # not len(x), which would fix it in an exported graph
    resampled = x.shape[-min(dims, 2) :]  # volumes keep the size of their first dimension
    if x.ndim != dims + 2 or x.shape[1] != in_channels or any(side % divisor for side in resampled):
        raise ValueError(
            f"images have shape {tuple(x.shape)}; the network takes (B, {in_channels}, {', '.join(['side'] * dims)}) "
            f"with sides divisible by {divisor}"
        )
    if timesteps.shape != (batch,):
        raise ValueError(
            f"times have shape {tuple(timesteps.shape)}; images {tuple(x.shape)} need ({batch},)"
        )
    if (y is None) != (num_classes is None):
        wants = f"needs labels of {num_classes} classes" if y is None else "takes no labels"
        raise ValueError(f"the network {wants}, but y is {'missing' if y is None else 'given'}")
    if y is not None and y.shape != (batch,):
        raise ValueError(f"labels have shape {tuple(y.shape)}; images {tuple(x.shape)} need ({batch},)")
