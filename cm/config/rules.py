"""Which networks and schedules are possible: rules that flags and library share, naming the flag. Pure Python."""

from cm.config.parsing import parse_attention, parse_channel_mult
from cm.errors import UserError


def check_architecture(
    *,
    network: str = "adm",
    image_size: int,
    num_channels: int,
    channel_mult: str,
    attention_resolutions: str,
    num_heads: int,
    num_heads_upsample: int = -1,
    num_head_channels: int = -1,
    augment_dim: int = 0,
) -> None:
    """Raise UserError where the levels do not divide the image, or heads and groups the widths of a network."""
    mult = parse_channel_mult(channel_mult, image_size)
    divisor = 2 ** (len(mult) - 1)
    if image_size % divisor:
        raise UserError(
            f"--image_size {image_size} is not a multiple of {divisor}, which the {len(mult)} levels of "
            f"--channel_mult {','.join(map(str, mult))} need"
        )
    factors = parse_attention(attention_resolutions, image_size, len(mult))
    if network != "adm":
        return
    if augment_dim:
        raise UserError(f"--augment_dim {augment_dim}: --network adm takes no augmentation labels")
    widths = [int(m * num_channels) for m in mult]
    for width in widths:
        if width < 32 or width % 32:
            raise UserError(
                f"--num_channels {num_channels} times --channel_mult {','.join(map(str, mult))} gives a level of "
                f"{width} channels; group normalisation needs multiples of 32"
            )
    attended = {widths[-1], *(width for level, width in enumerate(widths) if 2**level in factors)}
    splits = {"num_head_channels": num_head_channels}
    if num_head_channels == -1:
        splits = {"num_heads": num_heads, "num_heads_upsample": num_heads_upsample}
    for name, parts in splits.items():
        for width in sorted(attended):
            if parts != -1 and width % parts:
                raise UserError(f"--{name} {parts} does not divide a level of {width} channels")


# The distances that have a second derivative, and with it a pseudo-loss; the others have a loss only.
CURVED_NORMS = ("l2", "l2-32", "lpips", "lpips-max")
FLAT_NORMS = ("l1", "linf")


def check_continuous(*, loss_norm: str, distillation: bool, stop_grad: bool) -> None:
    """Raise UserError where a continuous-time objective is not defined or not right (Song et al. 2023, App. B)."""
    if not distillation and not stop_grad:
        raise UserError(
            "--stop_grad False is for continuous_distillation: without a teacher that loss is quadratic in the noise "
            "and has another minimum"
        )
    if loss_norm not in (known := CURVED_NORMS if stop_grad else CURVED_NORMS + FLAT_NORMS):
        raise UserError(
            f"--loss_norm {loss_norm} has no continuous-time loss with --stop_grad {stop_grad}; "
            f"choose one of {', '.join(known)}"
        )


def check_scales(
    *, target_ema_mode: str, start_ema: float, scale_mode: str, start_scales: int, end_scales: int
) -> None:
    """Raise UserError where mu(k) or N(k) is not defined."""
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
    if scale_mode == "progressive" and end_scales < start_scales:
        raise UserError(f"--end_scales {end_scales} must not be below --start_scales {start_scales}")
