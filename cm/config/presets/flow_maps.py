"""Flow maps: MeanFlow on CIFAR-10, every cell of the general objective on digits, some of them on Fashion-MNIST.

MeanFlow's numbers are those of its authors' PyTorch code; that code also augments as EDM does (p 0.12, without
rotations), which cm_train does not.
"""

from typing import Any

from cm.config.presets.base import DRAWS, Flags, Preset, Result
from cm.config.presets.cifar10 import NCSNPP
from cm.config.presets.small import (
    DIGITS8,
    FASHION,
    FASHION_SAVES,
    FASHION_STEPS,
    FASHION_TEACHER_STEPS,
    SAMPLING,
    SLOW_CLOCK,
    TRAINING,
)

# Noise alone has an infinite level in x0 + sigma n; this one is as good in float32.
FLOW: Flags = {"network": "ddpmpp_meanflow", "precond": "flow", "sigma_max": 1e6}


def _flow_map(model: Flags, train: Flags, draws: Flags, results: tuple[Result, ...] = ()) -> Preset:
    sample = {"training_mode": train["training_mode"], "sampler": "jumps", "steps": 1, **draws}
    return Preset(model=model, scripts={"cm_train": train, "image_sample": sample}, results=results)


def _cifar(law: Flags, results: tuple[Result, ...] = ()) -> Preset:
    """16,000 epochs of 48 steps, 200 of them warm-up."""
    model = {**NCSNPP, **FLOW, "dropout": 0.2}
    train = {
        "training_mode": "meanflow",
        "init": "random",
        "seed": 42,
        "optimizer": "adam",
        "lr": 6e-4,
        "lr_warmup_steps": 9600,
        "random_flip": True,
        "global_batch_size": 1024,
        "ema_rate": "0.9999,0.99995,0.9996",
        "total_training_steps": 768000,
    }
    return _flow_map(model, {**train, **law}, DRAWS, results)


V1: Flags = {"time_law": "capped", "t_mean": -0.6, "t_std": 1.6, "r_mean": -4.0, "r_std": 1.6}


# --- digits: minutes on two cores ---

SMALL: Flags = {
    **TRAINING,
    "t_mean": -0.4,
    "t_std": 1.2,
    "r_mean": -0.4,
    "r_std": 1.2,
    "optimizer": "adam",
    "ema_rate": "0.99",
}


def _digits(mode: str, model: Flags = FLOW, **cell: Any) -> Preset:
    train = {"training_mode": mode, "init": "random", "lr": 2e-3, "total_training_steps": 1500}
    return _flow_map({**DIGITS8, **model}, {**SMALL, **train, **cell}, SAMPLING)


IMPROVED: Flags = {"label_dropout": 0.1, "norm_p": 1.0}
STUDENT: Flags = {"init": "teacher", "lr": 5e-4, "total_training_steps": 800}
# A map is consistent with itself when it is constant, too: an error that its own size divides makes the rows that
# compare it with itself outweigh those of the data, and all of these end there. So plain squares, and few such rows.
SELF: Flags = {"flow_velocity": "self", "norm_p": 0.0, "gap_share": 0.25, "lr": 1e-3}
HALVES: Flags = {"identity": "progressive", **SELF}
SHORTCUT: Flags = {**HALVES, "gap_share": 0.125, "time_law": "dyadic"}
SPLIT: Flags = {"identity": "progressive", "flow_velocity": "data", "split_start": 0.9}
ALPHA: Flags = {**SPLIT, "split_end": 0.05}
SOFLOW: Flags = {**SPLIT, "split_end": 1 / 64, "gap_power": 2.0}


# --- Fashion-MNIST: from the teacher's weights, to which the second clock of the network adds nothing at first ---


def _fashion(mode: str, model: Flags = FASHION, **cell: Any) -> Preset:
    train = {"training_mode": mode, "init": "teacher", "lr": 5e-4, "total_training_steps": FASHION_STEPS}
    return _flow_map(model, {**SMALL, **FASHION_SAVES, **train, **cell}, SAMPLING)


# Without a teacher: as many images as the teacher and a student see together
def _fashion_random(mode: str, **cell: Any) -> Preset:
    own = {"init": "random", "lr": 2e-3, "total_training_steps": FASHION_TEACHER_STEPS + FASHION_STEPS}
    return _fashion(mode, {**FASHION, **FLOW}, **own, **cell)


PRESETS: dict[str, Preset] = {
    "cifar10_meanflow": _cifar({}, (Result(1, 2.92, "Geng et al. 2025, MeanFlow"),)),
    "cifar10_meanflow_v1": _cifar(V1),
    "digits_meanflow": _digits("meanflow"),
    "digits_meanflow_guided": _digits("meanflow", label_dropout=0.1, kappa=0.5),
    "digits_improved_meanflow": _digits("improved_meanflow", **IMPROVED),
    # Frans et al. 2025: 7 of 8 rows learn the velocity
    "digits_shortcut": _digits("flow_map", **SHORTCUT),
    # Boffi et al. 2025
    "digits_esd": _digits("flow_map", **SELF),
    "digits_lsd": _digits("flow_map", identity="lagrangian", **SELF),
    "digits_psd": _digits("flow_map", **HALVES, split_uniform=True),
    # From flow matching of trajectories to nearly MeanFlow
    "digits_alphaflow": _digits("flow_map", **ALPHA, split_steps=1000),
    "digits_soflow": _digits("flow_map", **SOFLOW, split_steps=1000),
    # From the weights of a teacher, digits_cont_edm
    "digits_lmd": _digits("flow_map_distillation", SLOW_CLOCK, **STUDENT, identity="lagrangian"),
    "digits_emd": _digits("flow_map_distillation", SLOW_CLOCK, **STUDENT),
    "fashion_meanflow": _fashion("meanflow"),
    "fashion_meanflow_random": _fashion_random("meanflow"),
    "fashion_improved_meanflow": _fashion_random("improved_meanflow", **IMPROVED),
    "fashion_lmd": _fashion("flow_map_distillation", identity="lagrangian"),
    "fashion_emd": _fashion("flow_map_distillation"),
    "fashion_esd": _fashion("flow_map", **SELF),
    "fashion_lsd": _fashion("flow_map", identity="lagrangian", **SELF),
    "fashion_psd": _fashion("flow_map", **HALVES, split_uniform=True),
    "fashion_alphaflow": _fashion("flow_map", **ALPHA, split_steps=2 * FASHION_STEPS // 3),
    "fashion_soflow": _fashion("flow_map", **SOFLOW, split_steps=2 * FASHION_STEPS // 3),
    "fashion_shortcut": _fashion("flow_map", **SHORTCUT),
}
