"""The methods that followed the paper: iCT, ECT, TCM, sCT and sCD, on CIFAR-10 and ImageNet 64x64, on digits and on
Fashion-MNIST.

Hyper-parameters are the papers' or, where those say nothing, their authors' code. `sigmas` are the papers' levels of
two-step sampling: `--sampler multistep` takes them.
"""

from typing import Any

from cm.config.presets.base import DRAWS, Flags, Preset, Result, consistency, teacher
from cm.config.presets.cifar10 import EDM_RATE, NCSNPP
from cm.config.presets.released import IMAGENET64 as ADM
from cm.config.presets.small import (
    DIGITS8,
    EDITING,
    FASHION,
    FASHION_SAVES,
    FASHION_STEPS,
    SAMPLING,
    SLOW_CLOCK,
    TRAINING,
)

DDPMPP: Flags = {**NCSNPP, "network": "ddpmpp"}


def two_steps(
    model: Flags,
    train: Flags,
    middle: float,
    results: tuple[Result, ...] = (),
    *,
    draws: Flags = DRAWS,
    edits: Flags | None = None,
) -> Preset:
    """A consistency model. middle: the second noise level of two-step sampling."""
    steps = train.get("end_scales", train.get("start_scales", 39)) + 1
    grid = {"steps": steps, "sigmas": f"80,{middle:g}"}
    return consistency(model, train, grid, draws, results, edits=edits)


def published(source: str, one: float, two: float | None = None, **of_one: float) -> tuple[Result, ...]:
    """FID of one and two steps."""
    return (Result(1, one, source, **of_one), *(() if two is None else (Result(2, two, source),)))


# --- the methods ---

LOW_DROPOUT: Flags = {"dropout_resolutions": "16,8"}
ICT: Flags = {
    "training_mode": "consistency_training",
    "init": "random",
    "pairs": "lognormal-grid",
    "p_mean": -1.1,
    "p_std": 2.0,
    "loss_norm": "pseudo-huber",
    "target_ema_mode": "fixed",
    "start_ema": 0.0,
    "scale_mode": "doubling",
    "start_scales": 10,
    "end_scales": 1280,
}
ECT: Flags = {
    "training_mode": "consistency_training",
    "init": "teacher",
    "pairs": "ratio",
    "p_mean": -1.1,
    "p_std": 2.0,
    "ratio_q": 2.0,
    "ratio_steps": 25000,
    "loss_norm": "pseudo-huber",
    "huber_c": 0.0,
}
TCM: Flags = {"training_mode": "tcm", "loss_norm": "pseudo-huber", "huber_c": 1e-8}
TRIGFLOW: Flags = {"p_mean": -1.0, "p_std": 1.4, "truncate": False, "tangent_warmup": 10000, "tangent_c": 0.1}


# --- CIFAR-10 ---

ICT_PAPER = "Song & Dhariwal 2023, Table 2"
ECT_CODE = "locuslab/ect"
TCM_PAPER = "Lee et al. 2025, Table 1"
SCM_PAPER = "Lu & Song 2025, Table 1"


def _cifar(train: Flags, **more: Any) -> Flags:
    return {"seed": 42, "optimizer": "radam", "lr": 1e-4, "random_flip": False, **train, **more}


def _cifar_ict(depth: int, results: tuple[Result, ...]) -> Preset:
    """Their runs mirror images: the text does not say otherwise."""
    model = {**NCSNPP, "num_res_blocks": depth, "fourier_scale": 0.02, "dropout": 0.3}
    model |= {"weight_schedule": "inverse-gap"}
    train = _cifar(
        ICT, random_flip=True, global_batch_size=1024, ema_rate="0.99993", total_training_steps=400000
    )
    return two_steps(model, train, 0.821, results)


def _cifar_ect(steps: int, results: tuple[Result, ...], ema: str = "0.9999", **train: Any) -> Preset:
    """From the weights of EDM's unconditional DDPM++."""
    model = {**DDPMPP, "dropout": 0.2, "weight_schedule": "inverse-gap", "boundary": "zero"}
    train = _cifar(ECT, global_batch_size=128, ema_rate=ema, total_training_steps=steps, **train)
    return two_steps(model, train, 0.821, results)


