"""Inception-v3 as published in December 2015, the feature network behind FID, sFID and the Inception Score.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (arXiv:1512.00567), in the variant of the
frozen TensorFlow graph `classify_image_graph_def.pb` that FID was defined with: TensorFlow 1 image resize, batch
norm without scale, average pools that do not count padding, a max pool in the last block, 1008 outputs.

Shapes: B images, N H W C as in TensorFlow for the flattened spatial features.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SIZE = 299
POOL_DIM = 2048
SPATIAL_CHANNELS = 7
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS
NUM_OUTPUTS = 1008


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Run float32 convolutions and matrix products in full float32 (no TF32) on every device."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


def resize_bilinear_tf1(images: Tensor, size: int) -> Tensor:
    """Bilinear resize of TensorFlow 1 (`align_corners=False`, no half-pixel offset).

    Output pixel i reads the input at i * in/out. `F.interpolate` reads (i + 0.5) * in/out - 0.5 instead, which moves
    the pooled features by about 0.6 % and makes FID values incomparable.
    """
    for dim in (2, 3):
        n = images.shape[dim]
        if n == size:
            continue
        position = torch.arange(size, device=images.device, dtype=torch.float64) * (n / size)
        low = position.long()  # positions are >= 0, so truncation is floor
        high = (low + 1).clamp(max=n - 1)
        fraction = (position - low).to(images.dtype)
        fraction = fraction[:, None] if dim == 2 else fraction
        images = torch.lerp(images.index_select(dim, low), images.index_select(dim, high), fraction)
    return images


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with fixed statistics and no scale, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel=1, stride: int = 1, valid: bool = False):
        super().__init__()
        kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.stride = stride
        self.padding = (0, 0) if valid else (kh // 2, kw // 2)
        self.weight = nn.Parameter(torch.zeros(c_out, c_in, kh, kw), requires_grad=False)
        self.beta = nn.Parameter(torch.zeros(c_out), requires_grad=False)
        self.register_buffer("mean", torch.zeros(c_out))
        self.register_buffer("var", torch.ones(c_out))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)
        x = F.batch_norm(x, self.mean, self.var, bias=self.beta, training=False, eps=1e-3)
        return F.relu(x, inplace=True)


def chain(c_in: int, *layers: tuple) -> nn.Sequential:
    """Convolutions `(c_out, kernel[, stride, valid])` in a row, named conv, conv_1, conv_2, ..."""
    tower = nn.Sequential()
    for i, (c_out, *rest) in enumerate(layers):
        tower.add_module(f"conv_{i}" if i else "conv", ConvNorm(c_in, c_out, *rest))
        c_in = c_out
    return tower


def average_pool(x: Tensor) -> Tensor:
    """3x3 mean over the pixels inside the image, same size."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Block35(nn.Module):
    """35x35 block: 1x1, 5x5, two 3x3, pooled 1x1."""

    def __init__(self, c_in: int, c_pool: int):
        super().__init__()
        self.conv = ConvNorm(c_in, 64)
        self.tower = chain(c_in, (48,), (64, 5))
        self.tower_1 = chain(c_in, (64,), (96, 3), (96, 3))
        self.tower_2 = chain(c_in, (c_pool,))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x), self.tower_1(x), self.tower_2(average_pool(x))], 1)


class Reduce35(nn.Module):
    """35x35 -> 17x17."""

    def __init__(self):
        super().__init__()
        self.conv = ConvNorm(288, 384, 3, 2, True)
        self.tower = chain(288, (64,), (96, 3), (96, 3, 2, True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), self.tower(x), F.max_pool2d(x, 3, 2)], 1)


class Block17(nn.Module):
    """17x17 block with factorised 7x7 convolutions of inner width `c`."""

    def __init__(self, c: int):
        super().__init__()
        row, col = (1, 7), (7, 1)
        self.conv = ConvNorm(768, 192)
        self.tower = chain(768, (c,), (c, row), (192, col))
        self.tower_1 = chain(768, (c,), (c, col), (c, row), (c, col), (192, row))
        self.tower_2 = chain(768, (192,))

    def forward(self, x: Tensor, keep_first: bool = False):
        """The block's output; with `keep_first` also the output of its 1x1 branch, which sFID reads."""
        first = self.conv(x)
        out = torch.cat([first, self.tower(x), self.tower_1(x), self.tower_2(average_pool(x))], 1)
        return (out, first) if keep_first else out


