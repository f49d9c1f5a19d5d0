"""Loss weightings lambda(sigma), as functions of the signal-to-noise ratio 1 / sigma^2 or of the pair (t, r)."""

from collections.abc import Callable

import torch
from torch import Tensor

from cm.config.rows import WEIGHTINGS


def snr_weight(snr: Tensor, sigma_data: float) -> Tensor:
    """The signal-to-noise ratio itself."""
    return snr


def snr_plus_one(snr: Tensor, sigma_data: float) -> Tensor:
    """SNR + 1."""
    return snr + 1


def karras(snr: Tensor, sigma_data: float) -> Tensor:
    """EDM's 1/c_out^2 = 1/sigma^2 + 1/sigma_data^2 (Karras et al. 2022, Table 1)."""
    return snr + 1 / sigma_data**2


def truncated_snr(snr: Tensor, sigma_data: float) -> Tensor:
    """max(SNR, 1) (Salimans & Ho 2022, section 4)."""
    return snr.clamp_min(1.0)


def uniform(snr: Tensor, sigma_data: float) -> Tensor:
    """1 everywhere."""
    return torch.ones_like(snr)


def inverse_gap(t: Tensor, r: Tensor, sigma_data: float) -> Tensor:
    """1 / (t - r) of a pair t > r (Song & Dhariwal 2023, section 3.5)."""
    return 1 / (t - r)


def jump(t: Tensor, r: Tensor, sigma_data: float) -> Tensor:
    """1 / (1 - r/t)^2: undoes the factor of the network's prediction in a jump from t to r (Kim et al. 2024)."""
    return (1 - r / t) ** -2.0


def get_snr(sigmas: Tensor) -> Tensor:
    """Signal-to-noise ratio 1 / sigma^2 of x = x0 + sigma * noise."""
    return sigmas**-2


def get_weightings(weight_schedule: str, snrs: Tensor, sigma_data: float) -> Tensor:
    """Loss weights (B,) by name, for the weightings that are functions of the SNR."""
    if WEIGHTINGS[weight_schedule].pairs:
        raise ValueError(f"{weight_schedule} weighs pairs (t, r), not single noise levels")
    return WEIGHTINGS.load(weight_schedule)(snrs, sigma_data)


def make_weight(weight_schedule: str, sigma_data: float) -> Callable[..., Tensor]:
    """lambda(t, r=None) -> (B,) by name, looked up once; a weighting of pairs refuses single levels t."""
    pairs, weigh = WEIGHTINGS[weight_schedule].pairs, WEIGHTINGS.load(weight_schedule)

    def weight(t: Tensor, r: Tensor | None = None) -> Tensor:
        if not pairs:
            return weigh(get_snr(t), sigma_data)
        if r is None:
            raise ValueError(f"{weight_schedule} needs pairs (t, r), and this objective has none")
        return weigh(t, r, sigma_data)

    return weight
