"""Consistency models in PyTorch: EDM teachers, distillation, consistency training, sampling, editing.

    import cm
    model = cm.load("runs/student")
    images = model.sample(16, steps=2, seed=0)      # (16, C, H, W) in [-1, 1]

`load`, `train`, `evaluate` and `Model` are those of `cm.api`, imported when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cm.api import Model, evaluate, load, train

__version__ = "0.1.0"
__all__ = ["Model", "evaluate", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cm' has no attribute {name!r}")
    from cm import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
