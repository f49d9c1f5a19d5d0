"""The original's name for `cm.diffusion.noise_levels`."""

from cm.diffusion.noise_levels import *  # noqa: F403