def _cifar_tcm() -> dict[str, Preset]:
    """Stage 1 is ECT with another batch; its r is 0 where the authors have 1e-6."""
    model = {**DDPMPP, "dropout": 0.2, "weight_schedule": "inverse-gap", "boundary": "zero"}
    first = _cifar(
        ECT, truncate=True, ratio_max=0.999, huber_c=1e-8, global_batch_size=512, total_training_steps=400000
    )
    second = _cifar(TCM, lr=5e-5, teacher_dropout=0.2, global_batch_size=1024, total_training_steps=200000)
    return {
        "cifar10_tcm1": two_steps(model, first, 0.821),
        "cifar10_tcm2": two_steps(model, second, 1.0, published(TCM_PAPER, 2.46, 2.05)),
    }


def _cifar_scm(mode: str, dropout: float, results: tuple[Result, ...]) -> Preset:
    """From a TrigFlow teacher's average: cifar10_trigflow. Half-life of half a million images."""
    model = {**DDPMPP, "network": "ddpmpp_scm", "precond": "trigflow", "boundary": "zero", "dropout": dropout}
    train = _cifar(
        TRIGFLOW,
        training_mode=mode,
        init="teacher",
        beta2=0.99,
        global_batch_size=512,
        ema_rate=EDM_RATE,
        total_training_steps=400000,
    )
    return two_steps(model, train, 0.98238, results)


CIFAR10: dict[str, Preset] = {
    "cifar10_ict": _cifar_ict(4, published(ICT_PAPER, 2.83, 2.46, inception_score=9.54)),
    "cifar10_ict_deep": _cifar_ict(8, published(ICT_PAPER, 2.51, 2.24, inception_score=9.76)),
    "cifar10_ect": _cifar_ect(200000, published(ECT_CODE, 3.86, 2.15)),
    "cifar10_ect_100k": _cifar_ect(100000, published(ECT_CODE, 4.54, 2.20)),
    "cifar10_ect_400k": _cifar_ect(400000, published(ECT_CODE, 3.60, 2.11)),
    "cifar10_ect_1hour": _cifar_ect(
        8000, (Result(2, 2.73, ECT_CODE),), "0.9993", ratio_q=256.0, ratio_steps=0
    ),
    **_cifar_tcm(),
    "cifar10_trigflow": teacher(
        {**DDPMPP, "network": "ddpmpp_scm", "precond": "trigflow", "dropout": 0.13},
        {
            "seed": 42,
            "schedule_sampler": "lognormal",
            "p_mean": -1.0,
            "p_std": 1.4,
            "optimizer": "adam",
            "lr": 1e-3,
            "global_batch_size": 512,
            "ema_rate": EDM_RATE,
            "total_training_steps": 400000,
        },
        18,
        results=(Result(35, 2.15, SCM_PAPER),),
    ),
    "cifar10_sct": _cifar_scm("sct", 0.2, published(SCM_PAPER, 2.85, 2.06)),
    "cifar10_scd": _cifar_scm("scd", 0.0, published(SCM_PAPER, 3.66, 2.52)),
}


# --- ImageNet 64x64, with ADM's network for iCT and EDM2's for the others ---


def _imagenet_ict(depth: int, one: tuple[float, float, float], two: tuple[float, float, float]) -> Preset:
    """ADM without scale-shift norms, which drops out at 16 and 8 pixels only. one, two: FID, precision, recall."""
    model = {**ADM, "num_res_blocks": depth, "use_scale_shift_norm": False, "weight_schedule": "inverse-gap"}
    model |= {"dropout": 0.2, **LOW_DROPOUT}
    train = {**ICT, "global_batch_size": 4096, "ema_rate": "0.99997", "total_training_steps": 800000}
    results = (
        Result(n, fid, ICT_PAPER, precision=p, recall=r) for n, (fid, p, r) in enumerate((one, two), 1)
    )
    return two_steps(model, {**train, "optimizer": "radam", "lr": 1e-4}, 1.526, tuple(results))


ECM_CODE = "locuslab/ect, branch imgnet"
SCM_TABLES = "Lu & Song 2025, Table 2"
EDM2: Flags = {
    "network": "edm2",
    "image_size": 64,
    "channel_mult": "1,2,3,4",
    "num_res_blocks": 3,
    "attention_resolutions": "16,8",
    "num_head_channels": 64,
    "class_cond": True,
    "num_classes": 1000,
}
EDM2_TRAIN: Flags = {"optimizer": "adam", "beta2": 0.99, "lr_schedule": "inverse_sqrt"}
WIDTHS = {"s": 192, "m": 256, "l": 320, "xl": 384}


