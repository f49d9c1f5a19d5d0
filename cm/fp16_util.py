"""The original's name for `cm.training.mixed_precision`."""

from cm.training.mixed_precision import MasterWeights, MixedPrecisionTrainer

__all__ = ["MasterWeights", "MixedPrecisionTrainer"]
