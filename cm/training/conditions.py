"""What training draws for the conditions of its rows: classes that it hides, scales of the teacher's guidance."""

from dataclasses import dataclass

from torch import Tensor

from cm.config.derived import guidance_of, told_guidance
from cm.config.scripts import TrainConfig
from cm.nn import NO_CLASS
from cm.seeding import StepRandom


@dataclass(frozen=True)
class Conditions:
    """label_dropout: how often a class is hidden. scales: between which the guidance of each row is drawn, uniformly.

    Draws are functions of the row, apart from those of the objective, which stay as they are without.
    """

    label_dropout: float = 0.0
    scales: tuple[float, float] | None = None

    def __call__(self, cond: dict[str, Tensor], random: StepRandom) -> dict[str, Tensor]:
        """The conditions (B,) of this rank's rows with what was drawn: y, and guidance where scales are drawn."""
        drawn = dict(cond)
        if self.label_dropout:
            hidden = _uniform(random, "label dropout") < self.label_dropout
            drawn["y"] = cond["y"].masked_fill(hidden, NO_CLASS)
        if self.scales:
            low, high = self.scales
            drawn["guidance"] = (low + (high - low) * _uniform(random, "guidance")).float()
        return drawn


def _uniform(random: StepRandom, kind: str) -> Tensor:
    """(B,) float64 in [0, 1)."""
    return (random.row_numbers(kind).double() + 2**31) / 2**32


def conditions_of(config: TrainConfig) -> Conditions:
    """What a configuration asks for."""
    guidance = guidance_of(config)
    drawn = guidance is not None and guidance.drawn
    dropout = 0.0 if told_guidance(config) else config.label_dropout  # its draws hide classes
    return Conditions(dropout, (guidance.low, guidance.high) if drawn else None)
