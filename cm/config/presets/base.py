"""What a preset is."""

from collections.abc import Mapping
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
