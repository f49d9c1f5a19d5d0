"""What operating systems do differently: locks of files, stop signals, processes, their memory and time.

Nothing else in the project asks which system it runs on for these. Linux is tested; what is for macOS and Windows was
written by their documentation and is tested in parts, but has not been run there. Standard library only.
"""

import ctypes
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

LINUX, MAC, WINDOWS = (sys.platform.startswith(name) for name in ("linux", "darwin", "win"))

# What asks a run to stop: batch systems send SIGTERM and SIGUSR1, Ctrl-C SIGINT, a terminal that is closed SIGHUP, a
# Windows console SIGBREAK.
STOP_SIGNALS = tuple(
    signal.Signals[name]
    for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP", "SIGBREAK")
    if hasattr(signal, name)
)
# Whether the system says at once that a process has ended, by a descriptor that becomes readable
SEES_ENDS = hasattr(os, "pidfd_open")

# How a file is opened to be read: bytes as they are, no wait for the writer of a pipe, nothing handed to children
READ = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
    READ |= getattr(os, _name, 0)

_LOCK_POLL = 0.1  # seconds
_ASK = 0x1000  # PROCESS_QUERY_LIMITED_INFORMATION
_STILL_ACTIVE = 259


def lock(file: IO) -> None:
    """Wait for the only lock on an open file; closing it gives it back. OSError where the file system has no locks."""
    if WINDOWS:
        _lock_on_windows(file)
        return
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)


def _lock_on_windows(file: IO) -> None:
    import msvcrt

    file.seek(0)
    while True:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            return
        except PermissionError:  # another process has it
            time.sleep(_LOCK_POLL)


def watch_end(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where the system, or the process, has none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def process_birth(pid: int) -> int:
    """Start of a process, in units of the system; 0 when it has ended or the system does not tell.

    Together with its number it names a process: numbers are used again.
    """
    if WINDOWS:
        return _birth_on_windows(pid)
    return _birth_by_proc(pid) if LINUX else _birth_by_ps(pid)


def _birth_by_proc(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _birth_by_ps(pid: int) -> int:
    """Seconds since 1970."""
    command = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
        state, _, start = answer.stdout.strip().partition(" ")
        return 0 if state[:1] in ("", "Z") else int(time.mktime(time.strptime(start.strip())))
    except (OSError, ValueError):
        return 0


def _birth_on_windows(pid: int, kernel: Any = None) -> int:
    """Units of 100 ns since 1601."""
    kernel = kernel or ctypes.WinDLL("kernel32")
    kernel.OpenProcess.restype = ctypes.c_void_p
    if not (handle := kernel.OpenProcess(_ASK, False, pid)):
        return 0
    handle = ctypes.c_void_p(handle)
    try:
        code, times = ctypes.c_ulong(), [ctypes.c_ulonglong() for _ in range(4)]
        asked = kernel.GetExitCodeProcess(handle, ctypes.byref(code))
        asked = asked and kernel.GetProcessTimes(handle, *map(ctypes.byref, times))
        return times[0].value if asked and code.value == _STILL_ACTIVE else 0
    finally:
        kernel.CloseHandle(handle)


def peak_memory() -> int:
    """The most memory that this process has held so far [bytes]; 0 where the system does not tell."""
    if WINDOWS:
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if MAC else 1024 * peak


def available_memory() -> int:
    """Memory that processes may still take [bytes]; as good as endless where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    found = (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return next(found, 1 << 62)


def children_seconds() -> float:
    """Processor time of all children that have ended [s]; 0 where the system does not tell."""
    if WINDOWS:
        return 0.0
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


SHARED = "/dev/shm"


def shared_memory() -> tuple[int, int]:
    """(free, whole) bytes of the memory that processes share by name; negative where the system sets no limit."""
    try:
        found = os.statvfs(SHARED)
    except (AttributeError, OSError):
        return -1, -1
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def describe_shared_memory() -> str:
    """`/dev/shm has 64.0 MiB, 12.5 free`."""
    free, whole = (size / 2**20 for size in shared_memory())
    return f"{SHARED} has {whole:.1f} MiB, {free:.1f} free" if whole >= 0 else f"no {SHARED}"


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
