"""Loss weightings lambda(sigma), as functions of the signal-to-noise ratio 1 / sigma^2."""

from collections.abc import Callable

import torch
from torch import Tensor

from cm.errors import UserError

# name -> weight(snr, sigma_data)
WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "snr": lambda snr, sigma_data: snr,
    "snr+1": lambda snr, sigma_data: snr + 1,
    "karras": lambda snr, sigma_data: snr + 1 / sigma_data**2,
    "truncated-snr": lambda snr, sigma_data: snr.clamp_min(1.0),
    "uniform": lambda snr, sigma_data: torch.ones_like(snr),
}


def get_snr(sigmas: Tensor) -> Tensor:
    """Signal-to-noise ratio 1 / sigma^2 of x = x0 + sigma * noise."""
    return sigmas**-2


def get_weightings(weight_schedule: str, snrs: Tensor, sigma_data: float) -> Tensor:
    """Loss weights (B,) by name; `karras` is EDM's 1/c_out^2 = 1/sigma^2 + 1/sigma_data^2."""
    if weight_schedule not in WEIGHTINGS:
        raise UserError(f"--weight_schedule must be one of {', '.join(WEIGHTINGS)}, got {weight_schedule}")
    return WEIGHTINGS[weight_schedule](snrs, sigma_data)
