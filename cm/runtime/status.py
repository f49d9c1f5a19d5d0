"""How a run ended, for whoever starts it again: status.json in the run directory, since launchers swallow exit codes.

The file is there only after the end: a run that left none is still going on, or was lost without a word; then the
heartbeats (cm/runtime/watchdog.py) tell what its ranks were doing.
"""

import contextlib
import datetime
import json
import os
from pathlib import Path
from typing import Any

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
        "message": message,
        "exit_code": exit_code,
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        **more,
    }
    # The storage may be what failed.
    with contextlib.suppress(OSError), open(_path(run_dir), "x") as file:
        file.write(json.dumps(content, indent=1) + "\n")


def read_status(run_dir: str | os.PathLike) -> dict[str, Any] | None:
    """What status.json says; None when there is none, or nothing readable in it."""
    try:
        content = json.loads(_path(run_dir).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "ended" in content else None


def clear_status(run_dir: str | os.PathLike) -> None:
    """A new start: the run has not ended."""
    _path(run_dir).unlink(missing_ok=True)


def _path(run_dir: str | os.PathLike) -> Path:
    return Path(run_dir, "status.json")
