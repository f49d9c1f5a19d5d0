"""The original's name for `cm.networks.unet`."""

from cm.networks.unet import *  # noqa: F403
