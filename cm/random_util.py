"""The original's name for `cm.sampling.noise` and `cm.seeding`."""

from cm.sampling.noise import *  # noqa: F403
from cm.seeding import *  # noqa: F403
