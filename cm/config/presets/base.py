"""What a preset is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Flags = Mapping[str, Any]
TRAINING_SCRIPTS = ("edm_train", "classifier_train", "cm_train")


@dataclass(frozen=True)
class Result:
    """A number that was published for an experiment. nfe: network evaluations per image."""

    nfe: int
    fid: float
    source: str
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None


@dataclass(frozen=True)
class Preset:
    """One experiment as flags.

    model: flags of the model, for every script. scripts: script -> its own flags; no other script knows the preset.
    Together they are variant `release`: the published command lines, where there are any. paper: training flags that
    variant `paper` changes: Table 3 and Appendix C of the paper.
    """

    model: Flags
    scripts: Mapping[str, Flags]
    paper: Flags = field(default_factory=dict)
    results: tuple[Result, ...] = ()

    @property
    def training_script(self) -> str:
        """The script that trains it; the first one where there are several."""
        return next(script for script in self.scripts if script in TRAINING_SCRIPTS)

    def values(self, script: str, variant: str) -> dict[str, Any]:
        """Flags for a script."""
        trains = script in TRAINING_SCRIPTS
        return {**self.model, **self.scripts[script], **(self.paper if variant == "paper" and trains else {})}


DRAWS: Flags = {"num_samples": 50000, "batch_size": 500}


def teacher(
    model: Flags,
    train: Flags,
    steps: int,
    draws: Flags = DRAWS,
    results: Sequence[Result] = (),
    paper: Flags | None = None,
) -> Preset:
    """A denoiser and its Heun samples."""
    sample = {"training_mode": "edm", "sampler": "heun", "steps": steps, **draws}
    return Preset(model, {"edm_train": train, "image_sample": sample}, paper or {}, tuple(results))


def consistency(
    model: Flags,
    train: Flags,
    grid: Flags,
    draws: Flags = DRAWS,
    results: Sequence[Result] = (),
    paper: Flags | None = None,
    *,
    edits: Flags | None = None,
    search: Flags | None = None,
) -> Preset:
    """A consistency model. grid: steps, and time points or levels of two-step sampling. search None: not offered."""
    mode = {"training_mode": train["training_mode"]}
    steps = grid["steps"]
    scripts = {
        "cm_train": train,
        "image_sample": {**mode, "sampler": "onestep", **grid, **draws},
        "image_edit": {**mode, "steps": steps, **(edits or {})},
    }
    if search is not None:
        scripts["ternary_search"] = {"begin": "0", "end": str(steps - 1), "steps": steps, **search}
    return Preset(model, scripts, paper or {}, tuple(results))


# 4096 intervals down to 1, 50 000 steps each and twice that for the last two
HALVINGS: Flags = {
    "start_scales": 4096,
    "distill_steps_per_iter": 50000,
    "total_training_steps": 750000,
    "lr": 5e-5,
    "lr_schedule": "linear",
    "grad_clip": 1.0,
}


def progressive(model: Flags, train: Flags, draws: Flags = DRAWS, results: Sequence[Result] = ()) -> Preset:
    """Progressive distillation, sampled in one step."""
    mode = {"training_mode": "progdist"}
    return Preset(
        {**model, "weight_schedule": "truncated-snr"},
        {
            "cm_train": {**mode, "scale_mode": "progdist", "optimizer": "adam", **train},
            "image_sample": {**mode, "sampler": "progdist", "steps": 1, **draws},
        },
        results=tuple(results),
    )
