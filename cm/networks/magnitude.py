"""Magnitude-preserving layers of EDM2 (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion
Models", arXiv:2312.02696): every layer keeps the expected size of its input's entries.

Weights are normalised wherever they are used, so that their length has no effect on the output. That length must not
grow all the same, or the effective learning rate falls: after each optimizer step `normalize_weights` gives every
weight unit size ("forced weight normalisation"). No forward pass changes a weight.

Shapes: B batch, C channels, H and W image sides, O outputs of a layer.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-4
SILU_SIZE = 0.596  # root mean square of silu(x) for x ~ N(0, 1)


def normalize(x: Tensor, dim: int | Sequence[int] | None = None, eps: float = EPS) -> Tensor:
    """x / (eps + rms(x)), the root mean square taken over `dim`, all but the first by default (EDM2, Eq. 47 and 66)."""
    dims = tuple(range(1, x.ndim)) if dim is None else (dim,) if isinstance(dim, int) else dim
    wide = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide)
    # Not by numel(), which holds the batch, open in an exported graph; a list, since torch.compile takes no generator.
    count = math.prod([x.shape[i] for i in dims])
    return x / (eps + length * math.sqrt(1 / count)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596 (EDM2, Eq. 81)."""
    return F.silu(x) / SILU_SIZE


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2) (EDM2, Eq. 88)."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """a and b (B, C, H, W) side by side; t is b's share of the size of the result (EDM2, Eq. 103)."""
    channels_a, channels_b = a.shape[1], b.shape[1]
    scale = math.sqrt((channels_a + channels_b) / ((1 - t) ** 2 + t**2))
    weight_a, weight_b = scale * (1 - t) / math.sqrt(channels_a), scale * t / math.sqrt(channels_b)
    return torch.cat([weight_a * a, weight_b * b], dim=1)


def resample(x: Tensor, mode: str) -> Tensor:
    """x (B, C, H, W) itself ("keep"), at half size by means of 2 x 2 pixels ("down"), or with pixels doubled ("up")."""
    if mode == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if mode == "up" else x


class MPConv(nn.Module):
    """Convolution with "same" padding, or a fully connected layer where no kernel is given; no bias (EDM2, Eq. 47).

    x (B, C, H, W) or (B, C) -> the same with O channels, by gain * normalize(weight) / sqrt(fan_in).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0):
        super().__init__()
        self.weight = nn.Parameter(
            normalize(torch.randn(out_channels, in_channels, *[kernel] * (2 * bool(kernel))))
        )

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        weight = normalize(weight) * (gain / math.sqrt(weight[0].numel()))
        weight = weight.to(x.dtype)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2) if weight.ndim == 4 else F.linear(x, weight)


@torch.no_grad()
def normalize_weights(network: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Give the weight of every `MPConv` unit size, in place, in `params`: the network's parameters by name."""
    for name, module in network.named_modules():
        if isinstance(module, MPConv):
            weight = params[f"{name}.weight"]
            weight.copy_(normalize(weight))


class MPFourier(nn.Module):
    """Random Fourier features sqrt(2) cos(w t + phase), fixed: times (B,) -> (B, channels) (EDM2, Eq. 75)."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, times: Tensor) -> Tensor:
        return math.sqrt(2) * (times[:, None] * self.freqs + self.phases).cos()


class MPPositional(nn.Module):
    """sqrt(2) (cos(w_i t), sin(w_i t)) with w_i from 1 down to 1/10000 inclusive: times (B,) -> (B, channels).

    What sCM puts in the place of random frequencies, so that the derivative by the time stays small (Lu & Song 2025).
    """

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.register_buffer("freqs", 10000 ** (-torch.arange(half) / max(half - 1, 1)))

    def forward(self, times: Tensor) -> Tensor:
        phases = times[:, None] * self.freqs
        return math.sqrt(2) * torch.cat([phases.cos(), phases.sin()], dim=1)
