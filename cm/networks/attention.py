"""Self-attention over the pixels of a feature map.

Shapes: B batch, C channels, L = product of the spatial sizes, H heads, D = C / H channels of one head.

The released weights hold queries, keys and values as (three, head, channel); the older ADM weights as
(head, three, channel). A network with the wrong order runs and makes garbage, so there is one order here
and a conversion of the weights for the other.
"""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from cm.nn import checkpoint, conv_nd, normalization, on_this_cpu, zero_module


def qkv_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v per head: (B, L, 3C), ordered (three, head, channel) -> (B, L, C)."""
    batch, length, width = qkv.shape
    # (3, B, H, L, D): views of qkv, so that fused kernels read them in place
    q, k, v = qkv.reshape(batch, length, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v)  # (B, H, L, D)
    return attended.transpose(1, 2).reshape(batch, length, width // 3)


def qkv_legacy_to_new(weight: Tensor, heads: int) -> Tensor:
    """Rows of a qkv weight or bias from (head, three, channel), guided-diffusion's legacy order, to ours."""
    if heads < 1 or weight.shape[0] % (3 * heads):
        raise ValueError(f"a qkv tensor of shape {tuple(weight.shape)} does not hold 3 x {heads} equal heads")
    return weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).reshape(weight.shape)


class AttentionBlock(nn.Module):
    """Residual multi-head self-attention over all positions: (B, C, *spatial) -> the same.

    channels: C, a multiple of 32.
    num_heads: H; num_head_channels: D, which replaces `num_heads` unless it is -1.
    use_checkpoint: recompute activations in the backward pass instead of keeping them.
    dims: number of spatial dimensions, which the released weights' 1x1 kernels carry in their shape.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool = False,
        dims: int = 2,
    ):
        super().__init__()
        self.channels = channels
        self.num_heads = count_heads(channels, num_heads, num_head_channels)
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(dims, channels, 3 * channels, 1)
        self.proj_out = zero_module(conv_nd(dims, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, L, C); no copy when x is channels_last
        tokens = qkv_attention(pointwise(self.qkv, tokens), self.num_heads)
        return x + pointwise(self.proj_out, tokens).transpose(1, 2).reshape(x.shape)


def pointwise(conv: nn.Module, tokens: Tensor) -> Tensor:
    """A 1x1 convolution as a matrix product on (B, L, C): q, k and v need no transposition afterwards."""
    # channels_last: the gradient must come back with the parameter's strides for DDP
    last = conv.weight.stride(-1) != 1
    return channel_mix(tokens, (conv.weight.movedim(1, -1) if last else conv.weight).flatten(1), conv.bias)


def channel_mix(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear of tokens (B, L, C); on the CPU by oneDNN, up to twice as fast as MKL on processors MKL ignores."""
    if not on_this_cpu(tokens):
        return F.linear(tokens, weight, bias)
    batch, length, channels = tokens.shape
    # With one thread, torch gives oneDNN only 1x1 convolutions of 16 images and more: any cut of the rows will do.
    images = 16 if batch * length % 16 == 0 else batch
    rows = tokens.reshape(images, 1, -1, channels).permute(0, 3, 1, 2)
    product = F.conv2d(rows, weight[..., None, None], bias)
    return product.permute(0, 2, 3, 1).reshape(batch, length, -1)


def count_heads(channels: int, num_heads: int, num_head_channels: int) -> int:
    """Number of heads: channels / num_head_channels, or `num_heads` if that is -1; ValueError if uneven."""
    if num_head_channels == -1:
        if num_heads < 1 or channels % num_heads:
            raise ValueError(
                f"attention over {channels} channels cannot be split into num_heads = {num_heads}"
            )
        return num_heads
    if num_head_channels < 1 or channels % num_head_channels:
        raise ValueError(
            f"attention over {channels} channels cannot be split into heads of num_head_channels = {num_head_channels}"
        )
    return channels // num_head_channels
