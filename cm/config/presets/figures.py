"""Runs of the paper's Figures 3 and 4 as presets: `<data>_fig3<letter>_<what varies>`, on CIFAR-10 and in miniature.

Miniatures, on digits and on Fashion-MNIST, take minutes. `<data>_figict_<what is taken away>` is the ablation of
improved consistency training (Song & Dhariwal 2023, Figure 5), in miniature only.

The figures are put together in evaluations/reports/figures.py; a run that another preset already describes is not
repeated.
The text of the paper does not list the N of Figure 3b and the fixed schedules of 3d: these are ours.
"""

from dataclasses import replace
from typing import Any

from cm.config.presets import cifar10, later, small
from cm.config.presets.base import Flags, Preset

CIFAR_N = (9, 12, 18, 36, 50, 60, 80, 120)
CIFAR_SOLVER_N = (18, 50, 120)
# N of the miniatures: Figure 3c, Figure 3b, and the fixed ones of 3d
SMALL_N = (5, 9, 18, 36)
SMALL_SOLVER_N = (9, 18)
SMALL_FIXED_N = (4, 18)
# Figures 3a and 3d show FID while training goes on: this often a miniature is saved.
SAVE, FASHION_SAVE = 100, 50
FASHION_LENGTHS = {"total_training_steps": small.FASHION_STEPS // 4}
# Runs that another one already is. On digits, which take a minute each, every figure has its own.
SAME_RUN = {
    "fashion_fig3b_heun_n18": "fashion_fig3a_l2",
    "fashion_fig3c_n18": "fashion_fig3a_l2",
    "fashion_fig3c_n9": "fashion_fig3b_heun_n9",
}
# The ablation of iCT: what is taken away -> flags that do it. On Fashion-MNIST, iCT itself has pairs even in ln(t).
ICT_WITHOUT: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no_ema": {"start_ema": 0.9},
    "huber": {"loss_norm": "l2"},
    "weight": {"weight_schedule": "uniform"},
    "pairs": {"p_std": 100.0},
    "doubling": {"scale_mode": "progressive", "start_scales": 2, "end_scales": 17},
}


def _vary(base: Preset, **train: Any) -> Preset:
    """A consistency model with other training flags, sampled in one step on the grid it was trained on."""
    train = {**base.scripts["cm_train"], **train}
    progressive = train.get("scale_mode") == "progressive"
    steps = train["end_scales"] + 1 if progressive else train["start_scales"]
    sample = {k: v for k, v in base.scripts["image_sample"].items() if k != "ts"}
    scripts = {
        "cm_train": train,
        "image_sample": {**sample, "sampler": "onestep", "steps": steps},
        "image_edit": {**base.scripts["image_edit"], "steps": steps},
    }
    return replace(base, scripts=scripts, results=())


def _fixed(base: Preset, n: int, mu: float) -> Preset:
    """Consistency training with N and mu that do not change."""
    return _vary(
        base,
        target_ema_mode="fixed",
        start_ema=mu,
        scale_mode="fixed",
        start_scales=n,
        end_scales=n,
    )


def _miniatures(prefix: str, save: int = SAVE, **lengths: Any) -> dict[str, Preset]:
    """The runs of Figure 3 on a small data set, from its CD and CT. lengths: flags of all."""
    cd, ct = (small.PRESETS[f"{prefix}_{method}"] for method in ("cd", "ct"))
    often = {**lengths, "save_interval": save}
    return {
        **{f"{prefix}_fig3a_{norm}": _vary(cd, loss_norm=norm, **often) for norm in ("l1", "l2")},
        **{
            f"{prefix}_fig3b_{solver}_n{n}": _vary(cd, ode_solver=solver, start_scales=n, **often)
            for solver in ("euler", "heun")
            for n in SMALL_SOLVER_N
        },
        **{f"{prefix}_fig3c_n{n}": _vary(cd, start_scales=n, **lengths) for n in SMALL_N},
        f"{prefix}_fig3d_adaptive": _vary(ct, **often),
        **{f"{prefix}_fig3d_n{n}": _fixed(_vary(ct, **often), n, 0.9) for n in SMALL_FIXED_N},
    }


def _progressive_often(pd: Preset) -> Preset:
    """Progressive distillation whose stages can be sampled: it is saved at the end of each."""
    return replace(pd, scripts={**pd.scripts, "cm_train": {**pd.scripts["cm_train"], "save_interval": SAVE}})


def _ablation(prefix: str, save: int, pairs: Flags | None = None, **lengths: Any) -> dict[str, Preset]:
    """Improved consistency training without each of its parts. pairs: the law of pairs that takes the place of its."""
    base = later.PRESETS[f"{prefix}_ict"]
    found = {}
    for what, flags in {**ICT_WITHOUT, "pairs": pairs or ICT_WITHOUT["pairs"]}.items():
        model = {n: v for n, v in flags.items() if n in base.model}
        train = {**base.scripts["cm_train"], **lengths, "save_interval": save, **flags}
        train = {n: v for n, v in train.items() if n not in model}
        found[f"{prefix}_figict_{what}"] = replace(
            base, model={**base.model, **model}, scripts={**base.scripts, "cm_train": train}, results=()
        )
    return found


_CIFAR = cifar10.PRESETS["cifar10_cd_lpips"]

PRESETS: dict[str, Preset] = {
    **{
        f"cifar10_fig3b_{solver}_n{n}": _vary(_CIFAR, ode_solver=solver, start_scales=n)
        for solver in ("euler", "heun")
        for n in CIFAR_SOLVER_N
    },
    **{f"cifar10_fig3c_n{n}": _vary(_CIFAR, start_scales=n) for n in CIFAR_N},
    **_miniatures("digits"),
    "digits_fig4_pd": _progressive_often(small.PRESETS["digits_pd"]),
    **_ablation("digits", SAVE),
    **{n: p for n, p in _miniatures("fashion", FASHION_SAVE, **FASHION_LENGTHS).items() if n not in SAME_RUN},
    **_ablation("fashion", FASHION_SAVE, {"p_std": 2.0}, **FASHION_LENGTHS),
}
