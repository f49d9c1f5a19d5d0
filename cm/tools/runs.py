"""Training runs below a folder, the newest first: `python -m cm.tools.runs [DIR] [--json]`. Imports no torch."""

import argparse
import json
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cm.config.parsing import expanded
from cm.config.scripts import SCRIPTS
from cm.config.stored import checked
from cm.errors import UserError, one_line
from cm.runtime import liveness
from cm.runtime.inputs import listed, misfit, read_json, read_json_lines

CONFIG, LOG = "config.json", "progress.jsonl"
# Folders below DIR in which runs are looked for
DEPTH = 3
# Folders that hold many files and never a run
PASSED_OVER = {"checkpoints", "previews", "heartbeats"}
# A rank on another host that wrote within this time is taken to be alive (seconds).
FRESH = 120.0
RUNNING = "running"
# The run stands last: its name may be long. Columns of numbers are flush right.
COLUMNS = ("step", "loss", "images/s", "FID", "NFE", "status", "age", "preset", "run")
NUMBERS = 5
UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


@dataclass(frozen=True)
class Run:
    """A run directory as it is now; the run may be going on. rows: what the log holds, oldest first."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def step(self) -> int:
        """Steps done, as far as the log tells."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def total(self) -> int:
        """Step at which the run ends; 0 where nothing limits it."""
        return int(self.config.get("total_training_steps") or self.config.get("lr_anneal_steps") or 0)

    @property
    def mode(self) -> str:
        """The objective, as --training_mode names it."""
        return self.config.get("training_mode", "")

    @cached_property
    def status(self) -> str:
        """running, lost, new, or how the run ended."""
        if ended := liveness.read_status(self.path):
            return ended["ended"]
        beats = liveness.read_beats(self.path)
        here, now = socket.gethostname(), time.time()
        if any(liveness.is_alive(b) or (b.host != here and now - b.time < FRESH) for b in beats):
            return RUNNING
        return liveness.LOST if beats else "new"

    @cached_property
    def written(self) -> float:
        """When the run last wrote to its log, or began (seconds since 1970)."""
        log = self.path / LOG
        return (log if log.exists() else self.path / CONFIG).stat().st_mtime

    def last(self, key: str) -> float | None:
        """The newest value of a column that is a number."""
        values = (row.get(key) for row in reversed(self.rows))
        return next((v for v in values if isinstance(v, int | float)), None)

    def checkpoints(self) -> list[Path]:
        """Folders of the complete checkpoints, oldest first."""
        return [p for p in listed(self.path / "checkpoints", "step_*") if (p / "manifest.json").exists()]


def read_run(path: str | Path) -> Run:
    """A run directory; UserError where it is none, or one that this version cannot read."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is a file, no run directory" if path.exists() else f"{path}: no such folder")
    if not (path / CONFIG).is_file():
        hint = f"; the runs in it: {', '.join(map(str, runs))}" if (runs := list(find_runs(path))[:3]) else ""
        raise UserError(f"{path} is no run directory: it has no {CONFIG}{hint}")
    config = _json(path / CONFIG)
    if misfit(config, {"script": str}) or config.get("script") not in SCRIPTS:
        raise UserError(
            f"{path / CONFIG} is not of a training run of this version: it names no script that is known"
        )
    return Run(path, checked(config, str(path / CONFIG)), list(_rows(path / LOG)))


def find_runs(folder: str | Path) -> Iterator[Path]:
    """Every run directory in a folder, the folder included, and not those inside of runs."""
    yield from _below(Path(folder), DEPTH)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        is_run = (folder / CONFIG).is_file() and ((folder / LOG).exists() or liveness.folder(folder).is_dir())
        inside = sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in PASSED_OVER)
    except OSError:  # a folder that this user may not read
        return
    if is_run:
        yield folder
    elif depth:
        for path in inside:
            yield from _below(path, depth - 1)


def _json(path: Path) -> Any:
    try:
        return read_json(path, object)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _rows(log: Path) -> Iterator[dict[str, Any]]:
    """Rows with a step. A line that is still being written, or was torn by a crash, is passed over."""
    if not log.exists():
        return
    for row in read_json_lines(log):
        if isinstance(row.get("step"), int | float):
            yield row


def since(seconds: float) -> str:
    """A length of time in its largest unit: `5 min`."""
    unit, size = next((u for u in UNITS if seconds >= u[1]), UNITS[-1])
    return f"{seconds / size:.0f} {unit}"


def number(value: float | None) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"


def summary(run: Run, best: tuple[float, int] | None = None) -> dict[str, Any]:
    """What the list says of a run, as plain JSON. best: (FID, network evaluations) of its best samples."""
    return {
        "run": str(run.path),
        "preset": run.config.get("preset") or run.mode,
        "step": run.step,
        "total": run.total,
        "loss": run.last("loss"),
        "images/s": run.last("images_per_sec"),
        "fid": best[0] if best else None,
        "nfe": best[1] if best else None,
        "status": run.status,
        "age": time.time() - run.written,
    }


def table(found: list[dict[str, Any]], folder: str | Path) -> str:
    """The list as text, with names as they are in the folder."""
    rows = [COLUMNS]
    for s in found:
        steps = f"{s['step']:,}" + (f" / {s['total']:,}" if s["total"] else "")
        name = os.path.relpath(s["run"], folder)
        numbers = (steps, *(number(s[key]) for key in ("loss", "images/s", "fid", "nfe")))
        rows.append((*numbers, s["status"], since(s["age"]), s["preset"], s["run"] if name == "." else name))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(f"{cell:{'><'[i >= NUMBERS]}{w}}" for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the runs below a folder."""
    parser = argparse.ArgumentParser(
        prog="cm runs", description="Training runs below a folder, the newest first."
    )
    parser.add_argument(
        "folder", metavar="DIR", type=expanded, nargs="?", default="runs", help="default: runs"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    options = parser.parse_args(argv)
    if not Path(options.folder).is_dir():
        raise UserError(f"{options.folder}: no such folder (cm runs DIR lists the runs in DIR)")
    os.listdir(options.folder)  # what lies in it may be passed over, but not the whole
    from cm.tools.findings import best_fid, find_results  # it reads runs by this module

    found, unread, known = [], [], {}
    for path in find_runs(options.folder):
        try:
            run = read_run(path)
            best = best_fid(find_results(run, known=known))
            found.append(summary(run, (best.metrics["fid"], best.nfe) if best else None))
        except (UserError, OSError) as error:  # of one run; the others are listed
            unread.append(f"note: {said(error)}")
    found.sort(key=lambda s: s["age"])
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join([table(found, options.folder) if found else f"no run in {options.folder}", *unread]))


def program(argv: Sequence[str] | None = None) -> None:
    """The command: a mistake is one line and exit code 2."""
    try:
        main(argv)
    except (UserError, OSError) as error:  # a name that is too long, a mount that went away
        print(f"error: {said(error)}", file=sys.stderr)
        sys.exit(2)


def said(error: UserError | OSError) -> str:
    """What a mistake or the machine says, in one line."""
    return one_line(f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error))


if __name__ == "__main__":
    program()
