"""The command `cm`: one sub-command per program. `cm` alone lists them, `cm NAME --help` explains one.

    cm prepare photos data/photos --image_size 64
    cm train data/photos --out_dir runs/teacher
    cm distill runs/teacher --out_dir runs/student
    cm sample runs/student --num_samples 64

The scripts of the repository are the same programs under the names of the published command lines. `python -m cm` is
the same as `cm`, for launchers that start modules. Imports no torch.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cm import __version__
from cm.commands.cli import run_script
from cm.config.registry import resolve
from cm.errors import UserError, nearest
from cm.runtime.streams import lasting_streams


@dataclass(frozen=True)
class Command:
    """One sub-command. run: `module:function`, a program without arguments that reads sys.argv.

    words: `module:function`, where the program is a script with a configuration: what follows the sub-command ->
    (script, its command line); run is then handed the configuration. usage: its paths, for --help. ends_job: the
    program ends the job by itself.
    """

    help: str
    run: str
    words: str = ""
    usage: str = ""
    ends_job: bool = False


WORDS = "cm.commands.words"
COMMANDS: dict[str, Command] = {
    "prepare": Command("images of any kind -> a training set", "cm.commands.prepare:program", ends_job=True),
    "inspect": Command("what a data set holds: sizes, classes, damage", "cm.data.inspect:main"),
    "train": Command(
        "train a model that needs no teacher; by default a teacher (EDM)",
        "cm.commands.train:run_train",
        f"{WORDS}:train",
        "DATA [--objective NAME]",
    ),
    "distill": Command(
        "train a consistency model from a teacher (CD)",
        "cm.commands.train:run_train",
        f"{WORDS}:distill",
        "RUN [DATA] [--objective NAME]",
    ),
    "sample": Command("draw images", "cm.commands.sample:run_image_sample", f"{WORDS}:sample", "RUN"),
    "edit": Command(
        "inpaint, colorize, superres, stroke, denoise, interpolate",
        "cm.commands.edit:run_image_edit",
        f"{WORDS}:edit",
        "TASK [RUN [INPUT]]",
    ),
    "search": Command(
        "find the time points of multistep sampling",
        "evaluations.search:run_search",
        f"{WORDS}:search",
        "RUN REFERENCE",
    ),
    "likelihood": Command(
        "bits per dimension of images",
        "cm.commands.likelihood:run_likelihood",
        f"{WORDS}:likelihood",
        "RUN DATA",
    ),
    "evaluate": Command("FID and other metrics of samples", "evaluations.evaluator:main"),
    "reference": Command("statistics that samples are compared with", "evaluations.reference:main"),
    "classifier": Command(
        "train a small classifier of labelled images, as the features of cm evaluate",
        "evaluations.small_classifier:main",
    ),
    "report": Command(
        "one page of a run, or of several compared: curves, images, metrics",
        "evaluations.reports.run_report.command:main",
    ),
    "runs": Command(
        "training runs below a folder: state, loss, speed", "cm.tools.runs:program", ends_job=True
    ),
    "demo": Command("a page to try a model in the browser", "cm.tools.demo:main"),
    "convert": Command(
        "checkpoints from and to other frameworks", "cm.tools.convert.command:program", ends_job=True
    ),
    "average": Command(
        "an average of the weights of any length, after training", "cm.tools.posthoc_ema:main"
    ),
    "plan": Command(
        "memory and time of a run beforehand", "cm.tools.planning.command:program", ends_job=True
    ),
    "benchmark": Command("speed and memory on this machine", "cm.tools.bench.command:program", ends_job=True),
    "doctor": Command("is this machine ready? how did a run end?", "cm.tools.doctor:main"),
    "presets": Command(
        "named experiments with their results", "cm.config.presets.__main__:main", ends_job=True
    ),
    "completion": Command(
        "print a completion script for bash, zsh or tcsh", "cm.commands.completion:program", ends_job=True
    ),
}


def overview() -> str:
    """What `cm --help` prints."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: cm COMMAND [ARGUMENTS ...]", "", *rows, "", "cm COMMAND --help explains a command."]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The program `cm`. What it prints may be cut off: `cm presets | head`, a full disk."""
    with lasting_streams():
        _main(sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> None:
    name, *rest = [*argv] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
    elif name in ("--version", "-V"):
        print(f"cm {__version__}")
    elif name in COMMANDS:
        run(name, rest)
    else:
        _in_a_job(lambda: _refuse(name))


def run(name: str, rest: Sequence[str]) -> None:
    """One sub-command with what follows it."""
    command = COMMANDS[name]
    sys.argv = [f"cm {name}", *rest]
    if command.words:
        try:
            script, line = resolve(command.words)(list(rest))
        except UserError as error:
            problem = error
            _in_a_job(lambda: _raise(problem))
            return
        run_script(script, command.run, line, f"cm {name} {command.usage}")
    elif command.ends_job:
        resolve(command.run)()
    else:
        _in_a_job(resolve(command.run))


def _in_a_job(program: Callable[[], object]) -> None:
    # torch comes with it
    importlib.import_module("cm.runtime.job").run_main(program)


def _refuse(name: str) -> None:
    raise UserError(f"cm {name}: no such command{nearest(name, COMMANDS)} (cm --help lists all)")


def _raise(error: UserError) -> None:
    raise error
