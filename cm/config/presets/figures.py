"""Runs of the paper's Figures 3 and 4 as presets: `<data>_fig3<letter>_<what varies>`, on CIFAR-10 and in miniature.

Miniatures, on digits and on Fashion-MNIST, take minutes.

The figures are put together in evaluations/reports/figures.py; a run that another preset already describes is not
repeated.
The text of the paper does not list the N of Figure 3b and the fixed schedules of 3d: these are ours.
"""

from dataclasses import replace
from typing import Any

from cm.config.presets import cifar10, small
from cm.config.presets.base import Preset

CIFAR_N = (9, 12, 18, 36, 50, 60, 80, 120)
CIFAR_SOLVER_N = (18, 50, 120)
# N of the miniatures: Figure 3c, Figure 3b, and the fixed ones of 3d
SMALL_N = (5, 9, 18, 36)
SMALL_SOLVER_N = (9, 18)
SMALL_FIXED_N = (4, 18)
# Figures 3a and 3d show FID while training goes on: this often a miniature is saved.
SAVE = 100


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
        save_interval=SAVE,
    )


def _miniatures(prefix: str, **lengths: Any) -> dict[str, Preset]:
    """The runs of Figures 3 and 4 on a small data set, from its CD, CT and PD. lengths: flags of all but PD."""
    cd, ct, pd = (small.PRESETS[f"{prefix}_{method}"] for method in ("cd", "ct", "pd"))
    often = {**lengths, "save_interval": SAVE}
    return {
        **{f"{prefix}_fig3a_{norm}": _vary(cd, loss_norm=norm, **often) for norm in ("l1", "l2")},
        **{
            f"{prefix}_fig3b_{solver}_n{n}": _vary(cd, ode_solver=solver, start_scales=n, **often)
            for solver in ("euler", "heun")
            for n in SMALL_SOLVER_N
        },
        **{f"{prefix}_fig3c_n{n}": _vary(cd, start_scales=n, **lengths) for n in SMALL_N},
        f"{prefix}_fig3d_adaptive": _vary(ct, **often),
        **{f"{prefix}_fig3d_n{n}": _fixed(_vary(ct, **lengths), n, 0.9) for n in SMALL_FIXED_N},
        f"{prefix}_fig4_pd": replace(
            pd, scripts={**pd.scripts, "cm_train": {**pd.scripts["cm_train"], "save_interval": SAVE}}
        ),
    }


_CIFAR = cifar10.PRESETS["cifar10_cd_lpips"]

PRESETS: dict[str, Preset] = {
    **{
        f"cifar10_fig3b_{solver}_n{n}": _vary(_CIFAR, ode_solver=solver, start_scales=n)
        for solver in ("euler", "heun")
        for n in CIFAR_SOLVER_N
    },
    **{f"cifar10_fig3c_n{n}": _vary(_CIFAR, start_scales=n) for n in CIFAR_N},
    **_miniatures("digits"),
    **_miniatures("fashion", total_training_steps=small.FASHION_STEPS // 2),
}
