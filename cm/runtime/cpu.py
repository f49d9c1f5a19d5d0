"""How many processors this process may use. Imports nothing heavy, so that command lines can tell their defaults."""

import os
from pathlib import Path

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
