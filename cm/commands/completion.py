"""`cm completion SHELL`: a completion script of the command `cm`, made by shtab (extra `completion`)."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import Field
from unittest import mock

from cm.commands.cli import other_rows
from cm.config import presets
from cm.config.derived import AUTO
from cm.config.fields import flags_of, meta_of
from cm.config.registry import resolve
from cm.config.rows import OBJECTIVES
from cm.config.scripts import SCRIPTS, configuration_class
from cm.errors import extra

# Sub-commands that are scripts with a configuration
SCRIPTS_OF = {
    "train": ("edm_train", "cm_train", "classifier_train"),
    "distill": ("cm_train",),
    "sample": ("image_sample",),
    "edit": ("image_edit",),
    "search": ("ternary_search",),
    "likelihood": ("likelihood",),
}
# Programs without flags
BARE = ("presets", "completion")
# Whether the objectives of a sub-command need a teacher
TEACHER = {"train": False, "distill": True}


def parser() -> argparse.ArgumentParser:
    """Every sub-command with its flags and their choices, for completion only."""
    import shtab

    from cm.commands.main import COMMANDS

    top = argparse.ArgumentParser(prog="cm")
    commands = top.add_subparsers()
    for name, command in COMMANDS.items():
        if not command.words and name not in BARE and (own := _parser_of(command.run)):
            sub = commands.add_parser(name, help=command.help, parents=[own], add_help=False)
            for action in sub._actions:
                if action.choices:
                    action.choices = list(action.choices)  # shtab takes a mapping for sub-commands
                elif not action.option_strings:
                    action.complete = shtab.FILE
            continue
        sub = commands.add_parser(name, help=command.help)
        if name == "completion":
            sub.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
        elif name not in BARE:
            sub.add_argument("paths", nargs="*").complete = shtab.FILE
        if name in TEACHER:
            offered = [n for n, row in OBJECTIVES.items() if row.teacher == TEACHER[name]]
            sub.add_argument("--objective", help="what is trained", choices=offered)
        for flag, field in _flags(SCRIPTS_OF.get(name, ())):
            choices = _choices(flag, field)
            option = sub.add_argument(
                f"--{flag}", help=meta_of(field).help.replace("%", "%%"), choices=choices
            )
            if not choices and flag.endswith(("_dir", "_path", "config", "input")):
                option.complete = shtab.FILE
    return top


class _Found(Exception):
    """A parser that was about to parse."""


def _parser_of(run: str) -> argparse.ArgumentParser | None:
    """The parser of a program without a configuration; None where it has none, or needs a package that is missing."""

    def found(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Found(self)

    # Programs parse first of all, so that the parser is all that they make.
    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", found):
        try:
            resolve(run)()
        except _Found as parser:
            return parser.args[0]
        except ImportError:
            return None


def _flags(scripts: tuple[str, ...]) -> Iterator[tuple[str, Field]]:
    """The flags of some scripts and of all rows that those may name, each once."""
    found: dict[str, Field] = {}
    for script in scripts:
        cls = configuration_class(SCRIPTS[script], {})
        found = {**{option.name: option for _, _, option in other_rows(cls)}, **flags_of(cls), **found}
    yield from found.items()


def _choices(flag: str, field: Field) -> list[str] | None:
    if flag == "preset":
        return [AUTO, *presets.PRESETS]
    if isinstance(field.default, bool):
        return ["True", "False"]
    return [name for name in meta_of(field).names if name] or None


def program() -> None:
    """The whole program."""
    try:
        import shtab
    except ImportError:
        _end(f"cm completion needs shtab: {extra('completion')}")
    shell = sys.argv[1] if len(sys.argv) > 1 else ""
    if shell not in shtab.SUPPORTED_SHELLS:
        _end(
            f'usage: cm completion {{{",".join(shtab.SUPPORTED_SHELLS)}}}, such as: eval "$(cm completion bash)"'
        )
    print(shtab.complete(parser(), shell))


def _end(text: str) -> None:
    sys.stderr.write(f"error: {text}\n")
    raise SystemExit(2)
