"""Training objectives: one file each."""

from cm.objectives.base import Draw, Objective, Roles
from cm.objectives.consistency import ConsistencyObjective, Grid
from cm.objectives.continuous import ContinuousObjective
from cm.objectives.edm import EDMObjective
from cm.objectives.progressive import ProgressiveObjective

__all__ = [
    "ConsistencyObjective",
    "ContinuousObjective",
    "Draw",
    "EDMObjective",
    "Grid",
    "Objective",
    "ProgressiveObjective",
    "Roles",
]
