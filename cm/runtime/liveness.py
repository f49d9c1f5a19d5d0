"""Heartbeats of ranks and the status of a run: who is alive, who is lost, and how a run ended.

Each rank rewrites a small file in <run>/heartbeats. status.json says how a run ended, since launchers swallow exit
codes; it is there only after the end. A run that left none is still going on, or was lost without a word; then the
heartbeats tell what its ranks were doing.

`python -m cm.runtime.liveness RUN_DIR RANK...`, started by `cm.runtime.watchdog`, watches the ranks of one node and
says in status.json which one died first, when a launcher leaves no other rank alive to say it. Standard library only:
it must start in no time.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cm.errors import masked
from cm.runtime.inputs import json_or_none, misfit
from cm.runtime.platform import STOP_SIGNALS, process_birth, watch_end

# Exit code of a run that ended in good order before its last step: the same command goes on.
EXIT_UNFINISHED = 75

# Why a run ended
FINISHED = "finished"
PREEMPTED = "preempted"
TIME = "time"
BAD_NUMBERS = "bad numbers"
STUCK = "stuck rank"
LOST = "lost rank"
ERROR = "error"


def write_status(
    run_dir: str | os.PathLike, ended: str, *, exit_code: int, message: str = "", **more: Any
) -> None:
    """Say why the run ended, if no rank has said so yet: what comes second mostly follows from the first."""
    content = {
        "ended": ended,
        "message": masked(message),
        "exit_code": exit_code,
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        **more,
    }
    # The storage may be what failed.
    with contextlib.suppress(OSError), open(_path(run_dir), "x") as file:
        file.write(json.dumps(content, indent=1) + "\n")


def read_status(run_dir: str | os.PathLike) -> dict[str, Any] | None:
    """What status.json says; None when there is none, or nothing readable in it."""
    content = json_or_none(_path(run_dir))
    return content if content and not misfit(content, STATUS) and "ended" in content else None


def clear_status(run_dir: str | os.PathLike) -> None:
    """A new start: the run has not ended."""
    _path(run_dir).unlink(missing_ok=True)


def _path(run_dir: str | os.PathLike) -> Path:
    return Path(run_dir, "status.json")


# A rank whose last sign is this much older than the newest of all is silent: dead, frozen or cut off (seconds).
SILENT_AFTER = 5.0
FAR_AWAY = 1e11  # no time is so far from 1970 (seconds)
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


BEAT = {f.name: f.type for f in dataclasses.fields(Beat)}
STATUS = {"ended": str, "message": str, "exit_code": int, "time": str, "step": int}


def folder(run_dir: str | os.PathLike) -> Path:
    """Where the heartbeats of a run lie."""
    return Path(run_dir, "heartbeats")


def read_beats(run_dir: str | os.PathLike) -> list[Beat]:
    """The last sign of life of every rank, in rank order; unreadable ones are left out."""
    beats = []
    for path in sorted(folder(run_dir).glob("rank_*.json")):
        content = json_or_none(path)
        if content and not misfit(content, BEAT) and abs(content.get("time", 0.0)) < FAR_AWAY:
            with contextlib.suppress(TypeError):  # of another version: names that are missing or unknown
                beats.append(Beat(**content))
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
    found, beats = read_status(run_dir), read_beats(run_dir)
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


def record_death(run_dir: str | os.PathLike, rank: Beat) -> str:
    """A rank's process has ended: unless in good order, say in status.json that it was lost. Returns what it says."""
    last = {beat.rank: beat for beat in read_beats(run_dir)}.get(rank.rank, rank)
    if last.ended:
        return ""
    text = f"lost {last}: killed or crashed"
    record(run_dir, LOST, text, last)
    return text


def record(run_dir: str | os.PathLike, ended: str, text: str, culprit: Beat) -> None:
    """Name a rank in status.json."""
    about = {"step": culprit.step, "rank": culprit.rank, "host": culprit.host}
    write_status(run_dir, ended, exit_code=1, message=text, **about)


def watch_ends(peers: Iterable[Beat]) -> dict[int, Beat]:
    """Descriptors that become readable when a process ends; empty where the system has none (Linux has)."""
    watched = {}
    for peer in filter(is_alive, peers):  # a number may mean another process in another container
        if (descriptor := watch_end(peer.pid)) is not None:
            watched[descriptor] = peer
    return watched


def main(run_dir: str, *ranks: str) -> None:
    """Wait for the first rank that ends without having said so, or for the last one."""
    for number in STOP_SIGNALS:  # meant for the ranks
        signal.signal(number, signal.SIG_IGN)
    watched = watch_ends(beat for beat in read_beats(run_dir) if str(beat.rank) in ranks)
    while watched:
        ready, _, _ = select.select(list(watched), [], [])
        if any(record_death(run_dir, watched.pop(descriptor)) for descriptor in ready):
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
