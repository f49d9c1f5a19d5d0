"""The original's script as a library: `cm.sampling.search`."""

from cm.sampling.search import *  # noqa: F403
