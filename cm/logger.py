"""The original's name for `cm.runtime.logger`, with the rest of its surface: levels, timers, older names."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

from cm.runtime import launch
from cm.runtime.log_writers import *  # noqa: F403
from cm.runtime.logger import *  # noqa: F403
from cm.runtime.logger import DEBUG, ERROR, INFO, dumpkvs, get_current, log, logkv

record_tabular = logkv
dump_tabular = dumpkvs


def debug(*args: Any) -> None:
    """`log` at level DEBUG."""
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    """`log` at level INFO."""
    log(*args, level=INFO)


def error(*args: Any) -> None:
    """`log` at level ERROR."""
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """Least level of messages to write."""
    get_current().set_level(level)


def set_comm(comm: Any) -> None:
    """Average over an mpi4py communicator from now on."""
    get_current().set_comm(comm)


@contextlib.contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds spent in a with block to the value `wait_<scopename>` of the next row."""
    start = time.perf_counter()
    try:
        yield
    finally:
        values = get_current()._values
        key = f"wait_{scopename}"
        values[key] = (values.get(key, (0.0, 1))[0] + time.perf_counter() - start, 1)


def profile(n: str) -> Callable:
    """Decorator: `profile_kv(n)` around every call."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args, **kwargs):
            with profile_kv(n):
                return function(*args, **kwargs)

        return timed

    return decorate


def get_rank_without_mpi_import() -> int:
    """This process's rank by the launcher's variables; 0 when alone."""
    return launch.detect().rank
