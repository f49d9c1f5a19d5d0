"""What systems do differently. Branches of other systems run on stand-ins for what those systems have."""

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cm.runtime import platform

ROOT = Path(__file__).parents[2]
PLACE = Path(platform.__file__)


@pytest.fixture
def process():
    """A process that waits for its input to end."""
    started = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield started
    started.kill()
    started.wait()


def test_nothing_else_asks_for_what_systems_do_differently():
    modules, names = r"^\s*import (fcntl|msvcrt|resource)", r"/proc/|signal\.SIGUSR1|pidfd_open|sys\.platform"
    words = re.compile(f"{modules}|{names}", re.MULTILINE)
    for path in [p for d in ("cm", "evaluations", "scripts") for p in (ROOT / d).rglob("*.py")]:
        if path not in (PLACE, PLACE.with_name("cpu.py")):
            code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)
            assert not words.search(code), path


def test_stop_signals_are_those_of_the_system():
    assert [s.name for s in platform.STOP_SIGNALS] == ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"]


def test_one_process_at_a_time_has_the_lock(tmp_path):
    path = tmp_path / "lock"
    code = "import sys; from cm.runtime import platform; platform.lock(open(sys.argv[1], 'w')); print('mine')"
    with open(path, "w") as file:
        platform.lock(file)
        other = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1.5)
    assert other.communicate(timeout=60)[0] == b"mine\n"


def test_windows_waits_for_a_lock_too(tmp_path, monkeypatch):
    calls = []

    def locking(descriptor, mode, count):
        calls.append((mode, count))
        if len(calls) < 3:
            raise PermissionError

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setattr(platform, "WINDOWS", True)
    monkeypatch.setattr(platform, "_LOCK_POLL", 0)
    with open(tmp_path / "lock", "w") as file:
        platform.lock(file)
    assert calls == [(2, 1)] * 3


@pytest.mark.parametrize("birth", [platform._birth_by_proc, platform._birth_by_ps])
def test_a_birth_names_a_process_while_it_lives(birth, process):
    born = birth(process.pid)
    assert born > 0 and birth(process.pid) == born
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie has ended
    assert birth(process.pid) == 0
    process.wait()
    assert birth(process.pid) == 0


def test_ps_tells_seconds_since_1970():
    assert 0 <= time.time() - platform._birth_by_ps(os.getpid()) < 24 * 3600


@pytest.mark.parametrize(("handle", "code", "born"), [(0, 0, 0), (7, 259, 1234), (7, 1, 0)])
def test_a_birth_on_windows(handle, code, born):
    closed = []

    def exit_code(_, place):
        place._obj.value = code
        return 1

    def times(_, created, *others):
        created._obj.value = 1234
        return 1

    def open_process(*_):
        return handle

    kernel = SimpleNamespace(
        OpenProcess=open_process,
        GetExitCodeProcess=exit_code,
        GetProcessTimes=times,
        CloseHandle=lambda h: closed.append(h.value),
    )
    assert platform._birth_on_windows(42, kernel) == born
    assert closed == ([handle] if handle else [])


def test_the_end_of_a_process_is_seen(process, monkeypatch):
    descriptor = platform.watch_end(process.pid)
    assert not select.select([descriptor], [], [], 0)[0]
    process.kill()
    assert select.select([descriptor], [], [], 30)[0]
    os.close(descriptor)
    process.wait()
    assert platform.watch_end(process.pid) is None
    monkeypatch.delattr(os, "pidfd_open")
    assert platform.watch_end(os.getpid()) is None


def test_memory_and_time(monkeypatch):
    peak = platform.peak_memory()
    assert 2**24 < peak < 2**40
    monkeypatch.setattr(platform, "MAC", True)  # which counts in bytes
    assert platform.peak_memory() < peak / 500
    monkeypatch.setattr(platform, "WINDOWS", True)
    assert platform.peak_memory() == platform.children_seconds() == 0


def test_memory_that_is_left(monkeypatch):
    assert 2**20 < platform.available_memory() < 2**50
    monkeypatch.setattr(platform.Path, "read_text", lambda self: "MemFree: 9 kB\nMemAvailable:   3 kB\n")
    assert platform.available_memory() == 3072


def test_the_processor_has_a_name(monkeypatch):
    assert platform.processor()
    monkeypatch.setattr(platform.Path, "read_text", lambda self: "processor: 0\nmodel name\t: A Processor\n")
    assert platform.processor() == "A Processor"
