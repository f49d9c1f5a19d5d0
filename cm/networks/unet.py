"""The U-Net of ADM (Dhariwal & Nichol, arXiv:2105.05233), which EDM teachers and consistency models share.

Shapes: B batch, C channels of a feature map, E = 4 * model_channels time-embedding channels,
`*spatial` one, two or three image dimensions.

Parameter names, shapes and their order are those of the released checkpoints.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from cm.networks.attention import AttentionBlock
from cm.networks.layers import check_inputs
from cm.networks.second_clock import ADDED, check_form, check_second, clock_mlp, scale_clock
from cm.nn import (
    Dropout,
    SiLU,
    append_dims,
    avg_pool_nd,
    checkpoint,
    conv_doubled,
    conv_nd,
    doubling,
    linear,
    modulated_norm,
    normalization,
    timestep_embedding,
    zero_module,
)


class TimestepBlock(nn.Module):
    """A module whose forward takes the time embedding as second argument."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Apply the module to features (B, C, *spatial) given an embedding (B, E)."""
        raise NotImplementedError


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that hands the time embedding to those of its children that take one."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour doubling of the spatial size, then a 3x3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
        self.channels = channels
        if use_conv:
            self.conv = conv_nd(dims, channels, out_channels or channels, 3, padding=1)
        else:
            self.conv = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        _check_channels(x, self.channels)
        return conv_doubled(self.conv, x)


