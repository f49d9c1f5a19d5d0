"""The systems around consistency models at 8 pixels: EDM's other columns, guidance, the (alpha, sigma) form."""

from typing import Any

from cm.config.presets.base import Flags, Preset, teacher
from cm.config.presets.small import DIGITS8, SAMPLING, TRAINING, short_progressive

EDM_TRAINING: Flags = {**TRAINING, "lr": 2e-3, "ema_rate": "0.99", "total_training_steps": 1500}
# A guided model need not be a good one: it is unconditional and trained for a minute.
UNCONDITIONAL: Flags = {**DIGITS8, "class_cond": False}


def _column(precond: str, **model: Any) -> Preset:
    """A teacher of another column of EDM's Table 1: its scalings, noise levels and weighting."""
    model = {**DIGITS8, "precond": precond, "weight_schedule": "snr", **model}
    return teacher(model, {**EDM_TRAINING, "schedule_sampler": precond}, 18, SAMPLING)


COSINE: Flags = {**DIGITS8, "diffusion_schedule": "cosine"}

PRESETS: dict[str, Preset] = {
    "digits_vp": _column("vp"),
    "digits_ve": _column("ve", sigma_min=0.02, sigma_max=100.0),
    "digits_iddpm": _column("iddpm", sigma_min=0.0065),
    "digits_uncond": teacher(
        {**UNCONDITIONAL, "weight_schedule": "karras"},
        {**EDM_TRAINING, "schedule_sampler": "lognormal", "total_training_steps": 400},
        18,
        SAMPLING,
    ),
    "digits_classifier": Preset(
        model=DIGITS8,
        scripts={
            "classifier_train": {
                **TRAINING,
                "schedule_sampler": "ve",
                "lr": 1e-3,
                "weight_decay": 0.05,
                "optimizer": "adamw",
                "ema_rate": "0.99",
                "total_training_steps": 400,
            }
        },
    ),
    "digits_cosine": teacher({**COSINE, "weight_schedule": "truncated-snr"}, EDM_TRAINING, 18, SAMPLING),
    "digits_cosine_pd": short_progressive(COSINE, 100),
}
