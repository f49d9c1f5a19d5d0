"""Command line of a configuration class: flat flags (`--use_fp16 True`), --preset, --config, --dry_run.

A value comes from the first of: its flag, the --config file, what a given --precond goes with, the --preset, the
default. Options of an objective, sampler, network ... are flags once it is chosen. Imports no torch.
"""

import argparse
import json
import os
import reprlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import Field
from typing import Any, NoReturn

from cm.config import plugins, presets
from cm.config.derived import AUTO, with_two_steps
from cm.config.fields import flags_of, help_text, is_fixed, meta_of
from cm.config.parsing import expanded, str2bool
from cm.config.registry import resolve
from cm.config.rows import PRECONDS
from cm.config.scripts import (
    SCRIPTS,
    Config,
    ConfigType,
    SampleConfig,
    TrainConfig,
    configuration_class,
    resolved,
    script_of,
)
from cm.config.validation import require_inputs, validate
from cm.errors import UserError, extra, nearest
from cm.runtime.inputs import JSON_LIMIT, misfit, parse_json, read_regular

METAVARS = {bool: "BOOL", int: "INT", float: "FLOAT", str: "TEXT"}
# Written by earlier versions; what they said is read off the classifier's file now, or given by --features.
FORMER = {
    "inception_path",
    *("classifier_width", "classifier_depth", "classifier_attention_resolutions", "classifier_pool"),
    *("classifier_use_scale_shift_norm", "classifier_resblock_updown"),
}
# Flags of earlier versions under the names that they have now; None: gone
RENAMED = {
    "classifier_path": "guide",
    "classifier_scale": "guidance",
    "classifier_noise_schedule": None,
    "shard_optimizer": "shard",
}
# What values of flags that were renamed are called now
FORMER_VALUES = {("shard_optimizer", False): "none", ("shard_optimizer", True): "optimizer"}
# What --dry_run and a run's config.json add to the flags, and what belongs to one command line alone
NOT_FROM_FILE = {"num_parameters", "dry_run", "config", "script", "plugins", "class_names"}


def run_script(script: str, run: str, argv: Sequence[str] | None = None, usage: str = "") -> None:
    """Parse the command line of a script, then call `run` (`module:function`) with the configuration.

    torch is imported after --help has been answered. `cm.runtime.job.run_main` ends the job in an orderly way.
    """

    def main() -> None:
        if isinstance(config, UserError):
            raise config
        resolve(run)(config)

    try:
        config = parse(SCRIPTS[script], argv, usage)
    except UserError as error:
        config = error
    from cm.runtime.job import run_main

    run_main(main)


def parse(config_class: type[ConfigType], argv: Sequence[str] | None = None, usage: str = "") -> ConfigType:
    """The configuration of a run: validated, with every path that the run needs; UserError on bad input.

    --help and --dry_run print what they promise and leave the program with code 0.
    """
    config = parse_config(config_class, argv, usage)
    if config.dry_run:
        if isinstance(config, SampleConfig) and os.path.exists(config.model_path):
            config = resolve("cm.models.pretrained:as_loaded")(config)
        elif isinstance(config, SampleConfig) and config.sampler == "multistep":
            config = with_two_steps(config, {})
        elif isinstance(config, TrainConfig) and config.preset == AUTO:
            require_inputs(config)
            config = resolve("cm.commands.fit:fitted")(config)
        _print_once(json.dumps({**resolved(config), "num_parameters": _num_parameters(config)}, indent=2))
        sys.exit(0)
    require_inputs(config)
    return config


