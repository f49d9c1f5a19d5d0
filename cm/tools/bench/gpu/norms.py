"""Group norms with the embedding's scale and shift, and SiLU, of half-precision images: which form a GPU wants.

A U-Net's norms are a small part of its products and a large one of its time: every form is a candidate for
`cm.nn.modulated_norm`, measured by itself, forward and backward, in both memory formats.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cm.nn import GroupNorm32, append_dims, modulated_norm, normalization
from cm.tools.profiling.report import Row
from cm.tools.profiling.timing import interleaved

Form = Callable[[GroupNorm32, Tensor, Tensor, Tensor], Tensor]
LEVELS = ((192, 64), (384, 32), (576, 16), (768, 8))  # channels and side in the U-Net of ImageNet-64
TINY_LEVELS = ((32, 8), (64, 4))


def as_it_is(norm: GroupNorm32, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What the networks do: everything in fp32."""
    return F.silu(modulated_norm(norm, x, scale, shift).to(x.dtype))


def in_half(norm: GroupNorm32, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """torch's kernel on the image as it is: its moments are fp32 in any case, its weights are rounded."""
    y = F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    scale, shift = (append_dims(s, x.ndim).to(x.dtype) for s in (1 + scale, shift))
    return F.silu(torch.addcmul(shift, y, scale))


def one_product(norm: GroupNorm32, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Moments in fp32, then x slope + offset by one multiplication."""
    grouped = (x.shape[0], norm.num_groups, -1, 1, 1)
    variance, mean = torch.var_mean(x.float().unflatten(1, (norm.num_groups, -1)), (2, 3, 4), correction=0)
    rate = (variance + norm.eps).rsqrt()
    slope = (norm.weight * (1 + scale)).view(grouped) * rate.view(*rate.shape, 1, 1, 1)
    offset = (norm.bias * (1 + scale) + shift).view(grouped) - mean.view(*mean.shape, 1, 1, 1) * slope
    slope, offset = (part.view(*scale.shape, 1, 1) for part in (slope, offset))
    return F.silu(torch.addcmul(offset, x.float(), slope)).to(x.dtype)


FORMS: dict[str, Form] = {"as it is": as_it_is, "in half": in_half, "one product": one_product}
FORMATS = {"channels-last": torch.channels_last, "default": torch.contiguous_format}


def bench_norms(device: torch.device, *, batch: int = 64, tiny: bool = False) -> Iterator[Row]:
    """Rows: milliseconds of all levels, forward and backward; the largest error beside fp64. Compiled forms last."""
    levels, repeats = (TINY_LEVELS, 1) if tiny else (LEVELS, 10)
    forms = dict(FORMS)
    if device.type == "cuda":
        forms |= {f"{name}, compiled": torch.compile(FORMS[name]) for name in ("as it is", "one product")}
    for name, form in forms.items():
        runs = {}
        for kind, layout in FORMATS.items():
            runs[kind] = partial(
                _all_levels, form, [_operands(c, s, batch, device, layout) for c, s in levels]
            )
        timings = interleaved(runs, device, warmup=1 if tiny else 3, repeats=repeats)
        for kind, timing in timings.items():
            figures = {**timing.summary(), "largest_gap": error(form, device, FORMATS[kind])}
            yield Row(f"norms/{name}/{kind}", {"batch": batch, "levels": levels}, figures)


def _operands(
    channels: int, side: int, batch: int, device: torch.device, layout: torch.memory_format
) -> tuple[GroupNorm32, Tensor, Tensor, Tensor]:
    """A norm, an image batch in bf16, and the scale and shift of its rows; all of them want gradients."""
    random = torch.Generator().manual_seed(channels)
    norm = normalization(channels)
    for p in norm.parameters():
        p.data = 0.5 + torch.rand(channels, generator=random) / 2
    norm = norm.to(device)
    x = torch.randn(batch, channels, side, side, generator=random).add_(0.5)
    x = x.to(device, torch.bfloat16).contiguous(memory_format=layout)
    scale, shift = (torch.randn(batch, channels, generator=random).mul_(0.2).to(device) for _ in range(2))
    return norm, *(part.requires_grad_() for part in (x, scale, shift))


def _all_levels(form: Form, operands: list[tuple[GroupNorm32, Tensor, Tensor, Tensor]]) -> None:
    for norm, x, scale, shift in operands:
        y = form(norm, x, scale, shift)
        torch.autograd.grad(y, (x, scale, shift, norm.weight, norm.bias), torch.ones_like(y))


@torch.no_grad()
def error(form: Form, device: torch.device, layout: torch.memory_format) -> float:
    """The largest difference from the same in fp64, of 2 images of 64 channels and 16 pixels."""
    norm, *rest = _operands(64, 16, 2, device, layout)
    exact = modulated_norm(norm.double(), *(part.double() for part in rest))
    found = form(norm.float(), *rest)
    return (found.double() - F.silu(exact)).abs().max().item()
