"""How much memory something takes at its peak."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _peak() -> int:
    """The most memory that this process had since the last reset [bytes]."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Fail unless the body stays within `limit` bytes above what the process had before."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        pytest.skip("the system tells no peak of memory")
    before = _peak()
    yield
    assert _peak() - before <= limit
