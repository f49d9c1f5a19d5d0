"""`--preset auto`: flags for any images, from their side and number, the teacher, and where the run computes.

docs/recipes.md says why each value is what it is, and what was measured. Pure Python; imports no torch.
"""

from collections.abc import Mapping
from typing import Any

from cm.config.registry import resolve
from cm.config.rows import OBJECTIVES

Flags = dict[str, Any]

# Flags that say what a network looks like
ARCHITECTURE = (
    *("network", "patch_size", "num_channels", "num_res_blocks", "channel_mult", "attention_resolutions"),
    "num_heads",
    *("num_heads_upsample", "num_head_channels", "use_scale_shift_norm", "resblock_updown", "learn_sigma"),
)
# A given flag -> what auto leaves alone beside it, because it would not fit
TOGETHER = {
    "network": ARCHITECTURE,
    "channel_mult": ("attention_resolutions", "patch_size"),
    "attention_resolutions": ("patch_size",),
    "num_heads": ("num_head_channels",),
}
SMALLEST_SIDE, MOST_LEVELS = 4, 4
# From this side on, a CPU sees images as patches of 2 x 2 pixels
PATCHED_SIDE = 24


def sides(side: int) -> list[int]:
    """Image sides of a U-Net's levels: halved while that is possible, down to 4 pixels and to 4 levels."""
    found = [side]
    while found[-1] % 2 == 0 and found[-1] // 2 >= SMALLEST_SIDE and len(found) < MOST_LEVELS:
        found.append(found[-1] // 2)
    return found


def patches(side: int, gpu: bool) -> int:
    """--patch_size: a quarter of the time per step where there is no GPU to spend it."""
    return 2 if not gpu and side >= PATCHED_SIDE and side % 2 == 0 else 1


def architecture(side: int, gpu: bool, patch_size: int = 1) -> Flags:
    """An ADM U-Net for images of `side` pixels, in patches: minutes on two CPU cores, hours on a GPU."""
    levels = sides(side // patch_size)
    attended = [s for s in levels if s <= (16 if gpu else 8)] or [s for s in levels[-1:] if s <= 32]
    width = (64 if side <= 32 else 128) if gpu else 32
    return {
        "network": "adm",
        "patch_size": patch_size,
        "num_channels": width,
        "channel_mult": ",".join(["1", *["2"] * (len(levels) - 1)]),
        "num_res_blocks": 2 if gpu else 1,
        "attention_resolutions": ",".join(map(str, attended)),
        "num_head_channels": 64 if gpu else 32,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    }


def teacher_steps(side: int, gpu: bool) -> int:
    """Steps of an EDM teacher."""
    if gpu:
        return 20_000 if side <= 32 else 100_000
    return 1500 if side <= 16 else 2000


def averaging(steps: int) -> str:
    """--ema_rate whose average reaches over a fifteenth of the run."""
    return f"{min(max(1 - 15 / steps, 0.9), 0.9999):.4f}".rstrip("0")


def learning_rate(width: int) -> float:
    """Of an EDM teacher with Adam's updates: the wider, the slower."""
    return 2e-3 * 32 / max(width, 32)


def training(
    objective: str, *, side: int, channels: int, count: int, width: int, gpu: bool, ranks: int, steps: int = 0
) -> Flags:
    """Optimisation of an objective; width: of the network, which a teacher may have decided. steps: asked for."""
    chosen = {
        "optimizer": "radam",
        "lr_schedule": "late_decay",
        "ema_warmup": True,
        "random_flip": channels == 3,
        "global_batch_size": max(min(256 if gpu else 64, count) // ranks, 1) * ranks,
        "log_interval": 100 if gpu else 50,
        **resolve(OBJECTIVES[objective].recipe)(side, width, gpu),
    }
    steps = steps or chosen["total_training_steps"]
    return {
        **chosen,
        "total_training_steps": steps,
        "ema_rate": averaging(steps),
        "save_interval": max(steps // 5, 1),
    }


def edm(side: int, width: int, gpu: bool) -> Flags:
    """Of a denoiser."""
    return {
        "schedule_sampler": "lognormal",
        "weight_schedule": "karras",
        "lr": learning_rate(width),
        "total_training_steps": teacher_steps(side, gpu),
    }


def distillation(side: int, width: int, gpu: bool) -> Flags:
    """Of CD."""
    return {
        "loss_norm": "pseudo-huber",
        "weight_schedule": "inverse-gap",
        "start_ema": 0.9,
        "start_scales": 18,
        "lr": learning_rate(width) / 2,
        "total_training_steps": teacher_steps(side, gpu) // (2 if gpu else 5),
    }


def isolation(side: int, width: int, gpu: bool) -> Flags:
    """Of CT."""
    return {
        "init": "random",
        "loss_norm": "l2",
        "weight_schedule": "uniform",
        "target_ema_mode": "adaptive",
        "start_ema": 0.9,
        "scale_mode": "progressive",
        "start_scales": 2,
        "end_scales": 17,
        "lr": learning_rate(width) / 2,
        "total_training_steps": 2 * teacher_steps(side, gpu),
    }


def progressive(side: int, width: int, gpu: bool) -> Flags:
    """Of PD."""
    stage = teacher_steps(side, gpu) // 10
    return {
        "scale_mode": "progdist",
        "start_scales": 16,
        "distill_steps_per_iter": stage,
        "total_training_steps": 7 * stage,  # 16, 8, 4 once; 2, 1 twice as long
        "loss_norm": "l2",
        "weight_schedule": "truncated-snr",
        "optimizer": "adam",
        "lr": learning_rate(width),
    }


def classifier(side: int, width: int, gpu: bool) -> Flags:
    """Of a classifier of noisy images."""
    return {"lr": learning_rate(width), "total_training_steps": teacher_steps(side, gpu) // 2}


def slow(side: int, width: int, gpu: bool) -> Flags:
    """Continuous time and objectives of plug-ins: small steps from the start on."""
    return {
        "loss_norm": "l2",
        "weight_schedule": "uniform",
        "start_scales": 18,
        "lr": learning_rate(width) / 10,
        "total_training_steps": teacher_steps(side, gpu),
    }


def trajectories(side: int, width: int, gpu: bool) -> Flags:
    """CTM: small steps, and a target network that follows as slowly as the authors'."""
    return {**slow(side, width, gpu), "start_ema": 0.999}


def open_flags(explicit: frozenset[str], found: Mapping[str, Any]) -> Flags:
    """What auto may choose: flags that the command left open, and that fit those that it gave."""
    closed = explicit.union(*(TOGETHER[name] for name in TOGETHER if name in explicit))
    return {name: value for name, value in found.items() if name not in closed}
