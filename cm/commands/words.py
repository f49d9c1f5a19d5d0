"""What follows a sub-command of `cm` -> the script that it stands for, and that script's command line.

Leading words that are no flags are paths in a fixed order; everything else is passed on as it is. Imports no torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cm.commands.cli import read_file
from cm.config import plugins, presets
from cm.config.derived import AUTO
from cm.config.rows import OBJECTIVES
from cm.errors import UserError, choose
from cm.runtime.inputs import json_or_none

Line = tuple[str, list[str]]  # (script, command line)
PICTURE = 64  # images of a grid to look at


def leading(words: Sequence[str], *flags: str) -> list[str]:
    """The words with those in front written as the values of these flags, in order."""
    line = list(words)
    for flag in flags:
        if not line or line[0].startswith("-"):
            break
        value = line.pop(0)
        line += [f"--{flag}", value]
    return line


def value_of(line: Sequence[str], flag: str) -> str:
    """The value of a flag on a command line, by `--flag value` or `--flag=value`; the last counts; empty: not given."""
    found = ""
    for word, following in zip(line, [*line[1:], ""]):
        if word == f"--{flag}":
            found = following
        elif word.startswith(f"--{flag}="):
            found = word.partition("=")[2]
    return found


def without(line: Sequence[str], flag: str) -> list[str]:
    """The command line without a flag and its value."""
    kept, skip = [], False
    for word in line:
        if skip or word == f"--{flag}":
            skip = not skip
        elif not word.startswith(f"--{flag}="):
            kept.append(word)
    return kept


def train(words: Sequence[str]) -> Line:
    """`cm train DATA [--objective NAME]`: any objective without a teacher; EDM unless a preset says otherwise."""
    line = leading(words, "data_dir")
    name = _objective(line, "edm", needs_teacher=False)
    if OBJECTIVES[name].teacher:
        raise UserError(f"--objective {name} needs a teacher: cm distill RUN --objective {name}")
    return _training(line, name)


def distill(words: Sequence[str]) -> Line:
    """`cm distill RUN [DATA] [--objective NAME]`: any objective that needs a teacher; data as the teacher's."""
    line = leading(words, "teacher_model_path", "data_dir")
    name = _objective(line, "consistency_distillation", needs_teacher=True)
    if not OBJECTIVES[name].teacher:
        raise UserError(f"--objective {name} needs no teacher: cm train DATA --objective {name}")
    teacher = value_of(line, "teacher_model_path")
    asks = {"-h", "--help"} & set(line)
    if teacher and not asks and not (value_of(line, "data_dir") or _file(line).get("data_dir")):
        line += ["--data_dir", data_of(teacher, value_of(line, "plugin") or _file(line).get("plugin", ""))]
    return _training(line, name)


def _objective(line: Sequence[str], default: str, needs_teacher: bool) -> str:
    """The objective that a command line asks for: by --objective, --training_mode, its --config file or its preset."""
    file = _file(line)
    plugins.load(value_of(line, "plugin") or str(file.get("plugin", "")))
    offered = {n: row for n, row in OBJECTIVES.items() if row.teacher == needs_teacher}
    asked = {flag: value_of(line, flag) for flag in ("objective", "training_mode")}
    asked |= {"config": str(file.get("training_mode", ""))}
    for flag, name in asked.items():
        if name:
            choose(OBJECTIVES if name in OBJECTIVES else offered, name, f"--{flag}")
            return name
    name = value_of(line, "preset") or file.get("preset", "")
    if not name or name == AUTO:
        return default
    preset = presets.get(name)
    for script in ("edm_train", "classifier_train") if not needs_teacher else ():
        if script in preset.scripts:
            return next(n for n, row in OBJECTIVES.items() if row.script == script)
    if "cm_train" in preset.scripts:
        return preset.values("cm_train", "release").get("training_mode", "consistency_distillation")
    return default


def _file(line: Sequence[str]) -> dict[str, Any]:
    """What the --config file of a command line says; empty without one."""
    path = value_of(line, "config")
    return read_file(path) if path else {}


def _training(line: Sequence[str], objective: str) -> Line:
    """The script of an objective and its command line."""
    script = OBJECTIVES[objective].script
    line = without(without(line, "objective"), "training_mode")
    if not value_of(line, "preset") and "preset" not in _file(line):
        line = [*line, "--preset", AUTO]
    return script, [*line, "--training_mode", objective] if script == "cm_train" else line


def data_of(run: str, plugin: str = "") -> str:
    """The data that a run was trained on, by its config.json; UserError where that cannot be known.

    plugin: what --plugin names now. A plug-in that the run names is not loaded unasked: it is code.
    """
    stored = json_or_none(Path(run, "config.json")) or {}
    data, needs = stored.get("data_dir"), stored.get("plugin")
    if isinstance(data, str):
        if needs and not plugin and not Path(data).exists():
            raise UserError(
                f"{run} was trained on {data} with --plugin {needs}: give --plugin {needs}, or cm distill RUN DATA"
            )
        return data
    raise UserError(f"{run} does not say which data it was trained on: cm distill RUN DATA")


def sample(words: Sequence[str]) -> Line:
    """`cm sample RUN`: a picture's worth of images, where the script draws as many as a published FID needs."""
    line = leading(words, "model_path")
    if not any(value_of(line, flag) for flag in ("num_samples", "preset", "config")):
        line += ["--num_samples", str(PICTURE)]
    return "image_sample", line


def edit(words: Sequence[str]) -> Line:
    """`cm edit TASK [RUN [INPUT]]`."""
    return "image_edit", leading(words, "task", "model_path", "input")


def search(words: Sequence[str]) -> Line:
    """`cm search RUN REFERENCE`; what it finds is kept in a run, where sampling looks for it."""
    line = leading(words, "model_path", "ref_batch")
    run = Path(value_of(line, "model_path"))
    if not value_of(line, "out_dir") and (run / "checkpoints").is_dir():
        line += ["--out_dir", str(run / "search")]
    return "ternary_search", line


def likelihood(words: Sequence[str]) -> Line:
    """`cm likelihood RUN DATA`."""
    return "likelihood", leading(words, "model_path", "data_dir")
