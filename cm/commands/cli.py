"""Command line of a configuration class: flat flags (`--use_fp16 True`), --preset, --config, --dry_run.

A value comes from the first of: its flag, the --config file, what a given --precond goes with, the --preset, the
default. Imports no torch.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field
from typing import Any, NoReturn, TypeVar

from cm.config import presets
from cm.config.implied import column_flags
from cm.config.parsing import str2bool
from cm.config.scripts import Config, flags_of, resolved, script_of
from cm.config.validation import require_inputs, validate
from cm.errors import UserError

ConfigType = TypeVar("ConfigType", bound=Config)
METAVARS = {bool: "BOOL", int: "INT", float: "FLOAT", str: "TEXT"}


def run_script(
    config_class: type[ConfigType], run: Callable[[ConfigType], object], argv: Sequence[str] | None = None
) -> None:
    """Parse the command line, then `run` the configuration; all that a script does.

    torch is imported after --help has been answered. `cm.runtime.job.run_main` ends the job in an orderly way.
    """

    def main() -> None:
        if isinstance(config, UserError):
            raise config
        run(config)

    try:
        config = parse(config_class, argv)
    except UserError as error:
        config = error
    from cm.runtime.job import run_main

    run_main(main)


def parse(config_class: type[ConfigType], argv: Sequence[str] | None = None) -> ConfigType:
    """The configuration of a run: validated, with every path that the run needs; UserError on bad input.

    --help and --dry_run print what they promise and leave the program with code 0.
    """
    config = parse_config(config_class, argv)
    if config.dry_run:
        _print_once(json.dumps({**resolved(config), "num_parameters": _num_parameters(config)}, indent=2))
        sys.exit(0)
    require_inputs(config)
    return config


def parse_config(config_class: type[ConfigType], argv: Sequence[str] | None = None) -> ConfigType:
    """The validated configuration of a command line; UserError on bad input. Reads the --config file only."""
    flags = flags_of(config_class)
    given = _given_flags(config_class, argv)
    from_file = read_config(given["config"], flags) if given.get("config") else {}
    named = {**from_file, **given}
    from_preset = {}
    if named.get("preset"):
        from_preset = presets.values(
            named["preset"], named.get("variant", "release"), script_of(config_class)
        )
    script = script_of(config_class)
    explicit = {
        **column_flags(from_preset.get("precond", ""), script),
        **from_preset,
        **column_flags(named.get("precond", ""), script),
        **named,
    }
    config = config_class(**explicit, explicit=frozenset(explicit))
    validate(config)
    return config


def read_config(path: str, flags: dict[str, Field]) -> dict[str, Any]:
    """Flags from a JSON file as --dry_run prints it; unknown names and wrong types are a UserError."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold one JSON object")
    values = {}
    for name, value in content.items():
        if name in ("num_parameters", "dry_run", "config"):
            continue  # what --dry_run adds, and what belongs to that command alone
        if name not in flags:
            raise UserError(f"--config {path}: unknown flag {name}{_nearest(name, flags)}")
        values[name] = _converted(name, value, type(flags[name].default), path)
    return values


def _converted(name: str, value: Any, kind: type, path: str) -> Any:
    """A JSON value as the flag's type; text is read as on the command line, whole numbers may be floats."""
    try:
        if isinstance(value, str):
            return str2bool(value) if kind is bool else kind(value)
        if type(value) is kind or (kind is float and type(value) is int):
            return kind(value)
    except ValueError:
        pass
    raise UserError(f"--config {path}: {name} must be {METAVARS[kind]}, got {value!r}")


def _num_parameters(config: Config) -> int:
    """Parameters of the configured network, without making any of them."""
    import torch

    from cm.models.factory import create_network

    with torch.device("meta"):
        return sum(p.numel() for p in create_network(config).parameters())


def _print_once(text: str) -> None:
    """Print on the first rank of a job only."""
    from cm.runtime.launch import detect

    if detect().rank == 0:
        print(text)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, raised as UserError."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _given_flags(config_class: type[Config], argv: Sequence[str] | None) -> dict[str, Any]:
    """name -> value of the flags on the command line."""
    namespace, unknown = build_parser(config_class).parse_known_args(argv)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        nearest = _nearest(name, flags_of(config_class)) if unknown[0].startswith("--") else ""
        raise UserError(f"unknown argument {unknown[0]}{nearest}")
    return vars(namespace)


def _nearest(name: str, flags: dict[str, Field]) -> str:
    matches = difflib.get_close_matches(name, flags, n=1, cutoff=0.5)
    return f"; did you mean --{matches[0]}?" if matches else ""


def build_parser(config_class: type[Config]) -> argparse.ArgumentParser:
    """Parser with one flag per field, grouped as the classes group them; it returns only what was given."""
    parser = _Parser(
        prog=script_of(config_class),
        description=config_class.__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
    )
    groups = {}
    for name, field in flags_of(config_class).items():
        title = _group_title(config_class, name)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind = type(field.default)
        groups[title].add_argument(
            f"--{name}",
            type=_bool_argument if kind is bool else kind,
            metavar=METAVARS[kind],
            help=_help_text(field),
        )
    return parser


def _bool_argument(text: str) -> bool:
    try:
        return str2bool(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _group_title(config_class: type[Config], name: str) -> str:
    """Heading of the class that first declares a flag; a script's own flags have the script's."""
    owner = next(cls for cls in reversed(config_class.__mro__) if name in getattr(cls, "__annotations__", {}))
    return script_of(config_class) if owner is config_class else owner.__doc__


def _help_text(field: Field) -> str:
    meta = field.metadata
    unit = f" [{meta['unit']}]" if meta["unit"] else ""
    choices = f"; one of {', '.join(c for c in meta['choices'] if c)}" if meta["choices"] else ""
    default = '""' if field.default == "" else field.default
    return f"{meta['help']}{unit}{choices} (default: {default})".replace("%", "%%")
