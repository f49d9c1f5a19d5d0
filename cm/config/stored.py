"""What a model file says of itself is checked by the flags that it names, before anything is done with it."""

import math
from dataclasses import Field
from functools import lru_cache
from typing import Any

from cm.config.fields import check_flag, flags_of
from cm.config.flags import ModelFlags
from cm.config.scripts import SampleConfig
from cm.errors import UserError

# Far above any network's; what is built from a number has to be paid for in memory or time.
LIMITS = {
    "image_size": 1 << 16,
    "num_channels": 1 << 16,
    "num_res_blocks": 1000,
    "num_classes": 10_000_000,
    "steps": 1_000_000,
    "augment_dim": 1000,
}
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def checked(stored: Any, source: str) -> dict[str, Any]:
    """The stored configuration; UserError that names the source and the flag where one has a wrong type or value.

    Names that are no flags of ours may belong to a plug-in and pass.
    """
    if not isinstance(stored, dict):
        raise UserError(f"{source}: its configuration is a {type(stored).__name__}, not an object")
    known = _flags()
    for name, value in stored.items():
        if not isinstance(name, str):
            raise UserError(f"{source}: its configuration has a {type(name).__name__} as a name")
        if name in known and value is not None:
            _check(known[name], value, source)
    return stored


def _check(f: Field, value: Any, source: str) -> None:
    kind = type(f.default)
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind is float and math.isnan(value)):
        raise UserError(f"{source}: its configuration says {f.name} = {str(value)[:40]!r}, not {KINDS[kind]}")
    if kind is int and value > LIMITS.get(f.name, math.inf):
        raise UserError(f"{source}: its configuration says {f.name} = {value}, more than {LIMITS[f.name]}")
    if kind in (int, float):
        try:
            check_flag(f, value)
        except UserError as error:
            raise UserError(f"{source}: its configuration says {error}") from None


@lru_cache
def _flags() -> dict[str, Field]:
    """The flags that a file describes a network, its objective and its grid by."""
    sampling = flags_of(SampleConfig)
    return {**flags_of(ModelFlags), **{name: sampling[name] for name in ("training_mode", "steps")}}
