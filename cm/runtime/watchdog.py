"""Heartbeat and watchdog: every rank says which step and phase it is in; one that dies or is stuck ends the job.

Each rank keeps a small file in <run>/heartbeats, rewritten in place by a thread. The same thread watches the ranks of
its own node, whose deaths the system reports at once, and the time that the main thread spends in a phase. What it
finds goes to status.json and to the screen; the files stay for the next start and for the doctor.
"""

import contextlib
import dataclasses
import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cm.errors import BadNumbers, UserError, masked
from cm.runtime import distributed, job, liveness, logger
from cm.runtime.liveness import describe_last_run, furthest_behind, read_beats
from cm.runtime.platform import SEES_ENDS

INTERVAL = 0.2
# Two looks at the clock that are further apart count as this many seconds: a process that was stopped, or whose machine
# slept, is not stuck.
ASLEEP = 5.0
RECORD_BYTES = 1024


class Heartbeat:
    """Signs of life of this rank in a with block; every rank of the job enters it.

    limits: seconds that a phase may take, by the name of its time-out (`cm.runtime.liveness.PHASES`).
    """

    def __init__(self, run_dir: str | os.PathLike, limits: dict[str, float], interval: float = INTERVAL):
        self.run_dir = Path(run_dir)
        self.limits = limits
        self.interval = interval
        self._now = self._seen = ("start", 0, time.time(), time.monotonic())
        self._spent, self._looked = 0.0, self._now[3]  # seconds of the phase that was seen last, and when
        self._main = threading.main_thread().ident

    def phase(self, name: str, step: int) -> None:
        """The main thread enters a phase (a key of `cm.runtime.liveness.PHASES`)."""
        self._now = (name, step, time.time(), time.monotonic())

    def __enter__(self) -> "Heartbeat":
        rank, host, pid = distributed.get_rank(), socket.gethostname(), os.getpid()
        self._self = liveness.Beat(rank, distributed.get_world_size(), host, pid, liveness.process_birth(pid))
        distributed.on_main(self._prepare)  # after it, the folder is there for all
        peers = distributed.all_gather_object(self._self)
        with self._writable():
            self._file = open(liveness.folder(self.run_dir) / f"rank_{rank:04d}.json", "wb", buffering=0)
        self._write(self._beat())
        distributed.barrier()  # the watch reads all files
        self._peers = liveness.watch_ends(peer for peer in peers if peer.rank != rank)
        self._node_watch = _start_node_watch(self.run_dir, [p for p in peers if p.host == host])
        self._stopped, self._stop = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _trace: Any) -> None:
        self._stop.send(b".")
        self._thread.join()
        ended = "finished" if error is None else masked(f"{kind.__name__}: {error}").splitlines()[0][:300]
        self._write(dataclasses.replace(self._beat(), ended=ended))
        if self._node_watch is not None:
            self._node_watch.kill()
            self._node_watch.wait()
        for opened in (self._file, self._stop, self._stopped):
            opened.close()
        for descriptor in self._peers:
            os.close(descriptor)

    def _prepare(self) -> None:
        folder = liveness.folder(self.run_dir)
        with self._writable():
            folder.mkdir(exist_ok=True)
            for old in folder.glob("rank_*.json"):
                old.unlink()

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = error.filename or self.run_dir
            raise UserError(f"cannot write heartbeats to {path}: {error.strerror or error}") from None

    def _beat(self) -> liveness.Beat:
        phase, step, since, began = self._now
        where, waiting = "", False
        if time.monotonic() - began > 0.5 * self._limit(phase):
            where, waiting = _where(self._main)
        return dataclasses.replace(
            self._self, step=step, phase=phase, since=since, time=time.time(), where=where, waiting=waiting
        )

    def _limit(self, phase: str) -> float:
        return self.limits[liveness.PHASES[phase][1]]

    def _write(self, beat: liveness.Beat) -> None:
        record = json.dumps(dataclasses.asdict(beat)).encode()
        with contextlib.suppress(OSError):  # a full disk or a lost mount is the saver's to report
            self._file.seek(0)
            self._file.write(record[: RECORD_BYTES - 1].ljust(RECORD_BYTES - 1) + b"\n")

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._stopped, *self._peers], [], [], self.interval)
            if self._stopped in ready:
                return
            for descriptor in ready:
                if lost := liveness.record_death(self.run_dir, self._peers.pop(descriptor)):
                    job.end_job(1, f"error: {lost}\n")
                os.close(descriptor)
            self._write(self._beat())
            self._check_time()

    def _check_time(self) -> None:
        now, entered = time.monotonic(), self._now
        phase, step, _, began = entered
        if entered is not self._seen:
            self._seen, self._spent, self._looked = entered, 0.0, began
        self._spent += min(now - self._looked, ASLEEP)
        self._looked, limit = now, self._limit(phase)
        if self._spent > limit:
            culprit = liveness.furthest_behind(liveness.read_beats(self.run_dir)) or self._beat()
            flag = liveness.PHASES[phase][1]
            text = f"no progress for {limit:g} s (--{flag}) at step {step}; furthest behind is {culprit}"
            liveness.record(self.run_dir, liveness.STUCK, text, culprit)
            job.end_job(1, f"error: {text}\n")


