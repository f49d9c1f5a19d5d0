"""A sign of life of every rank: who it is, which step and phase it is in. Ends the job when a rank dies or is stuck.

Each rank keeps a small file in <run>/heartbeats, rewritten every second by a thread. The same thread watches the ranks
of its own node, whose deaths the system reports at once, and the time that the main thread spends in a phase. What it
finds goes to status.json and to the screen; the files stay for the next start and for the doctor.
"""

import contextlib
import dataclasses
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cm import dist_util, status

INTERVAL = 1.0
RECORD_BYTES = 1024
# A rank whose last sign is this much older than the newest of all is silent: dead, frozen or cut off (seconds).
SILENT_AFTER = 5.0
# phase -> (what a rank does in it, which time-out limits it)
PHASES = {
    "start": ("starting up", "startup_timeout"),
    "first step": ("in its first step", "startup_timeout"),
    "data": ("reading data", "step_timeout"),
    "step": ("in a training step", "step_timeout"),
    "log": ("writing logs", "step_timeout"),
    "save": ("saving", "startup_timeout"),
    "preview": ("drawing a preview", "startup_timeout"),
    "end": ("ending", "startup_timeout"),
}


@dataclasses.dataclass(frozen=True)
class Beat:
    """One sign of life. `since` and `time`: when the phase began and when this was written (seconds since 1970)."""

    rank: int
    world_size: int
    host: str
    pid: int
    born: int  # start of the process in the system's ticks: tells it from a later one with its number
    step: int = 0
    phase: str = "start"
    since: float = 0.0
    time: float = 0.0
    where: str = ""  # innermost line of our code, once the phase takes long
    waiting: bool = False  # ... which waits for other ranks
    ended: str = ""  # how this rank ended, in its own words

    def __str__(self) -> str:
        doing = PHASES.get(self.phase, (self.phase,))[0]
        where = f" ({self.where})" if self.where else ""
        who = f"rank {self.rank} of {self.world_size} on {self.host} (pid {self.pid})"
        return f"{who}, {doing} at step {self.step}{where}"


class Heartbeat:
    """Signs of life of this rank in a with block; every rank of the job enters it.

    limits: seconds that a phase may take, by the name of its time-out (PHASES).
    """

    def __init__(self, run_dir: str | os.PathLike, limits: dict[str, float], interval: float = INTERVAL):
        self.run_dir = Path(run_dir)
        self.limits = limits
        self.interval = interval
        self._now = ("start", 0, time.time(), time.monotonic())
        self._main = threading.main_thread().ident

    def phase(self, name: str, step: int) -> None:
        """The main thread enters a phase (a key of PHASES)."""
        self._now = (name, step, time.time(), time.monotonic())

    def __enter__(self) -> "Heartbeat":
        rank, host, pid = dist_util.get_rank(), socket.gethostname(), os.getpid()
        self._self = Beat(rank, dist_util.get_world_size(), host, pid, process_birth(pid))
        folder = beats_folder(self.run_dir)
        if dist_util.is_main():
            folder.mkdir(exist_ok=True)
            for old in folder.glob("rank_*.json"):
                old.unlink()
        peers = dist_util.all_gather_object(self._self)  # after it, the folder is there for all
        self._file = os.open(folder / f"rank_{rank:04d}.json", os.O_WRONLY | os.O_CREAT)
        self._write(self._beat())
        self._peers = _watch(peer for peer in peers if peer.rank != rank)
        self._stopped, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _trace: Any) -> None:
        os.write(self._stop, b".")
        self._thread.join()
        ended = "finished" if error is None else f"{kind.__name__}: {error}".splitlines()[0][:300]
        self._write(dataclasses.replace(self._beat(), ended=ended))
        for descriptor in (self._file, self._stop, self._stopped, *self._peers):
            os.close(descriptor)

    def _beat(self) -> Beat:
        phase, step, since, began = self._now
        where, waiting = "", False
        if time.monotonic() - began > 0.5 * self._limit(phase):
            where, waiting = _where(self._main)
        return dataclasses.replace(
            self._self, step=step, phase=phase, since=since, time=time.time(), where=where, waiting=waiting
        )

    def _limit(self, phase: str) -> float:
        return self.limits[PHASES[phase][1]]

    def _write(self, beat: Beat) -> None:
        record = json.dumps(dataclasses.asdict(beat)).encode()
        with contextlib.suppress(OSError):  # a full disk or a lost mount is the saver's to report
            os.pwrite(self._file, record[: RECORD_BYTES - 1].ljust(RECORD_BYTES - 1) + b"\n", 0)

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._stopped, *self._peers], [], [], self.interval)
            if self._stopped in ready:
                return
            for descriptor in ready:
                self._check_death(self._peers.pop(descriptor))
                os.close(descriptor)
            self._write(self._beat())
            self._check_time()

    def _check_death(self, peer: Beat) -> None:
        """A rank of this node has ended: if not in good order, so must all."""
        last = {beat.rank: beat for beat in read_beats(self.run_dir)}.get(peer.rank, peer)
        if not last.ended:
            self._end_job(status.LOST, f"lost {last}: killed or crashed", last)

    def _check_time(self) -> None:
        phase, step, _, began = self._now
        limit = self._limit(phase)
        if time.monotonic() - began > limit:
            culprit = furthest_behind(read_beats(self.run_dir)) or self._beat()
            text = f"no progress for {limit:g} s (--{PHASES[phase][1]}) at step {step}; furthest behind is {culprit}"
            self._end_job(status.STUCK, text, culprit)

    def _end_job(self, ended: str, text: str, culprit: Beat) -> None:
        status.write_status(
            self.run_dir,
            ended,
            exit_code=1,
            message=text,
            step=culprit.step,
            rank=culprit.rank,
            host=culprit.host,
        )
        dist_util.end_job(1, f"error: {text}\n")


