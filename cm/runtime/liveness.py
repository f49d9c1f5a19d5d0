"""Signs of life that ranks leave in <run>/heartbeats, one small file each: what they say, and who is lost.

Standard library only: `cm.runtime.node_watch` must start in no time.
"""

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from cm.runtime import status

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


def folder(run_dir: str | os.PathLike) -> Path:
    """Where the heartbeats of a run lie."""
    return Path(run_dir, "heartbeats")


def read_beats(run_dir: str | os.PathLike) -> list[Beat]:
    """The last sign of life of every rank, in rank order; unreadable ones are left out."""
    beats = []
    for path in sorted(folder(run_dir).glob("rank_*.json")):
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


def record_death(run_dir: str | os.PathLike, rank: Beat) -> str:
    """A rank's process has ended: unless in good order, say in status.json that it was lost. Returns what it says."""
    last = {beat.rank: beat for beat in read_beats(run_dir)}.get(rank.rank, rank)
    if last.ended:
        return ""
    text = f"lost {last}: killed or crashed"
    record(run_dir, status.LOST, text, last)
    return text


def record(run_dir: str | os.PathLike, ended: str, text: str, culprit: Beat) -> None:
    """Name a rank in status.json."""
    about = {"step": culprit.step, "rank": culprit.rank, "host": culprit.host}
    status.write_status(run_dir, ended, exit_code=1, message=text, **about)


def watch_ends(peers: Iterable[Beat]) -> dict[int, Beat]:
    """Descriptors that become readable when a process ends; empty where the system has none (Linux has)."""
    watched = {}
    for peer in filter(is_alive, peers):  # a number may mean another process in another container
        with contextlib.suppress(AttributeError, OSError):
            watched[os.pidfd_open(peer.pid)] = peer
    return watched
