"""What produced a result: versions of this package and of those that its numbers depend on."""

import platform

import numpy as np
import torch

from cm import __version__


def versions() -> dict[str, str]:
    """Versions of this package, Python, torch and numpy."""
    return {
        "cm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
