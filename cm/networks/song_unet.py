"""NCSN++ and DDPM++ (Song et al., "Score-Based Generative Modeling through SDEs", arXiv:2011.13456, App. C and H).

Both are one U-Net; they differ in the noise embedding, the resampling filter and the residual input pyramid.
Names, shapes and order of the state dict are those of the checkpoints released with EDM (arXiv:2206.00364).

With a second clock (`cm.networks.second_clock`) their layouts are those of CTM (arXiv:2310.02279) and of MeanFlow
(arXiv:2505.13447).

Shapes: B batch, C channels of a feature map, E = emb_mult * model_channels embedding channels, R side of the images.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from cm.networks.attention import channel_mix, pointwise, qkv_attention
from cm.networks.layers import (
    DownConv,
    FourierEmbedding,
    PositionalEmbedding,
    PyramidConv,
    UpConv,
    check_inputs,
    group_norm,
    one_hot,
    pixel_norm,
    xavier_,
)
from cm.networks.second_clock import ADDED, JOINED, at_all_times, check_form, check_second, scale_clock
from cm.nn import UNGUIDED, Dropout, checkpoint, zero_module

# Sums of two branches are divided by sqrt(2), so that depth does not change the variance.
SKIP_SCALE = math.sqrt(0.5)

# Scale of the last layer of every branch ("zero" in the papers), and of the attention's input layer.
NEARLY_ZERO = 1e-10
ATTENTION_SCALE = 0.2


class SongBlock(nn.Module):
    """Residual block of BigGAN's type, with resampling inside, then single-head attention if asked.

    channels, skip_channels: of the trunk and of the encoder output that is concatenated to it (0 = none).
    resample: "none", "up" or "down", by the FIR filter `taps` on both branches. double_norm: the embedding scales and
    shifts the norm by vectors that are normalised themselves (sCM, Lu & Song 2025), instead of being added before it.
    second_clock: the embedding is that of two clocks side by side, (B, 2 E), and what the second one adds begins at 0.
    qkv_first: rows of the attention's weight are ({q, k, v}, channel), as in MeanFlow's code, not (channel, {q, k, v}).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        skip_channels: int = 0,
        resample: str = "none",
        taps: tuple[float, ...] = (1, 3, 3, 1),
        attention: bool = False,
        dropout: float = 0.0,
        double_norm: bool = False,
        second_clock: bool = False,
        qkv_first: bool = False,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        in_channels = channels + skip_channels
        self.double_norm = double_norm
        self.skip_channels = skip_channels
        self.attention, self.qkv_first = attention, qkv_first
        self.use_checkpoint = use_checkpoint
        self.norm0 = group_norm(in_channels)
        self.conv0 = xavier_(_conv(in_channels, out_channels, 3, resample, taps))
        modulation = out_channels * (2 if double_norm else 1)
        self.affine = xavier_(nn.Linear(emb_channels, modulation))
        self.affine_s = zero_module(nn.Linear(emb_channels, modulation)) if second_clock else None
        self.norm1 = group_norm(out_channels)
        self.drop = Dropout(dropout)
        self.conv1 = xavier_(_conv(out_channels, out_channels, 3), NEARLY_ZERO)
        if resample != "none" or in_channels != out_channels:
            self.skip = xavier_(_conv(in_channels, out_channels, 1, resample, taps))
        else:
            self.skip = nn.Identity()
        if attention:
            self.norm2 = group_norm(out_channels)
            self.qkv = xavier_(_conv(out_channels, 3 * out_channels, 1), ATTENTION_SCALE)
            self.proj = xavier_(_conv(out_channels, out_channels, 1), NEARLY_ZERO)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        # In place where a result is nobody else's: no new tensors.
        h = self.conv0(F.silu(self.norm0(x)))
        modulation = self._modulation(emb).to(h.dtype)[:, :, None, None]
        if self.double_norm:
            scale, shift = (pixel_norm(a) for a in modulation.chunk(2, dim=1))
            h = self.norm1(h) * scale + shift
        else:
            h = self.norm1(h.add_(modulation))
        h = self.drop(F.silu(h))
        x = self.conv1(h).add_(self.skip(x)).mul_(SKIP_SCALE)
        return (x + self._attend(x)).mul_(SKIP_SCALE) if self.attention else x

    def _modulation(self, emb: Tensor) -> Tensor:
        if self.affine_s is None:
            return self.affine(emb)
        emb, second = emb.chunk(2, dim=1)
        return self.affine(emb) + self.affine_s(second)

    def _attend(self, x: Tensor) -> Tensor:
        weight, bias = self.qkv.weight.flatten(1), self.qkv.bias
        if not self.qkv_first:  # Reordering the rows, not the features, is nearly free.
            weight = weight.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
            bias = bias.unflatten(0, (-1, 3)).transpose(0, 1).flatten()
        tokens = self.norm2(x).flatten(2).transpose(1, 2)  # (B, R * R, C)
        tokens = qkv_attention(channel_mix(tokens, weight, bias), num_heads=1)
        return pointwise(self.proj, tokens).transpose(1, 2).reshape(x.shape)


