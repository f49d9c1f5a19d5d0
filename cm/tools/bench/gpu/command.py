"""Everything that only a GPU can show, in order of worth, each part with its own time limit.

bash scripts/gpu_report.sh [--minutes 8] [--device cuda] [--tiny] [--data STORE] [--original CHECKOUT] [--out DIR]
                           [--parts NAME ...]

Parts run in a process of their own, which is replaced when it fails, hangs or runs out of its time. After every row
the files are written anew: gpu_PART.json, gpu_report.json (what became of each part) and gpu_report.md (the page).
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict, replace
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cm.config.parsing import expanded
from cm.config.registry import resolve
from cm.errors import UserError

MINUTES = 8.0  # of the report that the parts' limits are written for
PARTS = "cm.tools.bench.gpu.parts:PARTS"
TINY_MINUTES = 3.0
LEAST = 20.0  # seconds of a part's limit, however short the report
START = 120.0  # seconds in which a process must begin


class Worker:
    """A process that measures parts, one after another. source: `module:name` of the table of parts."""

    def __init__(self, setup: Any, source: str = PARTS, *, describe: bool = True):
        # Forked from a server that has imported torch but has not touched the GPU: a new worker costs no imports.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([source.partition(":")[0]])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, setup, source, describe), daemon=False)
        self.process.start()
        theirs.close()
        if not self.connection.poll(START):
            raise UserError(f"no process could be started within {START} s")
        self.environment = self.connection.recv()

    def end(self) -> None:
        """End the process and what it has started."""
        if self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its group yet
                self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, setup: Any, source: str, describe: bool) -> None:
    os.setsid()
    from cm.tools.profiling.report import environment

    parts = resolve(source)
    connection.send(environment(_device(setup.device)) if describe else {})
    while True:
        name, seconds = connection.recv()
        try:
            for row in parts[name].run(replace(setup, seconds=seconds)):
                connection.send(("row", asdict(row)))
        except BaseException:  # told to the page; the next part gets a new process
            connection.send(("failed", traceback.format_exc()))
            return
        connection.send(("done", ""))


def _device(name: str) -> Any:
    from cm.models.factory import choose_device

    return choose_device(name)


class Report:
    """The files of the report, written anew after every change. states: part -> what became of it."""

    def __init__(self, out: str, parts: dict[str, Any], *, tiny: bool = False):
        self.parts = parts
        self.out = Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.tiny = tiny
        self.environment: dict[str, Any] = {}
        self.rows: dict[str, list[dict]] = {}
        self.states: dict[str, dict[str, Any]] = {}

    def add_row(self, part: str, row: dict) -> None:
        """One row of a part."""
        self.rows.setdefault(part, []).append(row)
        from cm.tools.profiling.report import Report as Rows
        from cm.tools.profiling.report import Row

        rows = [Row(**row) for row in self.rows[part]]
        Rows(rows, self.environment).save(str(self.out / f"gpu_{part}.json"))
        self.write()

    def state(self, part: str, **what: Any) -> None:
        """What became of a part."""
        self.states[part] = what
        print(
            f"[{part}] {what['state']}, {what.get('seconds', 0):.0f} s {what.get('why', '')[-200:]}",
            flush=True,
        )
        self.write()

    def write(self) -> None:
        """The overview and the page."""
        from cm.tools.bench.gpu.page import page

        overview = {"environment": self.environment, "tiny": self.tiny, "parts": self.states}
        (self.out / "gpu_report.json").write_text(json.dumps(overview, indent=1) + "\n")
        (self.out / "gpu_report.md").write_text(page(self, tiny=self.tiny))


def run_parts(setup: Any, report: Report, names: list[str], minutes: float, source: str = PARTS) -> None:
    """Every part in turn, within its own limit and the whole report's; what is not reached is said."""
    deadline = time.monotonic() + 60 * minutes
    worker = None
    try:
        for name in names:
            part, left = report.parts[name], deadline - time.monotonic()
            missing = [package for package in part.needs if find_spec(package) is None]
            limit = min(max(part.seconds * minutes / MINUTES, LEAST), left)
            if part.gpu_only and setup.device != "cuda":
                report.state(name, state="skipped", why=part.gpu_only)
                continue
            if missing:
                report.state(name, state="skipped", why=f"needs {', '.join(missing)}")
                continue
            if limit < min(2.0, LEAST):
                report.state(name, state="not reached", why="the report's time was up")
                continue
            if worker is None:
                worker = Worker(setup, source, describe=not report.environment)
                report.environment = report.environment or worker.environment
            start = time.monotonic()
            state, why = _run_part(worker, report, name, start + limit, limit)
            report.state(name, state=state, seconds=round(time.monotonic() - start, 1), why=why)
            if state != "done":
                worker.end()
                worker = None
    finally:
        if worker is not None:
            worker.end()


def _run_part(worker: Worker, report: Report, name: str, until: float, limit: float) -> tuple[str, str]:
    """(state, why) of one part; its rows are written as they come."""
    try:
        worker.connection.send((name, limit))
        while worker.connection.poll(max(0.0, until - time.monotonic())):
            kind, content = worker.connection.recv()
            if kind == "row":
                report.add_row(name, content)
            else:
                return kind, content
    except (EOFError, OSError):
        worker.process.join(10)
        return "failed", f"the process ended (exit code {worker.process.exitcode})"
    return "out of time", f"its limit is {limit:.0f} s"


def main(args: argparse.Namespace) -> int:
    """The whole report; 1 where a part failed."""
    from cm.tools.bench.gpu.parts import Setup

    parts = resolve(PARTS)
    if unknown := [name for name in args.parts if name not in parts]:
        raise UserError(f"--parts {' '.join(unknown)}: choose from {', '.join(parts)}")
    if args.original and not Path(args.original, "cm").is_dir():
        raise UserError(f"--original {args.original}: no folder cm in it")
    device = _device(args.device).type
    out = args.out or ("docs/benchmarks" if device == "cuda" and not args.tiny else "runs/gpu_report")
    report = Report(out, parts, tiny=args.tiny)
    setup = Setup(device, args.tiny, args.original, args.data)
    run_parts(setup, report, args.parts or list(parts), args.minutes)
    print(f"written: {Path(out, 'gpu_report.md')}")
    return int(any(state["state"] == "failed" for state in report.states.values()))


def program() -> None:
    """The whole program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=0.0, help="time of the report; 0: 8, tiny 3")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="networks of seconds, to try the report itself")
    parser.add_argument("--data", default="", help="prepared images for the learning run; else drawn discs")
    parser.add_argument("--original", default="", help="a checkout of the original repository, for its step")
    parser.add_argument("--parts", nargs="+", default=[], help="these only; default: all, in order of worth")
    parser.add_argument(
        "--out", type=expanded, default="", help="folder of the files; on a GPU docs/benchmarks"
    )
    args = parser.parse_args()
    if args.minutes < 0:
        parser.error("--minutes must be 0 or more")
    args.minutes = args.minutes or (TINY_MINUTES if args.tiny else MINUTES)
    # A worker that was killed leaves semaphores behind, of which Python would warn at the end.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from cm.runtime.job import run_main

    run_main(lambda: sys.exit(main(args)))


if __name__ == "__main__":
    program()
