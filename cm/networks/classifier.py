"""The classifier of ADM's guidance (arXiv:2105.05233, section 4): a U-Net's encoder with attention pooling.

Shapes: B batch, C channels, L = product of the spatial sizes.

Parameters are named as in the released classifiers; `cm.models.guided_diffusion` loads those.
"""

import torch
import torch.nn as nn
from torch import Tensor

from cm.networks.attention import count_heads, pointwise, qkv_attention
from cm.networks.unet import Torso, size_divisor
from cm.nn import SiLU, conv_nd, linear, normalization, timestep_embedding


class AttentionPool2d(nn.Module):
    """Pooling by the attention of the mean over all positions: (B, embed_dim, S, S) -> (B, output_dim).

    spacial_dim: S (the name is that of released code); num_heads_channels: width of a head;
    output_dim: None for embed_dim.
    """

    def __init__(
        self, spacial_dim: int, embed_dim: int, num_heads_channels: int, output_dim: int | None = None
    ):
        super().__init__()
        positions = spacial_dim**2 + 1
        self.num_heads = count_heads(embed_dim, 1, num_heads_channels)
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, positions) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2)  # (B, C, 1 + L)
        tokens = (tokens + self.positional_embedding.to(x.dtype)).transpose(1, 2)
        pooled = qkv_attention(pointwise(self.qkv_proj, tokens), self.num_heads)[:, :1]
        return pointwise(self.c_proj, pooled)[:, 0]


class EncoderUNetModel(nn.Module):
    """Logits of noisy images: the way down of `cm.networks.unet.UNetModel`, its middle, attention pooling.

    out_channels: number of classes. The other arguments are those of UNetModel; images must be square and
    of `image_size`, because pooling knows its positions.
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
        use_checkpoint: bool = False,
        num_head_channels: int = 64,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
    ):
        super().__init__()
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        coarsest = image_size // size_divisor(image_size, channel_mult)
        torso = Torso(
            widths=tuple(int(mult * model_channels) for mult in channel_mult),
            emb_channels=4 * model_channels,
            num_res_blocks=num_res_blocks,
            attention_resolutions=tuple(attention_resolutions),
            dropouts=(dropout,) * len(channel_mult),
            conv_resample=conv_resample,
            dims=2,
            use_checkpoint=use_checkpoint,
            num_head_channels=num_head_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
        )
        self.time_embed = nn.Sequential(
            linear(model_channels, torso.emb_channels), SiLU(), linear(torso.emb_channels, torso.emb_channels)
        )
        self.input_blocks, _ = torso.encoder(in_channels, num_heads=1)
        self.middle_block = torso.middle(num_heads=1)
        width = torso.widths[-1]
        self.out = nn.Sequential(
            normalization(width), SiLU(), AttentionPool2d(coarsest, width, num_head_channels, out_channels)
        )

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Logits (B, out_channels) of images (B, in_channels, image_size, image_size) at times (B,)."""
        expected = (self.in_channels, self.image_size, self.image_size)
        if x.shape[1:] != expected or timesteps.shape != x.shape[:1]:
            raise ValueError(
                f"images of shape {tuple(x.shape)} and times of shape {tuple(timesteps.shape)} "
                f"do not fit a classifier of (B, {', '.join(map(str, expected))}) and (B,)"
            )
        emb = timestep_embedding(timesteps, self.model_channels)
        emb = self.time_embed(emb.to(self.time_embed[0].weight.dtype))
        h = x
        for block in self.input_blocks:
            h = block(h, emb)
        return self.out(self.middle_block(h, emb))
