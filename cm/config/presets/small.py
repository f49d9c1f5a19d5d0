"""Experiments for a laptop: handwritten digits at 8 and 16 pixels, Fashion-MNIST at 28, and a network for tests."""

from dataclasses import replace
from typing import Any

from cm.config.presets.base import Flags, Preset, consistency, progressive, teacher

DIGITS8: Flags = {
    "image_size": 8,
    "in_channels": 1,
    "num_classes": 10,
    "num_channels": 32,
    "channel_mult": "1,1",
    "num_res_blocks": 1,
    "num_head_channels": 16,
    "attention_resolutions": "4",
    "class_cond": True,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
# In patches of 2 x 2 pixels a step costs what it costs at 8 pixels.
DIGITS16: Flags = {**DIGITS8, "image_size": 16, "patch_size": 2}
# The teacher's network and clock serve every method, those in continuous time as well.
FASHION: Flags = {
    "network": "ddpmpp",
    "image_size": 28,
    "patch_size": 2,
    "in_channels": 1,
    "num_classes": 10,
    "num_channels": 16,
    "channel_mult": "1,2",
    "num_res_blocks": 1,
    "attention_resolutions": "7",
    "class_cond": True,
}
DIGITS_RGB: Flags = {**DIGITS8, "in_channels": 3}

# Digits have a handedness, and fit in memory.
TRAINING: Flags = {
    "random_flip": False,
    "num_workers": 0,
    "global_batch_size": 64,
    "lr_schedule": "late_decay",
    "ema_warmup": True,
    "log_interval": 50,
    "save_interval": 500,
}
SAMPLING: Flags = {"num_samples": 1000, "batch_size": 250}
EDITING: Flags = {"batch_size": 250}


def _teacher(model: Flags, steps: int) -> Preset:
    """EDM: a denoiser."""
    train = {"schedule_sampler": "lognormal", "lr": 2e-3, "ema_rate": "0.99", "total_training_steps": steps}
    return teacher({**model, "weight_schedule": "karras"}, {**TRAINING, **train}, 18, SAMPLING)


def _consistency(model: Flags, mode: str, steps: int, train: Flags) -> Preset:
    """A consistency model, by any way to train one."""
    common = {**TRAINING, "training_mode": mode, "loss_norm": "l2", "total_training_steps": steps}
    grid = {"steps": 18, "ts": "0,11,17"}
    return consistency(
        {**model, "weight_schedule": "uniform"},
        {**common, **train},
        grid,
        SAMPLING,
        edits=EDITING,
        search={"begin": "1", "end": "16", **SAMPLING},
    )


def short_progressive(model: Flags, stage: int) -> Preset:
    """Progressive distillation from 16 steps to one; stage: steps per halving."""
    train = {
        "start_scales": 16,
        "distill_steps_per_iter": stage,
        "total_training_steps": 7 * stage,  # 16, 8, 4 once; 2, 1 twice as long
        "loss_norm": "l2",
        "lr": 1e-3,
        "ema_rate": "0.95",
    }
    return progressive(model, {**TRAINING, **train}, SAMPLING)


CD: Flags = {"start_ema": 0.9, "start_scales": 18, "lr": 1e-3, "ema_rate": "0.98"}
CT: Flags = {
    "init": "random",
    "target_ema_mode": "adaptive",
    "start_ema": 0.9,
    "scale_mode": "progressive",
    "start_scales": 2,
    "end_scales": 17,
    "lr": 1e-3,
    "ema_rate": "0.99",
}
# Continuous time: networks whose clock runs 250 times slower, which start from such a teacher. With the usual clock
# df/dt is so large that only tiny steps are stable, and from random weights this network does not learn so.
SLOW_CLOCK: Flags = {"time_scale": 4.0}
CONTINUOUS: Flags = {"init": "teacher", "start_scales": 18, "ema_rate": "0.99"}


def _digits(model: Flags, edm_steps: int, cd_steps: int, ct_steps: int) -> dict[str, Preset]:
    """Teacher and the three ways to few steps, all with a budget of minutes on two cores."""
    return {
        "edm": _teacher(model, edm_steps),
        "cd": _consistency(model, "consistency_distillation", cd_steps, CD),
        "ct": _consistency(model, "consistency_training", ct_steps, CT),
        "pd": short_progressive(model, cd_steps // 5),
    }


def _digits_continuous(model: Flags, edm_steps: int, cd_steps: int, ct_steps: int) -> dict[str, Preset]:
    """Both consistency models in continuous time, and their teacher."""
    model = {**model, **SLOW_CLOCK}
    cd = {**CONTINUOUS, "stop_grad": False, "clock": "grid", "lr": 1e-3}
    ct = {**CONTINUOUS, "lr": 1e-4}
    return {
        "cont_edm": _teacher(model, edm_steps),
        "cont_cd": _consistency(model, "continuous_distillation", cd_steps, cd),
        "cont_ct": _consistency(model, "continuous_training", ct_steps, ct),
    }


# Every student of the study sees this many batches; docs/study.md says what that reached.
FASHION_STEPS = 800
FASHION_TEACHER_STEPS = 4000
FASHION_SAVES: Flags = {"save_interval": 200}


def _but(preset: Preset, script: str, **flags: Any) -> Preset:
    """The preset with other flags for one of its scripts."""
    return replace(preset, scripts={**preset.scripts, script: {**preset.scripts[script], **flags}})


def _fashion(model: Flags, steps: int) -> dict[str, Preset]:
    """One teacher; students at equal images seen. So short a run of CT begins with the teacher's weights."""
    cont_cd = {**CONTINUOUS, "stop_grad": False, "clock": "grid", "lr": 5e-4}
    ways = {
        "cd": ("consistency_distillation", CD),
        "ct": ("consistency_training", {**CT, "init": "teacher"}),
        "cont_cd": ("continuous_distillation", cont_cd),
        "cont_ct": ("continuous_training", {**CONTINUOUS, "lr": 1e-4}),
    }
    # CD as iCT trains: its loss, and no average as the target; the best of those tried (docs/study.md)
    improved = {**CD, "loss_norm": "pseudo-huber", "start_ema": 0.0, "lr": 2e-3}
    cd_huber = _consistency(model, "consistency_distillation", steps, {**FASHION_SAVES, **improved})
    return {
        "cd_huber": replace(cd_huber, model={**cd_huber.model, "weight_schedule": "inverse-gap"}),
        "edm": _but(_teacher(model, FASHION_TEACHER_STEPS), "edm_train", ema_rate="0.995", save_interval=400),
        **{
            n: _consistency(model, mode, steps, {**FASHION_SAVES, **train})
            for n, (mode, train) in ways.items()
        },
        # A checkpoint at the end of each stage: models of 4 and 2 steps
        "pd": _but(short_progressive(model, steps // 7), "cm_train", save_interval=steps // 7),
    }


# A run of a few seconds: what is trained is of no use.
FEW_STEPS: Flags = {
    "global_batch_size": 8,
    "num_workers": 0,
    "log_interval": 1,
    "save_interval": 4,
    "total_training_steps": 4,
}
TINY = Preset(
    model={
        "image_size": 16,
        "num_channels": 32,
        "channel_mult": "1,2",
        "num_res_blocks": 1,
        "num_head_channels": 16,
        "attention_resolutions": "8",
        "resblock_updown": True,
    },
    scripts={
        "edm_train": {"schedule_sampler": "lognormal", **FEW_STEPS},
        "cm_train": {
            "training_mode": "consistency_distillation",
            "start_ema": 0.9,
            "start_scales": 4,
            "loss_norm": "l2",
            "weight_schedule": "uniform",
            **FEW_STEPS,
        },
        "image_sample": {"num_samples": 8, "batch_size": 4, "steps": 4},
        "image_edit": {"training_mode": "consistency_distillation", "steps": 4, "batch_size": 4},
        "ternary_search": {"begin": "0", "end": "3", "steps": 4, "num_samples": 8, "batch_size": 4},
    },
)

PRESETS: dict[str, Preset] = {
    **{f"digits_{method}": preset for method, preset in _digits(DIGITS8, 1500, 500, 1500).items()},
    **{f"digits16_{method}": preset for method, preset in _digits(DIGITS16, 2000, 700, 1500).items()},
    **{f"digits_{method}": preset for method, preset in _digits_continuous(DIGITS8, 1500, 500, 1500).items()},
    **{f"digits_rgb_{method}": preset for method, preset in _digits(DIGITS_RGB, 1500, 500, 1500).items()},
    **{f"fashion_{method}": preset for method, preset in _fashion(FASHION, FASHION_STEPS).items()},
    "tiny": TINY,
}
