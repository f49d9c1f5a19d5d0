"""`cm completion SHELL`: a completion script of the command `cm`, made by shtab (extra `completion`)."""

import argparse
import sys

from cm.config.fields import flags_of, meta_of
from cm.config.scripts import SCRIPTS, configuration_class

# Sub-commands that are scripts with a configuration
SCRIPT_OF = {
    "train": "edm_train",
    "distill": "cm_train",
    "sample": "image_sample",
    "edit": "image_edit",
    "search": "ternary_search",
    "likelihood": "likelihood",
}


def parser() -> argparse.ArgumentParser:
    """Every sub-command with its flags and their choices, for completion only."""
    import shtab

    from cm.commands.main import COMMANDS

    top = argparse.ArgumentParser(prog="cm")
    commands = top.add_subparsers()
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.help)
        sub.add_argument("paths", nargs="*").complete = shtab.FILE
        if name in SCRIPT_OF:
            for flag, field in flags_of(configuration_class(SCRIPTS[SCRIPT_OF[name]], {})).items():
                meta = meta_of(field)
                choices = [c for c in meta.names if c] or None
                choices = ["True", "False"] if isinstance(field.default, bool) else choices
                option = sub.add_argument(f"--{flag}", help=meta.help.replace("%", "%%"), choices=choices)
                if not choices and flag.endswith(("_dir", "_path", "config", "input")):
                    option.complete = shtab.FILE
    return top


def program() -> None:
    """The whole program."""
    try:
        import shtab
    except ImportError:
        _end("cm completion needs shtab: pip install 'consistency-models[completion]'")
    shell = sys.argv[1] if len(sys.argv) > 1 else ""
    if shell not in shtab.SUPPORTED_SHELLS:
        _end(
            f'usage: cm completion {{{",".join(shtab.SUPPORTED_SHELLS)}}}, such as: eval "$(cm completion bash)"'
        )
    print(shtab.complete(parser(), shell))


def _end(text: str) -> None:
    sys.stderr.write(f"error: {text}\n")
    raise SystemExit(2)
