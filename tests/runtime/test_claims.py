"""Claims: one writer at a time, also when processes start together, and takeover of what a killed one left."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from cm.errors import UserError
from cm.runtime import claims
from cm.runtime.claims import Claim, claimed_place

HOLD = """import sys, time
from cm.runtime.claims import Claim
with Claim(sys.argv[1]):
    print("in", flush=True)
    time.sleep(60)
"""
RACE = """import sys, time
from cm.errors import UserError
from cm.runtime.claims import Claim
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
try:
    with Claim(sys.argv[1]):
        time.sleep(1.0)
        print("won")
except UserError:
    print("lost")
"""


def holder(path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    return process


def test_a_second_writer_is_refused_and_the_first_leaves_nothing(tmp_path):
    target = tmp_path / "samples.npz"
    with Claim(target):
        with pytest.raises(
            UserError, match=rf"samples\.npz is being written by process {os.getpid()} of this host"
        ):
            Claim(target).__enter__()
        with Claim(tmp_path / "other.npz"):
            pass
    assert list(tmp_path.iterdir()) == []
    with Claim(target):  # free again
        pass


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    process = holder(tmp_path / "run")
    with pytest.raises(UserError, match=f"process {process.pid} of this host"):
        Claim(tmp_path / "run").__enter__()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Claim(tmp_path / "run"):
        assert json.loads((tmp_path / ".run.claim").read_text())["pid"] == os.getpid()


def test_of_processes_that_start_together_one_wins(tmp_path):
    start = str(time.time() + 2.0)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path / "x"), start], stdout=subprocess.PIPE, text=True
        )
        for _ in range(6)
    ]
    said = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    assert sorted(said) == ["lost"] * 5 + ["won"]


def test_of_two_that_find_the_same_dead_claim_one_wins(tmp_path):
    """The second has seen that the holder is dead, when the first takes over."""
    process = holder(tmp_path / "run")
    process.kill()
    process.wait()
    first, second = Claim(tmp_path / "run"), Claim(tmp_path / "run")
    look = second._holder

    def overtaken():
        found = look()
        second._holder = look
        first.__enter__()
        return found

    second._holder = overtaken
    with pytest.raises(UserError, match=f"process {os.getpid()} of this host"):
        second.__enter__()
    assert json.loads(first.file.read_text())["pid"] == os.getpid()
    first.__exit__(None, None, None)


def test_another_hosts_claim_holds_while_it_is_renewed(tmp_path, monkeypatch):
    file = tmp_path / ".x.claim"
    file.write_text(json.dumps({"host": "elsewhere", "pid": 7, "born": 1}))
    monkeypatch.setattr(claims, "RENEWAL", 0.2)
    threading.Timer(0.3, file.touch).start()
    with pytest.raises(UserError, match="process 7 of elsewhere"):
        Claim(tmp_path / "x").__enter__()
    monkeypatch.setattr(claims, "TAKEOVER", 1.0)
    began = time.monotonic()
    with Claim(tmp_path / "x"):  # it is not renewed any more
        assert "elsewhere" not in file.read_text()
    assert time.monotonic() - began > 0.3


def test_a_holder_renews_its_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "RENEWAL", 0.05)
    with Claim(tmp_path / "x") as claim:
        os.utime(claim.file, (1, 1))
        time.sleep(0.3)
        assert claim.file.stat().st_mtime > 1


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": 1}', '{"host": "a", "pid": "x", "born": 1}'])
def test_damaged_claims_are_taken_over_once_they_are_old(tmp_path, text):
    file = tmp_path / ".x.claim"
    file.write_text(text)
    with pytest.raises(UserError, match="another process"):
        Claim(tmp_path / "x").__enter__()
    os.utime(file, (1, 1))
    with Claim(tmp_path / "x"):
        pass


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="cannot be written: No such file"):
        Claim(tmp_path / "none" / "x").__enter__()


def test_a_claimed_place_is_tried_first_and_cleared_of_what_killed_processes_left(tmp_path):
    place = tmp_path / "new" / "x.pt"
    with claimed_place(place):
        assert place.parent.is_dir()
    assert not (tmp_path / "new").exists()  # nothing came to lie in it
    for name in (".x.pt.7.tmp", ".x.json.7.tmp", ".y.pt.7.tmp", ".x.pt.b.tmp"):
        (tmp_path / name).touch()
    (tmp_path / ".x.pt.8.tmp").mkdir()
    with claimed_place(tmp_path / "x.pt", beside=["x.json"]):
        (tmp_path / "x.pt").write_text("done")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.pt.b.tmp", ".y.pt.7.tmp", "x.pt"]
    with pytest.raises(UserError, match=r"--out .* is a folder"), claimed_place(tmp_path, "--out"):
        pass
    with pytest.raises(UserError, match=r"TARGET .*below cannot be written: Not a directory"):
        claimed_place(tmp_path / "x.pt" / "below" / "y", "TARGET").__enter__()


def test_a_signal_while_it_is_taken_leaves_no_claim(tmp_path, monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(claims.threading, "Thread", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Claim(tmp_path / "x").__enter__()
    assert list(tmp_path.iterdir()) == []
    link = os.link
    for made in (False, True):  # in the instant before it is made, and after

        def interrupted_link(source, target, made=made):
            if made:
                link(source, target)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(os, "link", interrupted_link)
            with pytest.raises(KeyboardInterrupt):
                Claim(tmp_path / "x").__enter__()
        assert list(tmp_path.iterdir()) == []
    file = tmp_path / ".x.claim"
    file.write_text(json.dumps({"host": "elsewhere", "pid": os.getpid(), "born": 1}))
    with monkeypatch.context() as patched:
        patched.setattr(Claim, "_make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Claim(tmp_path / "x").__enter__()
    assert file.exists()  # another's stays


def test_where_there_are_no_links_one_of_two_has_it(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    with Claim(tmp_path / "x"), pytest.raises(UserError, match="is being written by"):
        Claim(tmp_path / "x").__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_never_stands_without_its_holder(tmp_path, monkeypatch):
    """A process that is killed at any moment leaves none, or one that the next start takes over at once."""
    for moment in ("write_text", "link", "unlink"):
        if (child := os.fork()) == 0:
            owner = os if moment == "link" else pathlib.Path
            monkeypatch.setattr(owner, moment, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            Claim(tmp_path / moment).__enter__()
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        with claimed_place(tmp_path / moment):
            pass
        assert not list(tmp_path.iterdir())