def beats_folder(run_dir: str | os.PathLike) -> Path:
    """Where the heartbeats of a run lie."""
    return Path(run_dir, "heartbeats")


def read_beats(run_dir: str | os.PathLike) -> list[Beat]:
    """The last sign of life of every rank, in rank order; unreadable ones are left out."""
    beats = []
    for path in sorted(beats_folder(run_dir).glob("rank_*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beats.append(Beat(**json.loads(path.read_text())))
    return beats


def furthest_behind(beats: Iterable[Beat]) -> Beat | None:
    """The rank that the others most likely wait for: a silent one, then the lowest step, then who does not wait."""
    beats = [beat for beat in beats if not beat.ended]
    newest = max((beat.time for beat in beats), default=0.0)

    def order(beat: Beat) -> tuple:
        silent = newest - beat.time > SILENT_AFTER
        return (not silent, beat.step, beat.waiting, beat.since)

    return min(beats, key=order, default=None)


def describe_last_run(run_dir: str | os.PathLike) -> str:
    """How the latest start of a run ended, in one line; empty when there was none."""
    found, beats = status.read_status(run_dir), read_beats(run_dir)
    if found:
        return f"{found['ended']}: {found.get('message') or 'in good order'} ({found.get('time')})"
    if alive := [beat for beat in beats if is_alive(beat)]:
        return f"still going on: {alive[0]}"
    if not beats:
        return ""
    last = furthest_behind(beats) or beats[0]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last.time))
    return f"lost without a word: {last}, last sign of life {when}"


def is_alive(beat: Beat) -> bool:
    """Whether the process of a heartbeat runs on this node."""
    return beat.host == socket.gethostname() and beat.born != 0 and process_birth(beat.pid) == beat.born


def process_birth(pid: int) -> int:
    """Start of a process in the system's ticks; 0 when it has ended or the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _watch(peers: Iterable[Beat]) -> dict[int, Beat]:
    """Descriptors that become readable when a process ends; empty where the system has none (Linux has)."""
    watched = {}
    for peer in filter(is_alive, peers):  # a number may mean another process in another container
        with contextlib.suppress(AttributeError, OSError):
            watched[os.pidfd_open(peer.pid)] = peer
    return watched


def _where(thread: int) -> tuple[str, bool]:
    """(innermost line of our code or of the user's, whether it waits for other ranks) of a running thread."""
    frame, waiting = sys._current_frames().get(thread), False
    while frame is not None:
        name = frame.f_code.co_filename
        installed = "site-packages" in name or name.startswith((sys.base_prefix, "<"))
        if not installed or name.startswith(os.path.dirname(__file__)):
            return f"{os.path.basename(name)}:{frame.f_lineno} {frame.f_code.co_name}", waiting
        waiting = waiting or "torch/distributed/" in name or "torch/autograd/" in name
        frame = frame.f_back
    return "", waiting
