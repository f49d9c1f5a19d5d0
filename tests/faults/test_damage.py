"""Hundreds of damaged inputs, made at random by kind: each is read, or refused in one line with exit code 2.

Bounded in time and memory; nothing that was there is changed, nothing half-made is left, no code in them runs.
"""

import contextlib
import hashlib
import random
import signal
from pathlib import Path

import pytest

from cm.runtime import logger
from cm.tools import demo, doctor
from tests.helpers.commands import run
from tests.helpers.damage import KINDS, PASSED_OVER, REPORTS, valid_inputs
from tests.helpers.memory import at_most
from tests.helpers.mp import ROOT

FEW, MANY = 4, 34  # of each kind
OF_REPORTS = 12  # which are drawn
SECONDS, BYTES = 60, 400 << 20  # a busy machine counts, too


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = valid_inputs(tmp_path_factory.mktemp("valid"))
    logger.reset()
    return world


def fingerprint(folder: Path) -> dict[str, str]:
    """Every name below a folder, and the hash of what it holds where it is an ordinary file."""
    found = {}
    for path in folder.rglob("*"):
        ordinary = not path.is_symlink() and path.is_file() and path.stat().st_size < 1 << 30
        found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if ordinary else ""
    return found


@contextlib.contextmanager
def at_most_seconds(seconds: int):
    def late(*_):
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(kind: str, number: int, world: Path, folder: Path, monkeypatch) -> int:
    folder.mkdir()
    monkeypatch.chdir(folder)
    argv = [str(word) for word in KINDS[kind](random.Random(f"{kind} {number}"), world, folder)]
    before = fingerprint(folder)
    monkeypatch.setattr(demo, "page", lambda tried: None)  # needs gradio; what is damaged is read before
    monkeypatch.setattr(demo, "serve", lambda *_: None)
    monkeypatch.setattr(doctor, "check_import", lambda check: check)  # a process of its own, for two seconds
    with at_most(BYTES), at_most_seconds(SECONDS):
        code, text = run(argv, monkeypatch)
    after, what = fingerprint(folder), f"{kind} {number}: {' '.join(argv)}\n{text}"
    # `inspect` answers 1 when some images cannot be read, `doctor` where the machine lacks something.
    assert code in (0, 2) or (code == 1 and argv[0] in ("inspect", "doctor") and not text), what
    assert before.items() <= after.items() and not (folder / "pwned").exists(), what
    if code == 2:
        lines = [line for line in text.splitlines() if "image/s]" not in line]  # without progress bars
        assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1100, what
        assert lines[0].isprintable() and after == before, what
    return code


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_damaged_inputs(kind, world, tmp_path, monkeypatch):
    for number in range(FEW):
        judge(kind, number, world, tmp_path / str(number), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_inputs(kind, world, tmp_path, monkeypatch):
    codes = [
        judge(kind, number, world, tmp_path / str(number), monkeypatch) for number in range(FEW, many(kind))
    ]
    assert 2 in codes or kind in PASSED_OVER


def many(kind: str) -> int:
    return OF_REPORTS if kind in REPORTS else MANY


def test_the_documentation_counts_them():
    assert sum(map(many, KINDS)) >= 500
    page = (ROOT / "docs" / "torture.md").read_text()
    assert f"\n{sum(map(many, KINDS))} cases in the whole suite" in page