def _ecm(size: str, lr: float, dropout: float, batch: int, results: tuple[Result, ...] = ()) -> Preset:
    """From EDM2's post-hoc averages."""
    model = {**EDM2, **LOW_DROPOUT, "num_channels": WIDTHS[size], "dropout": dropout, "boundary": "zero"}
    train = {
        **ECT,
        **EDM2_TRAIN,
        "p_mean": -0.8,
        "p_std": 1.6,
        "ratio_q": 4.0,
        "huber_c": 0.06,
        "lr": lr,
        "lr_anneal_steps": 2000,
        "random_flip": False,
        "global_batch_size": batch,
        "total_training_steps": 100000,
        "ema_rate": "0.9999",
        "ema_profiles": "0.01,0.05,0.1",
    }
    return two_steps({**model, "weight_schedule": "karras"}, train, 1.526, results)


def _imagenet_tcm(size: str, dropout: float, rates: tuple[float, float], two: tuple[Result, ...]) -> dict:
    """Both stages; the authors stop them by FID, so the lengths are upper bounds of their scripts."""
    model = {**EDM2, **LOW_DROPOUT, "num_channels": WIDTHS[size], "dropout": dropout, "boundary": "zero"}
    model |= {"weight_schedule": "karras"}
    both = {**EDM2_TRAIN, "huber_c": 0.06, "ema_profiles": "0.05", "total_training_steps": 800000}
    first = {**ECT, **both, "p_mean": -0.8, "p_std": 1.6, "truncate": True, "ratio_q": 4.0}
    first |= {"ratio_max": 0.9961, "ratio_steps": 10000, "lr": rates[0], "lr_anneal_steps": 2000}
    second = {**TCM, **both, "ratio_q": 256.0, "ratio_max": 0.9961, "teacher_dropout": dropout}
    second |= {"lr": rates[1], "lr_anneal_steps": 8000}
    return {
        f"imagenet64_tcm1_{size}": two_steps(model, {**first, "global_batch_size": 2048}, 1.526),
        f"imagenet64_tcm2_{size}": two_steps(model, {**second, "global_batch_size": 1024}, 1.526, two),
    }


def _trigflow_teacher(size: str, steps: int, lr: float, dropout: float, fid: float) -> Preset:
    """63 evaluations with the second-order solver, which is Heun's here."""
    model = {
        **EDM2,
        **LOW_DROPOUT,
        "network": "edm2_scm",
        "precond": "trigflow",
        "num_channels": WIDTHS[size],
    }
    train = {
        **EDM2_TRAIN,
        "schedule_sampler": "lognormal",
        "p_mean": -0.8,
        "p_std": 1.6,
        "uncertainty": True,
        "lr": lr,
        "lr_anneal_steps": 35000,
        "lr_warmup_steps": 4883,  # ten million images
        "global_batch_size": 2048,
        "total_training_steps": steps,
        "ema_profiles": "0.05,0.1",
    }
    model |= {"dropout": dropout, "weight_schedule": "karras"}
    return teacher(model, train, 32, results=(Result(63, fid, SCM_TABLES),))


def _imagenet_scm(mode: str, size: str, lr: float, results: tuple[Result, ...]) -> Preset:
    """From the TrigFlow teacher of its size."""
    model = {**EDM2, **LOW_DROPOUT, "network": "edm2_scm", "precond": "trigflow", "boundary": "zero"}
    train = {
        **TRIGFLOW,
        **EDM2_TRAIN,
        "training_mode": mode,
        "init": "teacher",
        "p_std": 1.6,
        "adam_eps": 1e-11,
        "lr": lr,
        "lr_anneal_steps": 35000,
        "global_batch_size": 2048,
        "total_training_steps": 400000,
        "ema_profiles": "0.05",
    }
    dropout = 0.45 if mode == "sct" else 0.0
    return two_steps({**model, "num_channels": WIDTHS[size], "dropout": dropout}, train, 0.98238, results)


# size: FID of the teacher; sCT with one and two steps; sCD with one and two
SCM_FIDS = {
    "s": (1.70, (3.23, 2.93), (2.97, 2.07)),
    "m": (1.55, (2.25, 1.81), (2.79, 1.89)),
    "l": (1.44, (2.08, 1.57), (2.43, 1.70)),
    "xl": (1.38, (2.04, 1.48), (2.44, 1.66)),
}
# size: steps, rate and dropout of the teacher; rate of the students
SCM_TRAINING = {
    "s": (1048000, 1e-2, 0.0, 1e-4),
    "m": (1486000, 9e-3, 0.1, 9e-5),
    "l": (761000, 8e-3, 0.1, 8e-5),
    "xl": (540000, 7e-3, 0.1, 7e-5),
}


