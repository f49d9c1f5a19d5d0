"""The networks of EDM's checkpoints restated from their description, to check ours against: slow, float64, by name.

`song_unet` and `dhariwal_unet` read an ordered state dict and nothing else. No layer of `cm` is used.
"""

import math
from itertools import groupby

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]


def randomize(state: Tensors, seed: int = 0) -> Tensors:
    """Seeded values for every tensor but the filters: norms near one, matrices ~ 1 / sqrt(fan in), small biases."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, t in state.items():
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        if name.endswith("resample_filter"):
            values[name] = t
        elif name.endswith("freqs"):
            values[name] = noise
        elif t.ndim == 1:
            values[name] = 0.1 * noise + name.endswith("weight")  # vectors of weights belong to norms
        else:
            values[name] = noise / math.sqrt(t[0].numel())
    return values


def zero_insert(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W) with zeros after every pixel, to the right and below."""
    big = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    big[:, :, ::2, ::2] = x
    return big


def correlate(x: torch.Tensor, kernel: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """y[i, j] = sum k[a, b] x[i + a - before, j + b - before], zeros outside the image."""
    taps = kernel.shape[-1]
    x = F.pad(x, (before, after, before, after))
    height, width = x.shape[2] - taps + 1, x.shape[3] - taps + 1
    terms = [
        kernel[0, 0, a, b] * x[:, :, a : a + height, b : b + width] for a in range(taps) for b in range(taps)
    ]
    return sum(terms)


def up(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Insert zeros, filter, gain 4."""
    taps = kernel.shape[-1]
    return 4 * correlate(zero_insert(x), kernel, taps // 2, taps // 2 - 1)


def down(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Filter, keep every other pixel."""
    pad = kernel.shape[-1] // 2 - 1
    return correlate(x, kernel, pad, pad)[:, :, ::2, ::2]


def norm(x: torch.Tensor, w: Tensors, name: str, eps: float) -> torch.Tensor:
    """Group normalisation: four channels or more per group, 32 groups at most."""
    groups = min(32, x.shape[1] // 4)
    parts = x.reshape(len(x), groups, -1)
    parts = parts - parts.mean(2, keepdim=True)
    parts = parts / (parts.square().mean(2, keepdim=True) + eps).sqrt()
    return parts.reshape(x.shape) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def silu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(x)."""
    return x / (1 + (-x).exp())


def conv(x: torch.Tensor, w: Tensors, name: str) -> torch.Tensor:
    """Convolution of odd kernel with "same" padding."""
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)


def attend(x: torch.Tensor, w: Tensors, head_channels: int, eps: float) -> torch.Tensor:
    """Softmax attention whose qkv rows are numbered (head, channel, {q, k, v})."""
    batch, channels = x.shape[:2]
    rows = conv(norm(x, w, "norm2", eps), w, "qkv").reshape(batch, 3 * channels, -1)
    out = []
    for first in range(0, channels, head_channels):
        q, k, v = (rows[:, 3 * first + j : 3 * (first + head_channels) : 3] for j in range(3))
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(head_channels), dim=2)
        out.append(v @ weights.transpose(1, 2))
    return conv(torch.cat(out, dim=1).reshape(x.shape), w, "proj")


def block(x, emb, w: Tensors, kind: str, *, adaptive: bool, eps: float, scale: float, head_channels: int):
    """Residual block with the tensors `w`; kind is the layer's name after its resolution."""
    h = silu(norm(x, w, "norm0", eps))
    if kind in ("up", "down"):
        resample = up if kind == "up" else down
        h, x = (
            resample(h, w["conv0.resample_filter"]),
            resample(x, w.get("skip.resample_filter", w["conv0.resample_filter"])),
        )
    h = conv(h, w, "conv0")
    extra = (emb @ w["affine.weight"].T + w["affine.bias"])[:, :, None, None]
    if adaptive:
        gain, shift = extra.chunk(2, dim=1)
        h = silu(norm(h, w, "norm1", eps) * (1 + gain) + shift)
    else:
        h = silu(norm(h + extra, w, "norm1", eps))
    x = conv(x, w, "skip") if "skip.weight" in w else x
    x = (x + conv(h, w, "conv1")) * scale
    if "qkv.weight" in w:
        x = (x + attend(x, w, head_channels or x.shape[1], eps)) * scale
    return x


def layers(state: Tensors, part: str):
    """(name after the resolution, tensors) of every layer of `enc` or `dec`, in order."""
    names = [n for n in state if n.startswith(part + ".")]
    for layer, members in groupby(names, key=lambda n: n.split(".")[1]):
        kind = layer.split("_", 1)[1]
        yield kind, {n.split(".", 2)[2]: state[n] for n in members}


def trunk(state: Tensors, x: torch.Tensor, emb: torch.Tensor, **options) -> torch.Tensor:
    """Encoder and decoder; the result is what the last norm sees."""
    skips, pyramid = [], x
    for kind, w in layers(state, "enc"):
        if kind == "conv":
            x = conv(x, {f"c.{n}": t for n, t in w.items()}, "c")
            skips.append(x)
        elif kind == "aux_residual":
            wide = F.conv2d(pyramid, w["weight"], padding=2)
            wide = correlate(wide, w["resample_filter"], 0, 0)[:, :, ::2, ::2]
            x = pyramid = skips[-1] = (x + wide + w["bias"][:, None, None]) / math.sqrt(2)
        else:
            x = block(x, emb, w, kind, **options)
            skips.append(x)
    for kind, w in layers(state, "dec"):
        if kind.startswith("block"):
            x = torch.cat([x, skips.pop()], dim=1)
        if not kind.startswith("aux"):
            x = block(x, emb, w, kind, **options)
    assert not skips
    return x


def song_unet(state: Tensors, x: torch.Tensor, c_noise: torch.Tensor, y=None, augment=None) -> torch.Tensor:
    """NCSN++ (when there are Fourier frequencies) or DDPM++."""
    features = state["map_layer0.weight"].shape[1]
    if "map_noise.freqs" in state:
        phases = 2 * math.pi * c_noise[:, None] * state["map_noise.freqs"]
    else:
        half = features // 2
        phases = c_noise[:, None] / 10000 ** (torch.arange(half, dtype=x.dtype) / (half - 1))
    emb = torch.cat([phases.sin(), phases.cos()], dim=1)
    if y is not None:
        columns = state["map_label.weight"]
        emb = emb + math.sqrt(columns.shape[1]) * columns[:, y].T + state["map_label.bias"]
    if augment is not None:
        emb = emb + augment @ state["map_augment.weight"].T
    for i in (0, 1):
        emb = silu(emb @ state[f"map_layer{i}.weight"].T + state[f"map_layer{i}.bias"])
    x = trunk(state, x, emb, adaptive=False, eps=1e-6, scale=math.sqrt(0.5), head_channels=0)
    side = x.shape[-1]
    return conv(
        silu(norm(x, state, f"dec.{side}x{side}_aux_norm", 1e-6)), state, f"dec.{side}x{side}_aux_conv"
    )


def dhariwal_unet(
    state: Tensors,
    x: torch.Tensor,
    c_noise: torch.Tensor,
    y: torch.Tensor | None = None,
    head_channels: int = 64,
) -> torch.Tensor:
    """The ADM U-Net in EDM's layout."""
    half = state["map_layer0.weight"].shape[1] // 2
    phases = c_noise[:, None] / 10000 ** (torch.arange(half, dtype=x.dtype) / half)
    emb = torch.cat([phases.cos(), phases.sin()], dim=1)
    emb = silu(emb @ state["map_layer0.weight"].T + state["map_layer0.bias"])
    emb = emb @ state["map_layer1.weight"].T + state["map_layer1.bias"]
    if y is not None:
        emb = emb + state["map_label.weight"][:, y].T
    x = trunk(state, x, silu(emb), adaptive=True, eps=1e-5, scale=1.0, head_channels=head_channels)
    return conv(silu(norm(x, state, "out_norm", 1e-5)), state, "out_conv")
