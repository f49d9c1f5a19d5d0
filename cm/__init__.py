"""Consistency models in PyTorch: EDM teachers, distillation, consistency training, sampling, editing.

    import cm
    model = cm.load("runs/student")
    images = model.sample(16, steps=2, seed=0)      # (16, C, H, W) in [-1, 1]

`load`, `train`, `evaluate` and `Model` are those of `cm.api`, imported when they are first asked for.
"""

import sys
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


def _refuse_modules_that_are_no_programs() -> None:
    """`python -m cm.api` would end without a word: say what to start instead."""
    from importlib.util import find_spec
    from pathlib import Path

    words = sys.orig_argv
    name = words[words.index("-m") + 1] if "-m" in words else ""
    spec = find_spec(name) if name.startswith("cm.") else None
    if not spec or not spec.origin or spec.submodule_search_locations:
        return
    if '__name__ == "__main__"' not in Path(spec.origin).read_text():
        sys.stderr.write(
            f"error: {name} is no program: cm --help, or python -m cm --help, lists the commands\n"
        )
        sys.exit(2)


if sys.argv[:1] == ["-m"]:  # python -m, before the module is found
    _refuse_modules_that_are_no_programs()