def parse_config(
    config_class: type[ConfigType], argv: Sequence[str] | None = None, usage: str = ""
) -> ConfigType:
    """The validated configuration of a command line; UserError on bad input. Reads --config and plug-ins only.

    usage: what --help calls the program; empty: the script.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    script = script_of(config_class)
    # First what chooses rows, since the rows bring flags of their own.
    first, _ = _given(build_parser(config_class, main=False), [a for a in argv if a not in ("-h", "--help")])
    file = read_file(first["config"]) if first.get("config") else {}
    plugins.load(str(first.get("plugin") or file.get("plugin") or ""))
    if "script" in file:
        file = _of_a_run(file, first["config"], script)
    from_preset = _preset_values({**file, **first}, script)
    chosen = {**from_preset, **_texts(file), **first}
    cls = configuration_class(config_class, chosen)
    parser = build_parser(cls)
    given, unknown = _given(parser, argv)
    if "help" in given:
        print(help_page(cls, given["help"], usage))
        sys.exit(0)
    if unknown:
        raise UserError(_unknown_flag(unknown[0], cls, chosen))
    # Where a row of the preset was replaced, the options of that row are no flags any more.
    own = flags_of(cls)
    from_preset = {n: value for n, value in from_preset.items() if n in own and not is_fixed(cls, n)}
    from_file = read_config(file, first.get("config", ""), cls)
    named = {**from_file, **given}
    explicit = {
        **_implied(from_preset, script),
        **from_preset,
        **_implied(named, script),
        **named,
    }
    config = cls(**explicit, explicit=frozenset(explicit))
    validate(config)
    return config


def _preset_values(named: Mapping[str, Any], script: str) -> dict[str, Any]:
    if named.get("preset", "") in ("", AUTO):
        return {}
    return presets.values(named["preset"], named.get("variant", "release"), script)


def _implied(values: Mapping[str, Any], script: str) -> dict[str, Any]:
    """Flags that a chosen preconditioning goes with."""
    name = values.get("precond", "")
    return PRECONDS[name].implied(script) if name in PRECONDS else {}


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Those values that can be names of rows."""
    return {name: value for name, value in values.items() if isinstance(value, str)}


def read_file(path: str) -> dict[str, Any]:
    """The content of a --config file: JSON, YAML by its ending, or what a run wrote (also its directory)."""
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    try:
        text = read_regular(path, JSON_LIMIT).decode()
        content = _yaml(text, path) if path.endswith((".yaml", ".yml")) else parse_json(text, path, object)
    except UserError as error:
        raise UserError(f"--config: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold one JSON object")
    for name in ("preset", "variant", "plugin", "script"):  # they choose what all other names mean
        if problem := misfit(content, {name: str}):
            raise UserError(f"--config {path}: {problem}")
    return content