def _conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    resample: str = "none",
    taps: tuple[float, ...] = (),
) -> nn.Conv2d:
    if resample == "up":
        return UpConv(in_channels, out_channels, kernel, taps)
    if resample == "down":
        return DownConv(in_channels, out_channels, kernel, taps)
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)


@dataclass(frozen=True, kw_only=True)
class Torso:
    """What the blocks look like, and how they follow each other. The fields are arguments of `SongUNet`.

    widths, sides: channels and image side of each level, finest first.
    """

    widths: tuple[int, ...]
    sides: tuple[int, ...]
    emb_channels: int
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    dropout: float
    taps: tuple[float, ...]
    input_pyramid: bool
    double_norm: bool
    second_clock: bool
    qkv_first: bool
    use_checkpoint: bool

    def encoder(self, in_channels: int, channels: int) -> tuple[nn.ModuleDict, list[int]]:
        """Layers of the way down, and the channels of each output that the way up will ask for."""
        layers, outputs = nn.ModuleDict(), [channels]
        layers[self._name(0, "conv")] = xavier_(_conv(in_channels, channels, 3))
        pyramid_channels = in_channels
        for level, width in enumerate(self.widths):
            if level > 0:
                layers[self._name(level, "down")] = self._block(channels, channels, resample="down")
                if self.input_pyramid:
                    step = PyramidConv(pyramid_channels, channels, self.taps)
                    layers[self._name(level, "aux_residual")] = xavier_(step)
                    pyramid_channels = channels
                outputs.append(channels)
            for i in range(self.num_res_blocks):
                attention = self.sides[level] in self.attention_resolutions
                layers[self._name(level, f"block{i}")] = self._block(channels, width, attention=attention)
                channels = width
                outputs.append(width)
        return layers, outputs

    def decoder(self, skip_widths: list[int], out_channels: int) -> nn.ModuleDict:
        """Layers of the way up; each block takes one output of the encoder, the last one first."""
        layers, skip_widths = nn.ModuleDict(), list(skip_widths)
        channels = self.widths[-1]
        for level in reversed(range(len(self.widths))):
            if level == len(self.widths) - 1:
                layers[self._name(level, "in0")] = self._block(channels, channels, attention=True)
                layers[self._name(level, "in1")] = self._block(channels, channels)
            else:
                layers[self._name(level, "up")] = self._block(channels, channels, resample="up")
            width = self.widths[level]
            for i in range(self.num_res_blocks + 1):
                last = i == self.num_res_blocks
                attention = last and self.sides[level] in self.attention_resolutions
                skip_channels = skip_widths.pop()
                layers[self._name(level, f"block{i}")] = self._block(
                    channels, width, skip_channels=skip_channels, attention=attention
                )
                channels = width
        layers[self._name(0, "aux_norm")] = group_norm(channels)
        layers[self._name(0, "aux_conv")] = xavier_(_conv(channels, out_channels, 3), NEARLY_ZERO)
        return layers

    def _name(self, level: int, what: str) -> str:
        return f"{self.sides[level]}x{self.sides[level]}_{what}"

    def _block(
        self,
        channels: int,
        out_channels: int,
        *,
        skip_channels: int = 0,
        resample: str = "none",
        attention: bool = False,
    ) -> SongBlock:
        return SongBlock(
            channels,
            out_channels,
            self.emb_channels,
            skip_channels=skip_channels,
            resample=resample,
            taps=self.taps,
            attention=attention,
            dropout=self.dropout,
            double_norm=self.double_norm,
            second_clock=self.second_clock,
            qkv_first=self.qkv_first,
            use_checkpoint=self.use_checkpoint,
        )


