"""Processors and memory of CPU runs: how many cores this process may use, and keeping what was freed."""

import ctypes
import os
import sys
from pathlib import Path

from cm.errors import UserError

# Processor time that a control group may use, and the period, both in microseconds; versions 2 and 1.
_QUOTA_FILES = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


def usable_cores(groups: str = "/sys/fs/cgroup") -> int:
    """Processors of the machine, less by this process's affinity and by its container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in _QUOTA_FILES:
        try:
            words = " ".join(Path(groups, name).read_text() for name in names).split()
            quota, period = int(words[0]), int(words[1])
        except (OSError, ValueError, IndexError):  # no such file, or "max": no limit
            continue
        if quota > 0 and period > 0:
            count = min(count, -(-quota // period))
    return count


WORKERS_PER_CORE = 32  # and more only wait for each other


def check_workers(wanted: int) -> None:
    """UserError for so many processes that the machine would come to a standstill."""
    if wanted > (most := WORKERS_PER_CORE * usable_cores()):
        raise UserError(
            f"--num_workers {wanted}: at most {most} on this machine's {usable_cores()} processors"
        )


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc takes no more on 64 bits


def keep_freed_memory() -> bool:
    """Tell glibc to serve large tensors from its heap and not to trim it; False where there is no glibc.

    By default large tensors are mapped anew, and the system has to clear their pages, in every step. For the 8x8 digits
    network on one core this saved half to four fifths of the page faults and 5 to 12% of a training step's CPU time at
    batches of 16 to 128.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
