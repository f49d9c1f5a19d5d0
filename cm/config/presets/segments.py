"""Multistep consistency models (Heek et al. 2024) and consistency trajectory models (Kim et al. 2024).

Rates, batch, grid and length of the former are the paper's; its networks are UViTs that were not published, so its
numbers are not quoted here: ADM's network and an EDM teacher stand for them. Those of CTM are its published commands
without the adversarial part; 50,000 steps are the upper end of what its text asks for at least.
"""

from typing import Any

from cm.config.presets.base import DRAWS, Flags, Preset, Result
from cm.config.presets.cifar10 import NCSNPP
from cm.config.presets.released import IMAGENET64 as ADM
from cm.config.presets.small import DIGITS8, FASHION, FASHION_SAVES, FASHION_STEPS, SAMPLING, TRAINING

COSINE: Flags = {"diffusion_schedule": "cosine", "weight_schedule": "snr+1"}
# w(t) |x^ - x|, without a target network
LOSS: Flags = {"loss_norm": "pseudo-huber", "huber_c": 0.0, "start_ema": 0.0}


def _multistep(model: Flags, segments: int, train: Flags, draws: Flags) -> Preset:
    mode = train["training_mode"]
    sample = {"training_mode": mode, "sampler": "progdist", "steps": segments, **draws}
    return Preset(
        model={**model, **COSINE},
        scripts={"cm_train": {**LOSS, **train, "segments": segments}, "image_sample": sample},
    )


def _imagenet(segments: int) -> Preset:
    train = {
        "training_mode": "multistep_distillation",
        "optimizer": "adam",
        "lr": 1e-4,
        "global_batch_size": 2048,
        "ema_rate": "0.9999",
        "total_training_steps": 200000,
    }
    return _multistep(ADM, segments, train, DRAWS)


def _small(mode: str, segments: int, steps: int, model: Flags = DIGITS8, **train: Any) -> Preset:
    own = {
        "training_mode": mode,
        "teacher_steps": 16,
        "teacher_steps_end": 64,
        "teacher_steps_ramp": steps // 2,
        "lr": 1e-3,
        "ema_rate": "0.98",
        "total_training_steps": steps,
    }
    return _multistep(model, segments, {**TRAINING, **own, **train}, SAMPLING)


CTM: Flags = {
    "training_mode": "ctm",
    "optimizer": "radam",
    "lr": 4e-4,
    "start_ema": 0.999,
    "ema_rate": "0.999,0.9999",
    "precision": "fp16",
    "total_training_steps": 50000,
}
SMALL_CTM: Flags = {
    **TRAINING,
    "training_mode": "ctm",
    "loss_norm": "l2",
    "start_scales": 18,
    "max_teacher_steps": 4,
    "start_ema": 0.9,
    "lr": 1e-3,
    "ema_rate": "0.98",
}
CTM_PAPER = "Kim et al. 2024, Table 1, without the discriminator"


def _trajectories(model: Flags, train: Flags, draws: Flags, results: tuple[Result, ...] = ()) -> Preset:
    sample = {"training_mode": "ctm", "sampler": "gamma", "steps": 1, **draws}
    return Preset(
        model={**model, "weight_schedule": "uniform"},
        scripts={"cm_train": train, "image_sample": sample},
        results=results,
    )


PRESETS: dict[str, Preset] = {
    "cifar10_ctm": _trajectories(
        {**NCSNPP, "network": "ddpmpp", "dropout": 0.13},
        {**CTM, "loss_norm": "lpips", "start_scales": 18, "global_batch_size": 256, "random_flip": False},
        DRAWS,
        (Result(1, 5.19, CTM_PAPER), Result(18, 3.00, CTM_PAPER)),
    ),
    "imagenet64_ctm": _trajectories(
        ADM,
        {**CTM, "loss_norm": "lpips", "start_scales": 40, "global_batch_size": 1440},
        DRAWS,
    ),
    "digits_ctm": _trajectories(DIGITS8, {**SMALL_CTM, "total_training_steps": 500}, SAMPLING),
    **{
        f"fashion_{mode}": _trajectories(
            FASHION,
            {
                **SMALL_CTM,
                **FASHION_SAVES,
                "training_mode": mode,
                "total_training_steps": FASHION_STEPS,
                **own,
            },
            SAMPLING,
        )
        for mode, own in (("ctm", {}), ("ctm_training", {"init": "teacher"}))
    },
    **{f"imagenet64_mcd{segments}": _imagenet(segments) for segments in (1, 2, 4, 8, 16)},
    **{f"digits_mcd{segments}": _small("multistep_distillation", segments, 500) for segments in (1, 2, 4)},
    **{
        f"fashion_mcd{n}": _small("multistep_distillation", n, FASHION_STEPS, FASHION, **FASHION_SAVES)
        for n in (1, 2, 4, 8)
    },
    **{
        f"fashion_mct{n}": _small(
            "multistep_training", n, FASHION_STEPS, FASHION, **FASHION_SAVES, init="teacher"
        )
        for n in (1, 2, 4, 8)
    },
    "digits_mct2": _small("multistep_training", 2, 1500, init="random", ema_rate="0.99"),
}