class SongUNet(nn.Module):
    """U-Net of score SDE, with the noise level, class labels and augmentation labels as inputs.

    image_size: side of the images. It names the layers; any input works whose sides 2^(levels - 1) divides.
    in_channels, out_channels: of the images and of the prediction.
    model_channels, channel_mult: level i is channel_mult[i] * model_channels wide.
    num_res_blocks: blocks per level on the way down; one more on the way up.
    attention_resolutions: sides, in pixels, at which attention follows each block on the way down and the last one
        on the way up. The middle always has it.
    num_classes: number of labels; None for an unconditional network.
    augment_dim: number of augmentation labels (`cm.objectives.augmentation`), 0 for none.
    embedding: "fourier" (of scale `fourier_scale`) or "positional".
    embedding_mult, emb_mult: size of the noise embedding, and of what blocks see of it, in units of model_channels.
    taps: resampling filter.
    input_pyramid: add a learned pyramid of the input image to the trunk at each coarser level.
    double_norm: sCM's adaptive double normalisation (Lu & Song 2025), see `SongBlock`.
    second_clock: "" for a network of one time; "added" or "joined", see `cm.networks.second_clock`.
    told_guidance: it takes a guidance (B, 3), whose features join the embedding's.
    qkv_first: order of the attention's weights, see `SongBlock`.
    use_checkpoint: recompute activations in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channel_mult: tuple[float, ...],
        num_res_blocks: int,
        attention_resolutions: tuple[int, ...],
        dropout: float = 0.0,
        num_classes: int | None = None,
        augment_dim: int = 0,
        embedding: str = "fourier",
        embedding_mult: int = 2,
        emb_mult: int = 4,
        fourier_scale: float = 16.0,
        taps: tuple[float, ...] = (1, 3, 3, 1),
        input_pyramid: bool = True,
        double_norm: bool = False,
        second_clock: str = "",
        told_guidance: bool = False,
        qkv_first: bool = False,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.second_clock = check_form(second_clock, (ADDED, JOINED))
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.num_classes, self.augment_dim, self.told_guidance = num_classes, augment_dim, told_guidance
        self.divisor = 2 ** (len(channel_mult) - 1)
        if image_size < 1 or image_size % self.divisor:
            raise ValueError(
                f"image_size {image_size} is not a multiple of {self.divisor} ({len(channel_mult)} levels)"
            )
        torso = Torso(
            widths=tuple(int(mult * model_channels) for mult in channel_mult),
            sides=tuple(image_size >> level for level in range(len(channel_mult))),
            emb_channels=emb_mult * model_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=tuple(attention_resolutions),
            dropout=dropout,
            taps=taps,
            input_pyramid=input_pyramid,
            double_norm=double_norm,
            second_clock=second_clock == ADDED,
            qkv_first=qkv_first,
            use_checkpoint=use_checkpoint,
        )
        features = embedding_mult * model_channels
        # The order of these lines is the order of the parameters in a checkpoint.
        self.map_noise = _embedding(embedding, features, fourier_scale)
        features *= 2 if second_clock == JOINED else 1
        if num_classes is not None:
            self.map_label = xavier_(nn.Linear(num_classes, features))
        if augment_dim:
            self.map_augment = xavier_(nn.Linear(augment_dim, features, bias=False))
        if told_guidance:
            self.map_guidance = xavier_(nn.Linear(3 * embedding_mult * model_channels, features, bias=False))
        self.map_layer0 = xavier_(nn.Linear(features, torso.emb_channels))
        self.map_layer1 = xavier_(nn.Linear(torso.emb_channels, torso.emb_channels))
        if second_clock == ADDED:
            self.map_layer0_s = xavier_(nn.Linear(features, torso.emb_channels))
            self.map_layer1_s = xavier_(nn.Linear(torso.emb_channels, torso.emb_channels))
        self.enc, skip_widths = torso.encoder(in_channels, model_channels)
        self.dec = torso.decoder(skip_widths, out_channels)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the torso: the blocks between the input and the output layer."""
        return next(iter(self.enc.values())).weight.dtype

    def convert_torso(self, dtype: torch.dtype) -> None:
        """Run the torso's convolutions and attention in `dtype`; embeddings, norms and output layer stay fp32."""
        *_, output = self.dec.values()
        for module in (*self.enc.modules(), *self.dec.modules()):
            if isinstance(module, nn.Conv2d) and module is not output:
                for p in module.parameters():  # not the filters: they are constants of the checkpoint
                    p.data = p.data.to(dtype)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        augment_labels: Tensor | None = None,
        second: Tensor | None = None,
        guidance_inputs: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Prediction for images `x` (B, in_channels, R, R), in the dtype of the output layer.

        timesteps (B,): c_noise = ln(sigma) / 4. y (B,) int64: class labels; -1 stands for none. augment_labels
        (B, augment_dim): what was done to the images; None means nothing, and so do zeros. second (B,): the second
        clock, of a network that has one. guidance_inputs (B, 3): of one that is told them, 1 / scale and the first and
        last time at which it acts; None: scale 1. guidance (B,): the scale alone, of any network with a slot for it.
        """
        self._check_inputs(x, timesteps, y, augment_labels)
        if guidance is not None and self.told_guidance:
            guidance_inputs = at_all_times(guidance)
        else:
            second = scale_clock(guidance, second)
        check_second(second, timesteps, self.second_clock)
        guides = self._guides(guidance_inputs, timesteps)
        emb = self._embed(timesteps, second, guides, y, augment_labels)
        h = pyramid = x.to(self.dtype)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            if isinstance(layer, PyramidConv):
                h = pyramid = skips[-1] = layer(pyramid).add_(h).mul_(SKIP_SCALE)
            else:
                h = layer(h, emb) if isinstance(layer, SongBlock) else layer(h)
                skips.append(h)
        *blocks, norm, conv = self.dec.values()
        for block in blocks:
            h = block(torch.cat([h, skips.pop()], dim=1) if block.skip_channels else h, emb)
        return conv(F.silu(norm(h.to(conv.weight.dtype))))

    def _embed(
        self,
        timesteps: Tensor,
        second: Tensor | None,
        guides: Tensor | None,
        y: Tensor | None,
        augment_labels: Tensor | None,
    ) -> Tensor:
        """(B, E); with a second clock that is added, both side by side: (B, 2 E)."""
        dtype = self.map_layer0.weight.dtype
        emb = self.map_noise(timesteps.to(dtype))
        waves = None if second is None else self.map_noise(second.to(dtype))
        if self.second_clock == JOINED:
            emb = torch.cat([emb, waves], dim=1)
        if guides is not None:
            emb = emb + guides
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(self._labelled(emb, y, augment_labels)))))
        if self.second_clock != ADDED:
            return emb
        waves = self._labelled(waves, y, augment_labels)
        return torch.cat([emb, F.silu(self.map_layer1_s(F.silu(self.map_layer0_s(waves))))], dim=1)

    def _guides(self, given: Tensor | None, timesteps: Tensor) -> Tensor | None:
        """What a guidance (B, 3) adds to the features of times; None for a network that is not told any."""
        if not self.told_guidance:
            if given is not None:
                raise ValueError("the network is not told a guidance")
            return None
        dtype = self.map_layer0.weight.dtype
        if given is None:
            given = torch.tensor(UNGUIDED, device=timesteps.device).expand(len(timesteps), -1)
        if given.shape != (len(timesteps), len(UNGUIDED)):
            raise ValueError(f"guidance_inputs have shape {tuple(given.shape)}, need ({len(timesteps)}, 3)")
        return self.map_guidance(torch.cat([self.map_noise(g) for g in given.to(dtype).unbind(1)], dim=1))

    def _labelled(self, emb: Tensor, y: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        dtype = emb.dtype
        if y is not None:
            # One-hot vectors of length sqrt(num_classes), so that an entry has unit variance.
            emb = emb + self.map_label(one_hot(y, self.num_classes, dtype) * math.sqrt(self.num_classes))
        if self.augment_dim:
            # No labels are zeros, so that every parameter takes part, as DistributedDataParallel demands.
            zeros = emb.new_zeros(emb.shape[0], self.augment_dim)
            emb = emb + self.map_augment(zeros if augment_labels is None else augment_labels.to(dtype))
        return emb

    def _check_inputs(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None, augment_labels: Tensor | None
    ) -> None:
        check_inputs(x, timesteps, y, self.in_channels, self.divisor, self.num_classes)
        batch = x.shape[0]
        if augment_labels is not None and augment_labels.shape != (batch, self.augment_dim):
            raise ValueError(
                f"augmentation labels have shape {tuple(augment_labels.shape)}; a network with augment_dim "
                f"{self.augment_dim} needs ({batch}, {self.augment_dim})"
            )


def _embedding(kind: str, features: int, fourier_scale: float) -> nn.Module:
    if kind == "fourier":
        return FourierEmbedding(features, fourier_scale)
    if kind == "positional":
        return PositionalEmbedding(features)
    raise ValueError(f"embedding must be fourier or positional, got {kind}")