class Reduce17(nn.Module):
    """17x17 -> 8x8."""

    def __init__(self):
        super().__init__()
        self.tower = chain(768, (192,), (320, 3, 2, True))
        self.tower_1 = chain(768, (192,), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.tower(x), self.tower_1(x), F.max_pool2d(x, 3, 2)], 1)


class Block8(nn.Module):
    """8x8 block with split 3x3 convolutions. The graph's last block pools by maximum, the other by mean."""

    def __init__(self, c_in: int, max_pool: bool):
        super().__init__()
        self.max_pool = max_pool
        self.conv = ConvNorm(c_in, 320)
        self.tower_conv = ConvNorm(c_in, 384)
        self.tower_mixed_conv = ConvNorm(384, 384, (1, 3))
        self.tower_mixed_conv_1 = ConvNorm(384, 384, (3, 1))
        self.tower_1_conv = ConvNorm(c_in, 448)
        self.tower_1_conv_1 = ConvNorm(448, 384, 3)
        self.tower_1_mixed_conv = ConvNorm(384, 384, (1, 3))
        self.tower_1_mixed_conv_1 = ConvNorm(384, 384, (3, 1))
        self.tower_2_conv = ConvNorm(c_in, 192)

    def forward(self, x: Tensor) -> Tensor:
        a = self.tower_conv(x)
        b = self.tower_1_conv_1(self.tower_1_conv(x))
        pooled = F.max_pool2d(x, 3, 1, padding=1) if self.max_pool else average_pool(x)
        branches = [self.conv(x), self.tower_mixed_conv(a), self.tower_mixed_conv_1(a)]
        branches += [self.tower_1_mixed_conv(b), self.tower_1_mixed_conv_1(b), self.tower_2_conv(pooled)]
        return torch.cat(branches, 1)


def _layers() -> nn.ModuleDict:
    layers = dict(chain(3, (32, 3, 2, True), (32, 3, 1, True), (64, 3)).named_children())
    layers |= {"conv_3": ConvNorm(64, 80), "conv_4": ConvNorm(80, 192, 3, 1, True)}
    layers |= {"mixed": Block35(192, 32), "mixed_1": Block35(256, 64), "mixed_2": Block35(288, 64)}
    layers |= {"mixed_3": Reduce35(), "mixed_4": Block17(128), "mixed_5": Block17(160)}
    layers |= {"mixed_6": Block17(160), "mixed_7": Block17(192), "mixed_8": Reduce17()}
    layers |= {"mixed_9": Block8(1280, max_pool=False), "mixed_10": Block8(2048, max_pool=True)}
    return nn.ModuleDict(layers)


class InceptionV3(nn.Module):
    """`InceptionV3()(images) -> (pool, spatial)`; weights come from `inception_weights.load_inception`.

    Images are (B, 3, H, W) floats in 0..255 of any size. `pool` (B, 2048) is the global average ("pool_3"), `spatial`
    (B, 2023) the first 7 channels of "mixed_6/conv" flattened as H, W, C. Everything is float32 without TF32.
    """

    def __init__(self, channels_last: bool = False):
        super().__init__()
        self.layers = _layers()
        self.output = nn.Linear(POOL_DIM, NUM_OUTPUTS)
        self.requires_grad_(False)
        self.eval()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.memory_format)

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        layers = self.layers
        with exact_float32():
            x = (resize_bilinear_tf1(images.float(), INPUT_SIZE) - 128) / 128
            x = x.contiguous(memory_format=self.memory_format)
            x = layers["conv_2"](layers["conv_1"](layers["conv"](x)))
            x = F.max_pool2d(x, 3, 2)
            x = F.max_pool2d(layers["conv_4"](layers["conv_3"](x)), 3, 2)
            for name in ("mixed", "mixed_1", "mixed_2", "mixed_3", "mixed_4", "mixed_5"):
                x = layers[name](x)
            x, first = layers["mixed_6"](x, keep_first=True)
            spatial = first[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).reshape(len(x), SPATIAL_DIM)
            for name in ("mixed_7", "mixed_8", "mixed_9", "mixed_10"):
                x = layers[name](x)
            return x.mean((2, 3)), spatial.contiguous()

    @torch.no_grad()
    def softmax(self, pool: Tensor, with_bias: bool = False) -> Tensor:
        """Class probabilities (B, 1008). The Inception Score is defined without the bias."""
        with exact_float32():
            return F.linear(pool, self.output.weight, self.output.bias if with_bias else None).softmax(-1)
