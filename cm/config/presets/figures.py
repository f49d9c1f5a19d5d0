"""Runs of the paper's Figure 3 as presets: `<data>_fig3<letter>_<what varies>`, on CIFAR-10 and, in minutes, on digits.

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
DIGITS_N = (5, 9, 18, 36)
DIGITS_SOLVER_N = (9, 18)
DIGITS_FIXED_N = (4, 18)
# Figures 3a and 3d show FID while training goes on: this often a digits run is saved.
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


_CIFAR, _DIGITS, _DIGITS_CT = (
    cifar10.PRESETS["cifar10_cd_lpips"],
    small.PRESETS["digits_cd"],
    small.PRESETS["digits_ct"],
)

PRESETS: dict[str, Preset] = {
    **{
        f"cifar10_fig3b_{solver}_n{n}": _vary(_CIFAR, ode_solver=solver, start_scales=n)
        for solver in ("euler", "heun")
        for n in CIFAR_SOLVER_N
    },
    **{f"cifar10_fig3c_n{n}": _vary(_CIFAR, start_scales=n) for n in CIFAR_N},
    **{f"digits_fig3a_{norm}": _vary(_DIGITS, loss_norm=norm, save_interval=SAVE) for norm in ("l1", "l2")},
    **{
        f"digits_fig3b_{solver}_n{n}": _vary(_DIGITS, ode_solver=solver, start_scales=n, save_interval=SAVE)
        for solver in ("euler", "heun")
        for n in DIGITS_SOLVER_N
    },
    **{f"digits_fig3c_n{n}": _vary(_DIGITS, start_scales=n) for n in DIGITS_N},
    "digits_fig3d_adaptive": _vary(_DIGITS_CT, save_interval=SAVE),
    **{f"digits_fig3d_n{n}": _fixed(_DIGITS_CT, n, 0.9) for n in DIGITS_FIXED_N},
    "digits_fig4_pd": replace(
        small.PRESETS["digits_pd"],
        scripts={
            **small.PRESETS["digits_pd"].scripts,
            "cm_train": {**small.PRESETS["digits_pd"].scripts["cm_train"], "save_interval": SAVE},
        },
    ),
}
