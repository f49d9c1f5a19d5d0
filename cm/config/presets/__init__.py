"""The paper's and the release's experiments as data: `<data>_<method>[_<norm>]` -> flags and published numbers."""

import difflib
from typing import Any

from cm.config.presets import cifar10, figures, flow_maps, later, released, segments, small, systems
from cm.config.presets.base import Preset, Result
from cm.errors import UserError

__all__ = ["PRESETS", "Preset", "Result", "get", "values"]

PRESETS: dict[str, Preset] = {
    **released.PRESETS,
    **cifar10.PRESETS,
    **small.PRESETS,
    **systems.PRESETS,
    **figures.PRESETS,
    **later.PRESETS,
    **segments.PRESETS,
    **flow_maps.PRESETS,
}


def get(name: str) -> Preset:
    """Preset by name."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise UserError(f"--preset {name} is unknown{hint} (python -m cm.presets lists all)")
    return PRESETS[name]


def values(name: str, variant: str, script: str) -> dict[str, Any]:
    """The flags that a preset sets for a script."""
    preset = get(name)
    if variant not in ("release", "paper"):
        raise UserError(f"--variant must be one of release, paper, got {variant!r}")
    if script not in preset.scripts:
        raise UserError(f"--preset {name} is for {', '.join(preset.scripts)}, not for {script}")
    return preset.values(script, variant)