def _imagenet_scms() -> dict[str, Preset]:
    found = {}
    for size, (fid, sct, scd) in SCM_FIDS.items():
        *own, rate = SCM_TRAINING[size]
        found[f"imagenet64_trigflow_{size}"] = _trigflow_teacher(size, *own, fid)
        found[f"imagenet64_sct_{size}"] = _imagenet_scm("sct", size, rate, published(SCM_TABLES, *sct))
        found[f"imagenet64_scd_{size}"] = _imagenet_scm("scd", size, rate, published(SCM_TABLES, *scd))
    return found


IMAGENET64: dict[str, Preset] = {
    "imagenet64_ict": _imagenet_ict(3, (4.02, 0.70, 0.63), (3.20, 0.73, 0.63)),
    "imagenet64_ict_deep": _imagenet_ict(6, (3.25, 0.72, 0.63), (2.77, 0.74, 0.62)),
    "imagenet64_ecm_s": _ecm("s", 1e-3, 0.4, 128),
    "imagenet64_ecm_m": _ecm("m", 9e-4, 0.5, 128),
    "imagenet64_ecm_l": _ecm("l", 8e-4, 0.5, 128),
    "imagenet64_ecm_xl": _ecm("xl", 7e-4, 0.5, 1024, published(ECM_CODE, 2.49, 1.67)),
    **_imagenet_tcm("s", 0.4, (1e-3, 5e-4), published(TCM_PAPER, 2.88, 2.31)),
    **_imagenet_tcm("xl", 0.5, (7e-4, 1e-4), published(TCM_PAPER, 2.20, 1.62)),
    **_imagenet_scms(),
}


# --- digits: minutes on two cores ---


def _digits(model: Flags, train: Flags, middle: float = 0.821) -> Preset:
    return two_steps({**DIGITS8, **model}, {**TRAINING, **train}, middle, draws=SAMPLING, edits=EDITING)


HUBER: Flags = {"weight_schedule": "inverse-gap"}
FROM_ZERO: Flags = {**HUBER, "boundary": "zero"}
FAST: Flags = {"lr": 5e-4, "ema_rate": "0.99"}


def _digits_scm(mode: str) -> Preset:
    train = {"training_mode": mode, "init": "teacher", "tangent_warmup": 200, "total_training_steps": 1000}
    return _digits({**SLOW_CLOCK, "boundary": "zero"}, {**TRIGFLOW, **FAST, **train}, 0.98238)


DIGITS: dict[str, Preset] = {
    "digits_ict": _digits(
        HUBER,
        {**ICT, "end_scales": 160, "lr": 1e-3, "ema_rate": "0.99", "total_training_steps": 1500},
    ),
    "digits_ect": _digits(FROM_ZERO, {**ECT, **FAST, "ratio_steps": 100, "total_training_steps": 800}),
    "digits_tcm": _digits(FROM_ZERO, {**TCM, **FAST, "ratio_q": 64.0, "total_training_steps": 400}, 1.0),
    "digits_sct": _digits_scm("sct"),
    "digits_scd": _digits_scm("scd"),
}

# --- Fashion-MNIST: every student from one teacher, at equal images seen ---


def _fashion(model: Flags, train: Flags, middle: float = 0.821) -> Preset:
    common = {**TRAINING, **FASHION_SAVES, "ema_rate": "0.99", "total_training_steps": FASHION_STEPS}
    return two_steps({**FASHION, **model}, {**common, **train}, middle, draws=SAMPLING, edits=EDITING)


def _fashion_scm(mode: str) -> Preset:
    train = {"training_mode": mode, "init": "teacher", "tangent_warmup": FASHION_STEPS // 4, "lr": 5e-4}
    return _fashion({"boundary": "zero"}, {**TRIGFLOW, **train}, 0.98238)


# So short a run sees the highest levels too rarely by the paper's law of pairs: even in ln(t) it is far better.
EVEN: Flags = {"p_std": 100.0}
FASHION_LATER: dict[str, Preset] = {
    "fashion_ict": _fashion(HUBER, {**ICT, **EVEN, "init": "teacher", "end_scales": 160, "lr": 1e-3}),
    "fashion_ect": _fashion(FROM_ZERO, {**ECT, "ratio_steps": FASHION_STEPS // 8, "lr": 5e-4}),
    "fashion_tcm": _fashion(FROM_ZERO, {**TCM, "ratio_q": 64.0, "lr": 5e-4}, 1.0),
    "fashion_sct": _fashion_scm("sct"),
    "fashion_scd": _fashion_scm("scd"),
}

PRESETS: dict[str, Preset] = {**CIFAR10, **IMAGENET64, **DIGITS, **FASHION_LATER}
