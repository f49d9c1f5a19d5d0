"""What a model file says of itself is checked by the flags that it names, before anything is done with it."""

import math
from dataclasses import Field
from functools import lru_cache
from typing import Any

from cm.config.fields import check_flag, flags_of, meta_of
from cm.config.flags import ModelFlags
from cm.config.scripts import SCRIPTS, SampleConfig
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
    known, network = _flags(), _of_a_network()
    for name, value in stored.items():
        if not isinstance(name, str):
            raise UserError(f"{source}: its configuration has a {type(name).__name__} as a name")
        if name == "class_names" and not all(isinstance(word, str) for word in _items(value)):
            raise UserError(
                f"{source}: its configuration names classes by {str(value)[:40]}, not a list of texts"
            )
        if name in known:
            _check(known[name], value, source, bounds=name in network)
    return stored


def _items(value: Any) -> list[Any]:
    """The items of a list or tuple; what is none of them stands as its own item."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [object]


def _check(f: Field, value: Any, source: str, bounds: bool) -> None:
    kind = type(f.default)
    fits = type(value) is kind or (kind is float and (type(value) is int or value in ("inf", "-inf")))
    if not fits or (kind is float and math.isnan(value)):
        raise UserError(f"{source}: its configuration says {f.name} = {str(value)[:40]!r}, not {KINDS[kind]}")
    if kind is int and abs(value) > (limit := LIMITS.get(f.name, 1 << 20 if bounds else 1 << 63)):
        raise UserError(f"{source}: its configuration says {f.name} = {value}, more than {limit}")
    if bounds and kind in (int, float):
        try:
            check_flag(f, value)
        except UserError as error:
            raise UserError(f"{source}: its configuration says {error}") from None


@lru_cache
def _flags() -> dict[str, Field]:
    """Every flag of a script or of a row, where all that have it agree about its type."""
    found: dict[str, Field] = {}
    several: set[str] = set()

    def add(cls: type) -> None:
        for name, f in flags_of(cls).items():
            if type(found.setdefault(name, f).default) is not type(f.default):
                several.add(name)
            for row in (meta_of(f).registry or {}).values():
                if row.options is not None:
                    add(row.options)

    for script in SCRIPTS.values():
        add(script)
    return {name: f for name, f in found.items() if name not in several and type(f.default) in KINDS}


@lru_cache
def _of_a_network() -> dict[str, Field]:
    """The flags that a file describes a network, its objective and its grid by."""
    sampling = flags_of(SampleConfig)
    return {**flags_of(ModelFlags), **{name: sampling[name] for name in ("training_mode", "steps")}}
