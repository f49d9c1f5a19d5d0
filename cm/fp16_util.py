"""The original's name for `cm.training.mixed_precision`."""

from cm.training.mixed_precision import *  # noqa: F403