def _yaml(text: str, path: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise UserError(f"{path} needs PyYAML: {extra('yaml')}") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _of_a_run(content: dict[str, Any], path: str, script: str) -> dict[str, Any]:
    """The flags of a run's config.json. Its place is not taken over, and a grid that it ended with is no flag of it."""
    if content["script"] != script:
        raise UserError(f"--config {path} is of {content['script']}, not of {script}")
    own = flags_of(configuration_class(SCRIPTS[script], _texts(content)))
    derived = {"training_mode", "steps"} - set(own)
    return {name: value for name, value in content.items() if name not in {*derived, "out_dir"}}


def read_config(content: Mapping[str, Any], path: str, cls: type[Config]) -> dict[str, Any]:
    """Flags from a JSON object as --dry_run prints it; unknown names and wrong types are a UserError."""
    flags, values = flags_of(cls), {}
    for name, value in content.items():
        if name in NOT_FROM_FILE or name in FORMER or (RENAMED.get(name, "") is None and not value):
            continue
        if new := RENAMED.get(name):
            value = f"{value:g}" if isinstance(value, float) else FORMER_VALUES.get((name, value), value)
            name = new
        if name in flags:
            values[name] = _converted(name, value, type(flags[name].default), path)
            continue
        others = [f for _, _, f in other_rows(cls) if f.name == name]
        if not any(value == f.default or value == str(f.default) for f in others):
            hint = nearest(name, flags) if not others else f": it is {_whose(name, cls, content)}"
            raise UserError(f"--config {path}: unknown flag {name}{hint}")
    return values


def _converted(name: str, value: Any, kind: type, path: str) -> Any:
    """A JSON value as the flag's type; text is read as on the command line, whole numbers may be floats."""
    try:
        if isinstance(value, str):
            return str2bool(value) if kind is bool else kind(expanded(value))
        if type(value) is kind or (kind is float and type(value) is int):
            return kind(value)
    except ValueError:
        pass
    raise UserError(f"--config {path}: {name} must be {METAVARS[kind]}, got {reprlib.repr(value)}")


def _num_parameters(config: Config) -> int:
    """Parameters of the configured network, without making any of them."""
    from cm.models.factory import create_network
    from cm.storage.shapes import shapes_only

    with shapes_only():
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


def _given(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(name -> value of the flags on the command line, what the parser does not know)."""
    namespace, unknown = parser.parse_known_args(argv)
    return {name: expanded(value) for name, value in vars(namespace).items()}, unknown


def _unknown_flag(word: str, cls: type[Config], chosen: Mapping[str, Any]) -> str:
    """What to say of an argument that is no flag of this configuration."""
    name = word.lstrip("-").partition("=")[0]
    if (new := RENAMED.get(name)) in flags_of(cls):
        return f"--{name} is called --{new} now"
    if whose := _whose(name, cls, chosen):
        return f"--{name} is {whose}"
    hint = nearest(name, flags_of(cls), prefix="--") if word.startswith("--") else ""
    return f"unknown argument {word}{hint}"


def _whose(name: str, cls: type[Config], chosen: Mapping[str, Any]) -> str:
    """`for --sampler pc, not for heun` for an option of a row that was not chosen; empty for others."""
    found: dict[str, list[str]] = {}
    for flag, row, f in other_rows(cls):
        if f.name == name:
            found.setdefault(flag, []).append(row)
    flags = flags_of(cls)
    return "; ".join(
        f"for --{flag} {' or '.join(rows)}, not for {chosen.get(flag, flags[flag].default)}"
        for flag, rows in found.items()
    )


def other_rows(cls: type[Config]) -> list[tuple[str, str, Field]]:
    """(flag that chooses, row, option) of every option that is no flag of this configuration."""
    flags = flags_of(cls)
    return [
        (flag, row_name, option)
        for flag, field in flags.items()
        if (registry := meta_of(field).registry) is not None
        for row_name in meta_of(field).names
        if (options := registry[row_name].options) is not None
        for option in flags_of(options).values()
        if option.name not in flags
    ]


def build_parser(cls: type[Config], *, main: bool = True) -> argparse.ArgumentParser:
    """Parser with one flag per field; it returns only what was given. main False: values are not converted yet."""
    parser = _Parser(
        prog=script_of(cls), add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("-h", "--help", nargs="?", const="main", choices=("main", "all"))
    for name, field in flags_of(cls).items():
        kind = type(field.default)
        convert = str if not main else _bool_argument if kind is bool else kind
        parser.add_argument(f"--{name}", type=convert, metavar=METAVARS[kind])
    return parser


def help_page(cls: type[Config], which: str, usage: str = "") -> str:
    """The text of --help: the main flags, or all, grouped as the classes group them."""
    parser = argparse.ArgumentParser(
        prog=script_of(cls),
        description=cls.__doc__,
        usage=f"{usage or '%(prog)s'} [--FLAG VALUE ...]",
        add_help=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
    )
    groups = {}
    for name, field in flags_of(cls).items():
        if which == "all" or meta_of(field).main:
            title = _group_title(cls, name)
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            metavar = METAVARS[type(field.default)]
            groups[title].add_argument(f"--{name}", metavar=metavar, help=help_text(field).replace("%", "%%"))
    parser.epilog = "--help all shows every flag." if which == "main" else _help_on_others(cls)
    return parser.format_help()


def _help_on_others(cls: type[Config]) -> str:
    """Which rows bring further flags."""
    found: dict[str, list[str]] = {}
    for flag, row, f in other_rows(cls):
        found.setdefault(f"--{flag} {row}", []).append(f.name)
    parts = [f"{choice}: {', '.join(names)}" for choice, names in found.items()]
    return f"Further flags come with {'; '.join(parts)}." if parts else ""


def _bool_argument(text: str) -> bool:
    try:
        return str2bool(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _group_title(cls: type[Config], name: str) -> str:
    """Heading of the class that first declares a flag; a script's own flags have the script's."""
    owner = next(c for c in reversed(cls.__mro__) if name in getattr(c, "__annotations__", {}))
    return script_of(cls) if owner in SCRIPTS.values() else owner.__doc__
