"""EDM2's U-Net (Karras et al. 2024, arXiv:2312.02696, App. B) and the form of it that sCM trains (Lu & Song 2025).

Names, shapes and order of the state dict are those of the released checkpoints, without their leading `unet.`.

Shapes: B batch, C channels of a feature map, E = width of the widest level, R side of the images.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from cm.networks.attention import count_heads
from cm.networks.layers import check_inputs, one_hot
from cm.networks.magnitude import (
    MPConv,
    MPFourier,
    MPPositional,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    normalize_weights,
    resample,
)
from cm.networks.second_clock import ADDED, check_form, check_second, scale_clock
from cm.nn import Dropout, append_dims, checkpoint

LOGVAR_CHANNELS = 128


class Block(nn.Module):
    """Residual block of EDM2, then attention if asked: x (B, in_channels, ...), emb (B, E) -> (B, out_channels, ...).

    flavor: "enc" normalises the pixels of the trunk first; "dec" takes the branch off before the trunk changes width.
    resample_mode: "keep", "up" or "down", on both branches. double_norm: sCM's adaptive double normalisation in the
    place of EDM2's gain. clip_act: largest size of an output; None: no limit. The balances are the branch's shares.
    second_clock: emb is that of two clocks side by side, (B, 2 E), and the gain of what the second adds begins at 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        flavor: str = "enc",
        resample_mode: str = "keep",
        attention: bool = False,
        num_heads: int = 1,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
        double_norm: bool = False,
        second_clock: bool = False,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.flavor, self.resample_mode, self.double_norm = flavor, resample_mode, double_norm
        self.num_heads = num_heads if attention else 0
        self.res_balance, self.attn_balance, self.clip_act = res_balance, attn_balance, clip_act
        self.use_checkpoint = use_checkpoint
        self.second_clock = second_clock
        if not double_norm:
            self.emb_gain = nn.Parameter(torch.zeros([]))
        if second_clock:
            self.emb_gain_s = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels * (2 if double_norm else 1))
        if second_clock:
            self.emb_linear_s = MPConv(emb_channels, out_channels * (2 if double_norm else 1))
        self.drop = Dropout(dropout)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        if attention:
            self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1)
            self.attn_proj = MPConv(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = resample(x, self.resample_mode)
        if self.flavor == "enc":
            x = normalize(self._skip(x), dim=1)
        y = self.conv_res0(mp_silu(x))
        y = self.conv_res1(self.drop(mp_silu(self._modulate(y, emb))))
        x = mp_sum(self._skip(x) if self.flavor == "dec" else x, y, self.res_balance)
        if self.num_heads:
            x = mp_sum(x, self.attn_proj(self._attend(x)), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def _skip(self, x: Tensor) -> Tensor:
        return x if self.conv_skip is None else self.conv_skip(x)

    def _modulate(self, y: Tensor, emb: Tensor) -> Tensor:
        """y (1 + gain linear(emb)); with double norm, norm(y) norm(s) + norm(b), where (s, b) = linear(emb)."""
        emb, *second = emb.chunk(2, dim=1) if self.second_clock else (emb,)
        modulation = self.emb_linear(emb) if self.double_norm else self.emb_linear(emb, self.emb_gain)
        if second:
            modulation = modulation + self.emb_linear_s(second[0], self.emb_gain_s)
        if not self.double_norm:
            return y * append_dims(modulation + 1, y.ndim).to(y.dtype)
        scale, shift = (append_dims(normalize(a), y.ndim).to(y.dtype) for a in modulation.chunk(2, dim=1))
        return normalize(y, dim=1) * scale + shift

    def _attend(self, x: Tensor) -> Tensor:
        # Rows of the weight are (head, channel, {q, k, v}); each of q, k, v is normalised pixel by pixel.
        rows = (
            self.attn_qkv(x).flatten(2).unflatten(1, (self.num_heads, -1, 3))
        )  # (B, heads, C / heads, 3, R * R)
        q, k, v = normalize(rows, dim=2).permute(3, 0, 1, 4, 2)
        attended = F.scaled_dot_product_attention(q, k, v)  # (B, heads, R * R, C / heads)
        return attended.transpose(2, 3).reshape(x.shape)


class EDM2UNet(nn.Module):
    """U-Net of EDM2, with the noise level and class labels as inputs.

    image_size: side of the images. It names the layers; any input works whose sides 2^(levels - 1) divides.
    in_channels, out_channels: of the images and of the prediction.
    model_channels, channel_mult: level i is channel_mult[i] * model_channels wide.
    num_res_blocks: blocks per level on the way down; one more on the way up.
    attention_resolutions: sides, in pixels, whose blocks have attention. The first block in the middle always has it.
    num_heads, num_head_channels: as in `cm.networks.attention.count_heads`.
    dropout_resolutions: sides whose blocks drop activations; None for all.
    num_classes: number of labels; None for an unconditional network.
    logvar_channels: features of the head that learns u(sigma), the logarithm of the loss's variance; 0 for none.
    double_norm: the form of sCM, whose time input is t itself: positional features, adaptive double normalisation.
    second_clock: "" for a network of one time, or "added", see `cm.networks.second_clock`.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        channel_mult: tuple[float, ...] = (1, 2, 3, 4),
        num_res_blocks: int = 3,
        attention_resolutions: tuple[int, ...] = (16, 8),
        num_heads: int = 1,
        num_head_channels: int = 64,
        dropout: float = 0.0,
        dropout_resolutions: tuple[int, ...] | None = None,
        num_classes: int | None = None,
        logvar_channels: int = LOGVAR_CHANNELS,
        double_norm: bool = False,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
        second_clock: str = "",
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.second_clock = check_form(second_clock, (ADDED,))
        self.in_channels, self.num_classes, self.double_norm = in_channels, num_classes, double_norm
        self.has_head = logvar_channels > 0
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.divisor = 2 ** (len(channel_mult) - 1)
        widths = [int(mult * model_channels) for mult in channel_mult]
        sides = [image_size >> level for level in range(len(widths))]
        emb_channels = max(widths)
        dropping = sides if dropout_resolutions is None else dropout_resolutions
        shared = {"double_norm": double_norm, "second_clock": bool(second_clock), "clip_act": clip_act}
        shared |= {"res_balance": res_balance, "attn_balance": attn_balance, "use_checkpoint": use_checkpoint}

        def block(channels: int, width: int, side: int, attention: bool = False, **kind: str) -> Block:
            return Block(
                channels,
                width,
                emb_channels,
                attention=attention,
                num_heads=count_heads(width, num_heads, num_head_channels) if attention else 1,
                dropout=dropout if side in dropping else 0.0,
                **shared,
                **kind,
            )

        # The order of these lines is the order of the parameters in a checkpoint.
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_pos = MPPositional(model_channels) if double_norm else None
        self.emb_fourier = None if double_norm else MPFourier(model_channels)
        self.emb_noise = MPConv(model_channels, emb_channels)
        self.emb_noise_s = MPConv(model_channels, emb_channels) if second_clock else None
        self.emb_label = None if num_classes is None else MPConv(num_classes, emb_channels)
        levels = list(zip(sides, widths, strict=True)), num_res_blocks, attention_resolutions
        self.enc, skips = _encoder(block, in_channels, model_channels, *levels)
        self.dec = _decoder(block, skips, *levels)
        self.out_conv = MPConv(widths[0], out_channels, 3)
        if self.has_head:
            self.logvar_fourier = MPFourier(logvar_channels)
            self.logvar_linear = MPConv(logvar_channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the torso: the blocks between the input and the output layer."""
        return next(iter(self.enc.values())).weight.dtype

    def convert_torso(self, dtype: torch.dtype) -> None:
        """Run the torso's convolutions and attention in `dtype`; embeddings and output layer stay fp32."""
        for module in (*self.enc.modules(), *self.dec.modules()):
            if isinstance(module, MPConv) and module.weight.ndim == 4:
                module.weight.data = module.weight.data.to(dtype)

    def project(self, params: Mapping[str, Tensor]) -> None:
        """Forced weight normalisation of parameters given by name; belongs behind each optimizer step."""
        normalize_weights(self, params)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        return_logvar: bool = False,
        second: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Prediction for images `x` (B, in_channels, R, R), in the dtype of the output layer.

        timesteps (B,): c_noise = ln(sigma) / 4; with double_norm t = arctan(sigma / sigma_data). y (B,) int64: class
        labels; -1 stands for none. return_logvar: (prediction, u (B,)). second (B,): the second clock, of a network
        that has one; guidance (B,): a scale in its place.
        """
        check_inputs(x, timesteps, y, self.in_channels, self.divisor, self.num_classes)
        second = scale_clock(guidance, second)
        check_second(second, timesteps, self.second_clock)
        emb = self._embed(self.emb_noise, timesteps, y)
        if second is not None:
            emb = torch.cat([emb, self._embed(self.emb_noise_s, second, y)], dim=1)
        h = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).to(self.dtype)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            h = layer(h, emb) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for name, block in self.dec.items():
            h = mp_cat(h, skips.pop(), self.concat_balance) if "block" in name else h
            h = block(h, emb)
        out = self.out_conv(h.to(self.out_conv.weight.dtype), self.out_gain)
        if return_logvar:
            return out, self.logvar(timesteps)
        # With weight 0 if nobody asks for it, so that every parameter takes part, as DistributedDataParallel demands.
        return out + 0 * self.logvar(timesteps).sum() if self.has_head else out

    def logvar(self, timesteps: Tensor) -> Tensor:
        """u (B,) at times (B,): the logarithm of the loss's variance that the head has learned (EDM2, Eq. 21)."""
        if not self.has_head:
            raise ValueError("the network has no head for the uncertainty: give it logvar_channels")
        features = self.logvar_fourier(timesteps.to(self.logvar_linear.weight.dtype))
        return self.logvar_linear(features).squeeze(1)

    def _embed(self, layer: MPConv, times: Tensor, y: Tensor | None) -> Tensor:
        times = times.to(layer.weight.dtype)
        emb = layer(self.emb_pos(times) if self.double_norm else self.emb_fourier(times))
        if y is not None:
            # Vectors of length sqrt(num_classes), so that an entry has unit variance; zeros for the label -1.
            labels = one_hot(y, self.num_classes, emb.dtype) * math.sqrt(self.num_classes)
            emb = mp_sum(emb, self.emb_label(labels), self.label_balance)
        return mp_silu(emb)


def _encoder(
    block: Callable[..., Block],
    in_channels: int,
    channels: int,
    levels: list[tuple[int, int]],
    num_res_blocks: int,
    attention_resolutions: tuple[int, ...],
) -> tuple[nn.ModuleDict, list[int]]:
    """Layers of the way down, and the channels of each output that the way up will ask for.

    block(channels, width, side, attention, **kind) makes one; levels: (side, width), finest first.
    """
    side = levels[0][0]
    layers, outputs = nn.ModuleDict({f"{side}x{side}_conv": MPConv(in_channels + 1, channels, 3)}), [channels]
    for level, (side, width) in enumerate(levels):
        if level > 0:
            layers[f"{side}x{side}_down"] = block(channels, channels, side, resample_mode="down")
            outputs.append(channels)
        for i in range(num_res_blocks):
            layers[f"{side}x{side}_block{i}"] = block(channels, width, side, side in attention_resolutions)
            channels = width
            outputs.append(width)
    return layers, outputs


def _decoder(
    block: Callable[..., Block],
    skips: list[int],
    levels: list[tuple[int, int]],
    num_res_blocks: int,
    attention_resolutions: tuple[int, ...],
) -> nn.ModuleDict:
    """Layers of the way up; each block takes one output of the encoder, the last one first."""
    block = partial(block, flavor="dec")
    side, channels = levels[-1]
    layers, skips = nn.ModuleDict(), list(skips)
    layers[f"{side}x{side}_in0"] = block(channels, channels, side, True)
    layers[f"{side}x{side}_in1"] = block(channels, channels, side)
    for side, width in reversed(levels):
        if side != levels[-1][0]:
            layers[f"{side}x{side}_up"] = block(channels, channels, side, resample_mode="up")
        for i in range(num_res_blocks + 1):
            attention = side in attention_resolutions
            layers[f"{side}x{side}_block{i}"] = block(channels + skips.pop(), width, side, attention)
            channels = width
    return layers