def _start_node_watch(run_dir: Path, ranks: list[liveness.Beat]) -> subprocess.Popen | None:
    """On the first of several ranks of a node: a process that sees which of them dies first.

    Launchers kill the other ranks so fast that none of them is left to say it. The process is out of their reach, in a
    session of its own, and ends with the last rank.
    """
    if not SEES_ENDS or len(ranks) == 1 or ranks[0].pid != os.getpid():
        return None
    package = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    names = [str(rank.rank) for rank in ranks]
    command = [sys.executable, "-m", "cm.runtime.liveness", str(run_dir.resolve()), *names]
    return subprocess.Popen(
        command, start_new_session=True, env={**os.environ, "PYTHONPATH": path}, **nowhere
    )


def _where(thread: int) -> tuple[str, bool]:
    """(innermost line of our code or of the user's, whether it waits for other ranks) of a running thread."""
    frame, waiting = sys._current_frames().get(thread), False
    while frame is not None:
        name = frame.f_code.co_filename
        installed = "site-packages" in name or name.startswith((sys.base_prefix, "<"))
        if not installed or name.startswith(str(Path(__file__).parents[1])):
            return f"{os.path.basename(name)}:{frame.f_lineno} {frame.f_code.co_name}", waiting
        waiting = waiting or "torch/distributed/" in name or "torch/autograd/" in name
        frame = frame.f_back
    return "", waiting


GRACE = 2.0
# What `job.run_main` exits with; any other exception: 1
EXIT_CODES = {UserError: 2, KeyboardInterrupt: 130}
_BROKEN_CONNECTION = re.compile(r"gloo|nccl|connection (closed|reset)|socket", re.IGNORECASE)


@contextlib.contextmanager
def supervised(run_dir: str, limits: dict[str, float]) -> Iterator[Heartbeat]:
    """Heartbeats within the body; an exception that leaves it is recorded in status.json. All ranks enter it.

    limits: see `Heartbeat`. An error of communication is told with the rank that the others waited for.
    """
    if distributed.is_main():
        if last := describe_last_run(run_dir):
            logger.log(f"the latest start of this run: {last}")
        try:
            liveness.clear_status(run_dir)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be removed: {error.strerror}") from None
    heartbeat = Heartbeat(run_dir, limits)
    try:
        with heartbeat:
            try:
                yield heartbeat
            except RuntimeError as error:
                _explain(error, run_dir)
                raise
    except BaseException as error:
        _record(error, run_dir)
        if isinstance(error, SystemExit) and distributed.get_world_size() > 1:
            # Ranks leave together, after this block: one that leaves within it leaves the others waiting.
            rank, code = distributed.get_rank(), error.code if isinstance(error.code, int) else 1
            job.end_job(code or 1, f"error: rank {rank} left training with exit code {code}\n")
        raise


def record_end(run_dir: str, ended: str, *, step: int, signal: str = "") -> int:
    """Say on the screen and in status.json why training ended in good order; returns the exit code.

    ended: as `cm.runtime.liveness` names it. signal: the one this rank has received, if any.
    """
    finished = ended == liveness.FINISHED
    code = 0 if finished else liveness.EXIT_UNFINISHED
    if distributed.is_main():
        liveness.write_status(run_dir, ended, exit_code=code, message=signal, step=step)
    causes = {liveness.PREEMPTED: signal or "another rank", liveness.TIME: "the time limit (--max_hours)"}
    how = f"stopped by {causes[ended]}" if ended in causes else ended
    again = "" if finished else "; the same command goes on"
    logger.log(f"{how} at step {step}; checkpoints are in {run_dir}/checkpoints{again}")
    return code


def _explain(error: RuntimeError, run_dir: str) -> None:
    """Turn an error of communication into a UserError that names the rank that the others waited for.

    Likewise the end of a data worker, which torch reports from a signal, wherever the main thread is.
    """
    if lost := job.lost_worker(error):
        raise lost from None
    if distributed.get_world_size() == 1 or not _BROKEN_CONNECTION.search(f"{type(error).__name__} {error}"):
        return
    # On the node of a dead rank the heartbeat knows more, and ends the job within this time.
    time.sleep(GRACE)
    behind = furthest_behind(read_beats(run_dir))
    cause = str(error).strip().splitlines()[0][:200]
    raise UserError(f"lost contact with the other ranks ({cause}); furthest behind is {behind}") from error


def _record(error: BaseException, run_dir: str) -> None:
    error = job.signal_behind(error) or error
    ended = liveness.BAD_NUMBERS if isinstance(error, BadNumbers) else liveness.ERROR
    code = next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)
    message = f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    liveness.write_status(run_dir, ended, exit_code=code, message=message, rank=distributed.get_rank())
