"""The systems around consistency models at 8 pixels: EDM's other columns, guidance, the (alpha, sigma) form."""

from typing import Any

from cm.config.presets.base import Flags, Preset
from cm.config.presets.small import DIGITS8, SAMPLING, TRAINING

EDM_TRAINING: Flags = {**TRAINING, "lr": 2e-3, "ema_rate": "0.99", "total_training_steps": 1500}
# A guided model need not be a good one: it is unconditional and trained for a minute.
UNCONDITIONAL: Flags = {**DIGITS8, "class_cond": False}


def _column(precond: str, **model: Any) -> Preset:
    """A teacher of another column of EDM's Table 1: its scalings, noise levels and weighting."""
    return Preset(
        model={**DIGITS8, "precond": precond, "weight_schedule": "snr", **model},
        scripts={
            "edm_train": {**EDM_TRAINING, "schedule_sampler": precond},
            "image_sample": {**SAMPLING, "training_mode": "edm", "sampler": "heun", "steps": 18},
        },
    )


PRESETS: dict[str, Preset] = {
    "digits_vp": _column("vp"),
    "digits_ve": _column("ve", sigma_min=0.02, sigma_max=100.0),
    "digits_iddpm": _column("iddpm", sigma_min=0.0065),
    "digits_uncond": Preset(
        model={**UNCONDITIONAL, "weight_schedule": "karras"},
        scripts={
            "edm_train": {
                **EDM_TRAINING,
                "schedule_sampler": "lognormal",
                "total_training_steps": 400,
            },
            "image_sample": {**SAMPLING, "training_mode": "edm", "sampler": "heun", "steps": 18},
        },
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
    "digits_cosine": Preset(
        model={**DIGITS8, "diffusion_schedule": "cosine", "weight_schedule": "truncated-snr"},
        scripts={
            "edm_train": EDM_TRAINING,
            "image_sample": {**SAMPLING, "training_mode": "edm", "sampler": "heun", "steps": 18},
        },
    ),
    "digits_cosine_pd": Preset(
        model={**DIGITS8, "diffusion_schedule": "cosine", "weight_schedule": "truncated-snr"},
        scripts={
            "cm_train": {
                **TRAINING,
                "training_mode": "progdist",
                "scale_mode": "progdist",
                "start_scales": 16,
                "distill_steps_per_iter": 100,
                "total_training_steps": 700,  # 16, 8, 4 once; 2, 1 twice as long
                "loss_norm": "l2",
                "optimizer": "adam",
                "lr": 1e-3,
                "ema_rate": "0.95",
            },
            "image_sample": {**SAMPLING, "training_mode": "progdist", "sampler": "progdist", "steps": 1},
        },
    ),
}
