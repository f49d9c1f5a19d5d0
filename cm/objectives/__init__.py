"""Training objectives: one file each."""

from cm.diffusion.grid import Grid
from cm.objectives.alpha_sigma import AlphaSigmaObjective, AlphaSigmaProgressive
from cm.objectives.base import Draw, Objective, Roles
from cm.objectives.classifier import ClassifierObjective
from cm.objectives.consistency import ConsistencyObjective
from cm.objectives.continuous import ContinuousObjective
from cm.objectives.edm import EDMObjective
from cm.objectives.progressive import ProgressiveObjective

__all__ = [
    "AlphaSigmaObjective",
    "AlphaSigmaProgressive",
    "ClassifierObjective",
    "ConsistencyObjective",
    "ContinuousObjective",
    "Draw",
    "EDMObjective",
    "Grid",
    "Objective",
    "ProgressiveObjective",
    "Roles",
]
