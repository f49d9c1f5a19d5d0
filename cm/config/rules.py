"""Which networks and schedules are possible: rules that flags and library share, naming the flag. Pure Python."""

from dataclasses import replace
from typing import Any

from cm.config.parsing import parse_attention, parse_channel_mult
from cm.config.registry import resolve
from cm.config.rows import NETWORKS
from cm.errors import UserError


def inside_patches(architecture: Any) -> Any:
    """The flags as the network within --patch_size has them: a smaller side; UserError where patches do not fit."""
    side, size = architecture.image_size, architecture.patch_size
    check_patches(side, size)
    return replace(architecture, image_size=side // size, patch_size=1) if size > 1 else architecture


def check_patches(side: int, size: int) -> None:
    """Raise UserError where patches of `size` pixels do not cover an image of `side` pixels."""
    if side % size:
        raise UserError(f"--image_size {side} is not a multiple of --patch_size {size}")


def check_architecture(architecture: Any) -> None:
    """Raise UserError where the flags of a network do not fit each other; `architecture` has them as attributes."""
    a = inside_patches(architecture)
    row = NETWORKS[a.network]
    if row.levels:
        mult = parse_channel_mult(a.channel_mult, a.image_size)
        divisor = 2 ** (len(mult) - 1)
        if a.image_size % divisor:
            patches = f" / --patch_size {architecture.patch_size}" if a is not architecture else ""
            raise UserError(
                f"--image_size {architecture.image_size}{patches} is not a multiple of {divisor}, which the "
                f"{len(mult)} levels of "
                f"--channel_mult {','.join(map(str, mult))} need"
            )
        parse_attention(a.attention_resolutions, a.image_size, len(mult))
    if a.augment_dim and not row.augment:
        raise UserError(f"--augment_dim {a.augment_dim}: --network {a.network} takes no augmentation labels")
    if getattr(a, "told_scale", False) and not row.two_times:
        known = ", ".join(name for name, other in NETWORKS.items() if other.two_times)
        raise UserError(f"--network {a.network} cannot be told a scale of guidance: choose {known}")
    if getattr(a, "two_times", False) and not row.two_times:
        known = ", ".join(name for name, other in NETWORKS.items() if other.two_times)
        raise UserError(f"--network {a.network} has one time; a flow map needs two: choose {known}")
    told = getattr(a, "told_guidance", False) or (getattr(a, "told_scale", False) and a.two_times)
    if told and not row.told_guidance:
        known = ", ".join(name for name, other in NETWORKS.items() if other.told_guidance)
        raise UserError(f"--network {a.network} cannot be told a guidance: choose {known}")
    if row.check:
        (resolve(row.check) if isinstance(row.check, str) else row.check)(a)


def check_adm(a: Any) -> None:
    """ADM's U-Net: heads and groups divide the widths of its levels."""
    mult = parse_channel_mult(a.channel_mult, a.image_size)
    widths = [int(m * a.num_channels) for m in mult]
    for width in widths:
        if width < 32 or width % 32:
            raise UserError(
                f"--num_channels {a.num_channels} times --channel_mult {','.join(map(str, mult))} gives a level of "
                f"{width} channels; group normalisation needs multiples of 32"
            )
    check_heads(a)


def check_heads(a: Any) -> None:
    """Attention heads divide the widths of the levels that have attention."""
    mult = parse_channel_mult(a.channel_mult, a.image_size)
    factors = parse_attention(a.attention_resolutions, a.image_size, len(mult))
    widths = [int(m * a.num_channels) for m in mult]
    attended = {widths[-1], *(width for level, width in enumerate(widths) if 2**level in factors)}
    splits = {"num_head_channels": a.num_head_channels}
    if a.num_head_channels == -1:
        splits = {"num_heads": a.num_heads, "num_heads_upsample": a.num_heads_upsample}
    for name, parts in splits.items():
        for width in sorted(attended):
            if parts != -1 and width % parts:
                raise UserError(f"--{name} {parts} does not divide a level of {width} channels")


def check_scales(schedule: Any) -> None:
    """Raise UserError where mu(k) or N(k) is not defined; `schedule` has its flags as attributes."""
    target_ema_mode, start_ema = schedule.target_ema_mode, schedule.start_ema
    scale_mode, start_scales, end_scales = schedule.scale_mode, schedule.start_scales, schedule.end_scales
    if target_ema_mode == "adaptive" and scale_mode != "progressive":
        raise UserError(f"--target_ema_mode adaptive needs --scale_mode progressive, got {scale_mode}")
    if target_ema_mode == "adaptive" and not 0 < start_ema < 1:
        raise UserError(f"--start_ema must lie in (0, 1) with --target_ema_mode adaptive, got {start_ema}")
    if not 0 <= start_ema <= 1:
        raise UserError(f"--start_ema must lie in [0, 1], got {start_ema}")
    if scale_mode == "progdist" and (start_scales < 1 or start_scales & (start_scales - 1)):
        raise UserError(
            f"--start_scales must be a power of two with --scale_mode progdist, got {start_scales}"
        )
    if scale_mode != "progdist" and start_scales < 2:
        raise UserError(f"--start_scales must be at least 2, got {start_scales}")
    if scale_mode in ("progressive", "doubling") and end_scales < start_scales:
        raise UserError(f"--end_scales {end_scales} must not be below --start_scales {start_scales}")