class Downsample(nn.Module):
    """Halving of the spatial size: by a strided 3x3 convolution if `use_conv`, else by averaging."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2, out_channels: int | None = None):
        super().__init__()
        self.channels = channels
        stride = doubling(dims)
        if use_conv:
            self.op = conv_nd(dims, channels, out_channels or channels, 3, stride=stride, padding=1)
        else:
            self.op = avg_pool_nd(dims, kernel_size=stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        _check_channels(x, self.channels)
        return self.op(x)


def _check_channels(x: Tensor, channels: int) -> None:
    if x.shape[1] != channels:
        raise ValueError(f"features of shape {tuple(x.shape)} enter a layer made for {channels} channels")


class ResBlock(TimestepBlock):
    """Residual block: norm, SiLU, conv, time embedding, norm, SiLU, dropout, zero-initialised conv.

    channels, out_channels: before and after; None keeps the number.
    emb_channels: E. The embedding scales and shifts the second norm's output (use_scale_shift_norm) or is
        added in front of that norm.
    use_conv: change the number of channels on the skip path by a 3x3 instead of a 1x1 convolution.
    up, down: resample both paths (nearest neighbour, average) before the first convolution.
    use_checkpoint: recompute activations in the backward pass instead of keeping them.
    second_clock: the embedding is that of two clocks side by side, (B, 2 E), and what the second one adds begins at 0.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
        second_clock: bool = False,
    ):
        super().__init__()
        out_channels = out_channels or channels
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            normalization(channels), SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        if up:
            self.resample = Upsample(channels, False, dims)
        elif down:
            self.resample = Downsample(channels, False, dims)
        else:
            self.resample = nn.Identity()
        emb_out_channels = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(SiLU(), linear(emb_channels, emb_out_channels))
        self.emb_layers_s = None
        if second_clock:
            self.emb_layers_s = nn.Sequential(SiLU(), zero_module(linear(emb_channels, emb_out_channels)))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            SiLU(),
            Dropout(dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        h = conv_doubled(conv, h) if isinstance(self.resample, Upsample) else conv(self.resample(h))
        emb_out = self._modulation(emb).to(h.dtype)
        if self.use_scale_shift_norm:
            h = self.out_layers[1:](modulated_norm(self.out_layers[0], h, *emb_out.chunk(2, dim=1)))
        else:
            h = self.out_layers(h + append_dims(emb_out, h.ndim))
        return h.add_(self.skip_connection(self.resample(x)))  # h is nobody else's: no new tensor

    def _modulation(self, emb: Tensor) -> Tensor:
        if self.emb_layers_s is None:
            return self.emb_layers(emb)
        emb, second = emb.chunk(2, dim=1)
        return self.emb_layers(emb) + self.emb_layers_s(second)


@dataclass(frozen=True, kw_only=True)
class Torso:
    """What the blocks between a U-Net's first and last layer look like, and how they follow each other.

    widths: channels of each level, finest first. The other fields are arguments of `UNetModel`.
    """

    widths: tuple[int, ...]
    emb_channels: int
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    dropouts: tuple[float, ...]  # of each level
    conv_resample: bool
    dims: int
    use_checkpoint: bool
    num_head_channels: int
    use_scale_shift_norm: bool
    resblock_updown: bool
    second_clock: bool = False

    def encoder(self, in_channels: int, num_heads: int) -> tuple[nn.ModuleList, list[int]]:
        """Blocks of the way down, and the number of channels that each one puts out."""
        channels = self.widths[0]
        blocks = [TimestepEmbedSequential(conv_nd(self.dims, in_channels, channels, 3, padding=1))]
        outputs = [channels]
        for level, width in enumerate(self.widths):
            if level > 0:
                blocks.append(TimestepEmbedSequential(self._down(level, channels)))
                outputs.append(channels)
            for _ in range(self.num_res_blocks):
                layers = [self._res(level, channels, width), *self._attention_at(level, width, num_heads)]
                blocks.append(TimestepEmbedSequential(*layers))
                outputs.append(width)
                channels = width
        return nn.ModuleList(blocks), outputs

    def middle(self, num_heads: int) -> TimestepEmbedSequential:
        """The blocks at the coarsest level, made in their order, in which initial weights are drawn."""
        width = self.widths[-1]
        layers = [self._res(-1, width, width), self._attention(width, num_heads), self._res(-1, width, width)]
        return TimestepEmbedSequential(*layers)

    def decoder(self, skip_widths: list[int], num_heads: int) -> nn.ModuleList:
        """Blocks of the way up; each takes one output of the encoder, the last one first, beside its input."""
        skip_widths = list(skip_widths)
        channels = self.widths[-1]
        blocks = []
        for level in reversed(range(len(self.widths))):
            width = self.widths[level]
            for i in range(self.num_res_blocks + 1):
                layers = [self._res(level, channels + skip_widths.pop(), width)]
                layers += self._attention_at(level, width, num_heads)
                if level > 0 and i == self.num_res_blocks:
                    layers.append(self._up(level - 1, width))
                blocks.append(TimestepEmbedSequential(*layers))
                channels = width
        return nn.ModuleList(blocks)

    def _res(
        self, level: int, channels: int, out_channels: int, up: bool = False, down: bool = False
    ) -> ResBlock:
        """A block whose output is of that level."""
        return ResBlock(
            channels,
            self.emb_channels,
            self.dropouts[level],
            out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            up=up,
            down=down,
            second_clock=self.second_clock,
        )

    def _attention(self, channels: int, num_heads: int) -> AttentionBlock:
        return AttentionBlock(channels, num_heads, self.num_head_channels, self.use_checkpoint, self.dims)

    def _attention_at(self, level: int, channels: int, num_heads: int) -> list[AttentionBlock]:
        wanted = 2**level in self.attention_resolutions
        return [self._attention(channels, num_heads)] if wanted else []

    def _down(self, level: int, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self._res(level, channels, channels, down=True)
        return Downsample(channels, self.conv_resample, self.dims)

    def _up(self, level: int, channels: int) -> nn.Module:
        if self.resblock_updown:
            return self._res(level, channels, channels, up=True)
        return Upsample(channels, self.conv_resample, self.dims)


def size_divisor(image_size: int, channel_mult: tuple[float, ...]) -> int:
    """What image sides must be divisible by; ValueError if `image_size` is not."""
    divisor = 2 ** (len(channel_mult) - 1)
    if image_size < 1 or image_size % divisor:
        raise ValueError(
            f"image_size = {image_size} is not a multiple of {divisor}, "
            f"which the {len(channel_mult)} levels of channel_mult = {tuple(channel_mult)} need"
        )
    return divisor


def _dropouts(
    dropout: float, sides: tuple[int, ...] | None, image_size: int, levels: int
) -> tuple[float, ...]:
    """Probability at each level, finest first; sides None: the same everywhere."""
    return tuple(dropout if sides is None or image_size >> level in sides else 0.0 for level in range(levels))


class UNetModel(nn.Module):
    """U-Net with residual blocks, attention, a time embedding and optional class labels.

    image_size: side of the training images. Any input works whose sides 2^(levels - 1) divides.
    in_channels, out_channels: of the images and of the prediction.
    model_channels: base width; level i is int(channel_mult[i] * model_channels) wide, a multiple of 32.
    num_res_blocks: residual blocks per level on the way down; one more on the way up.
    attention_resolutions: down-sampling factors (1, 2, 4, ...) at which attention follows each residual block.
    dropout: probability in every residual block, or in those whose output has a side of `dropout_resolutions`.
    conv_resample: resample with a convolution, if not resblock_updown.
    dims: 1, 2 or 3 spatial dimensions; volumes keep the size of their first one.
    num_classes: number of labels; None for an unconditional network.
    use_checkpoint: recompute activations in the backward pass instead of keeping them.
    use_fp16: says that the caller will call convert_to_fp16(); until then all is fp32, as weights must arrive.
    num_heads, num_head_channels: heads per attention, or, unless -1, the fixed width of a head instead;
        num_heads_upsample: heads on the way up; -1 for the same number.
    use_scale_shift_norm: the embedding scales and shifts a norm's output instead of being added before it.
    resblock_updown: resample inside residual blocks.
    use_new_attention_order: without effect: always (three, head, channel); `qkv_legacy_to_new` converts others.
    second_clock: "" for a network of one time, or "added", see `cm.networks.second_clock`.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: tuple[int, ...],
        dropout: float = 0,
        channel_mult: tuple[float, ...] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        dropout_resolutions: tuple[int, ...] | None = None,
        second_clock: str = "",
    ):
        super().__init__()
        self.second_clock = check_form(second_clock, (ADDED,))
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_classes = num_classes
        self.dims = dims
        self.use_fp16 = use_fp16
        self.divisor = size_divisor(image_size, channel_mult)
        torso = Torso(
            widths=tuple(int(mult * model_channels) for mult in channel_mult),
            emb_channels=4 * model_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=tuple(attention_resolutions),
            dropouts=_dropouts(dropout, dropout_resolutions, image_size, len(channel_mult)),
            conv_resample=conv_resample,
            dims=dims,
            use_checkpoint=use_checkpoint,
            num_head_channels=num_head_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            second_clock=bool(second_clock),
        )
        # The order of these lines is the order of the parameters in a checkpoint.
        self.time_embed = clock_mlp(model_channels, torso.emb_channels)
        self.time_embed_s = clock_mlp(model_channels, torso.emb_channels) if second_clock else None
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, torso.emb_channels)
        self.input_blocks, skip_widths = torso.encoder(in_channels, num_heads)
        self.middle_block = torso.middle(num_heads)
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.output_blocks = torso.decoder(skip_widths, heads_up)
        width = torso.widths[0]
        self.out = nn.Sequential(
            normalization(width), SiLU(), zero_module(conv_nd(dims, width, out_channels, 3, padding=1))
        )

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the torso: the blocks between the input and the output layer."""
        return self.input_blocks[0][0].weight.dtype

    def convert_torso(self, dtype: torch.dtype) -> None:
        """Run the torso's convolutions and attention in `dtype`; embeddings, norms and output layer stay fp32."""
        for block in (self.input_blocks, self.middle_block, self.output_blocks):
            for module in block.modules():
                if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                    module.to(dtype)

    def convert_to_fp16(self) -> None:
        """Run the torso in fp16."""
        self.convert_torso(torch.float16)

    def convert_to_fp32(self) -> None:
        """Run the torso in fp32."""
        self.convert_torso(torch.float32)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        second: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Prediction for images `x` (B, in_channels, *spatial) at times (B,), given labels y (B,) int64; -1: none.

        second (B,): the second clock, of a network that has one; guidance (B,): a scale in its place. The result is
        (B, out_channels, *spatial) in the dtype of the output layer: fp32 whatever the torso's.
        """
        check_inputs(x, timesteps, y, self.in_channels, self.divisor, self.num_classes, self.dims)
        second = scale_clock(guidance, second, speed=250.0)
        check_second(second, timesteps, self.second_clock)
        emb = self._embed(self.time_embed, timesteps, y)
        if second is not None:
            emb = torch.cat([emb, self._embed(self.time_embed_s, second, y)], dim=1)
        h = x.to(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.to(self.out[2].weight.dtype))

    def _embed(self, mlp: nn.Sequential, times: Tensor, y: Tensor | None) -> Tensor:
        emb = mlp(timestep_embedding(times, self.model_channels).to(mlp[0].weight.dtype))
        return emb if y is None else emb + self.label_emb(y.clamp_min(0)) * (y >= 0).to(emb)[:, None]
