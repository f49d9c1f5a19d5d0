"""Checkpoints in the background: what the loop waits for, and what happens when storage fails."""

import errno
import os
import resource
import signal
import subprocess
import threading

import pytest
import torch

from cm.errors import UserError
from cm.runtime import distributed, logger
from cm.storage import checkpoint as ck
from cm.storage.saver import Saver, copy_to_host
from cm.storage.weights import load_weights
from tests.helpers.mp import run_ranks


@pytest.fixture(autouse=True)
def quiet(tmp_path):
    logger.configure(tmp_path / "logs", ["log"])
    yield
    logger.reset()


def log_text(tmp_path):
    return (tmp_path / "logs" / "log.txt").read_text()


def save(saver, step, tensor=None, size=2):
    tensor = torch.full((size,), float(step)) if tensor is None else tensor
    saver.save({f"model{step:06d}.pt": {"w": tensor}}, {"step": step})


@pytest.fixture
def gate(monkeypatch):
    """The first flush of each write waits until the gate is open."""
    gate, original = threading.Event(), os.fsync

    def fsync(descriptor):
        assert gate.wait(20)
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    yield gate
    gate.set()


def test_the_loop_goes_on_while_a_checkpoint_is_written_and_cannot_change_it(tmp_path, gate):
    saver = Saver(tmp_path, background=True)
    weight = torch.zeros(3)
    save(saver, 1, weight)
    weight += 1  # training goes on
    assert ck.complete_checkpoints(tmp_path) == []
    gate.set()
    saver.wait()
    [path] = ck.complete_checkpoints(tmp_path)
    assert load_weights(path / "model000001.pt")[0]["w"].tolist() == [0, 0, 0]


def test_a_second_save_waits_for_the_first(tmp_path, gate):
    saver = Saver(tmp_path, background=True)
    save(saver, 1)
    second = threading.Thread(target=save, args=(saver, 2))
    second.start()
    second.join(0.2)
    assert second.is_alive() and ck.complete_checkpoints(tmp_path) == []
    gate.set()
    second.join()
    saver.finish()
    assert [p.name for p in ck.complete_checkpoints(tmp_path)] == ["step_000001", "step_000002"]


def test_join_completes_a_write_of_a_run_that_failed(tmp_path):
    saver = Saver(tmp_path, background=True)
    save(saver, 1)
    saver.join()
    assert len(ck.complete_checkpoints(tmp_path)) == 1


def fail_at(monkeypatch, step, error):
    write = ck.save_weights

    def failing(path, *args):
        if f"{step:06d}" in path.name:
            raise error
        write(path, *args)

    monkeypatch.setattr(ck, "save_weights", failing)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_write_stops_training_with_path_and_cause(tmp_path, monkeypatch, background):
    saver = Saver(tmp_path, background=background)
    save(saver, 1)
    fail_at(monkeypatch, 2, FULL)
    with pytest.raises(UserError) as error:
        save(saver, 2)
        saver.wait()
    text = str(error.value)
    assert str(tmp_path) in text and "No space left on device" in text and "step 2" in text
    assert "newest complete checkpoint is" in text and "step_000001" in text
    assert [p.name for p in ck.complete_checkpoints(tmp_path)] == ["step_000001"]
    assert os.listdir(tmp_path / "checkpoints") == ["step_000001"]


def test_the_loop_learns_of_a_failed_write_before_the_next_save(tmp_path, monkeypatch):
    saver = Saver(tmp_path, background=True)
    fail_at(monkeypatch, 1, FULL)
    save(saver, 1)
    saver.join()
    assert saver.failed
    with pytest.raises(UserError, match="No space"):
        saver.check()


def test_warn_goes_on_to_the_next_save_but_not_past_the_last(tmp_path, monkeypatch):
    saver = Saver(tmp_path, background=True, on_error="warn")
    fail_at(monkeypatch, 1, FULL)
    save(saver, 1)
    saver.join()
    assert not saver.failed
    assert "could not save step 1" in log_text(tmp_path) and "No space" in log_text(tmp_path)
    save(saver, 2)
    saver.wait()
    assert [p.name for p in ck.complete_checkpoints(tmp_path)] == ["step_000002"]
    fail_at(monkeypatch, 3, FULL)
    save(saver, 3)
    with pytest.raises(UserError, match="step 3"):
        saver.finish()


@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_a_programming_error_in_the_background_keeps_its_traceback(tmp_path, monkeypatch, on_error):
    saver = Saver(tmp_path, background=True, on_error=on_error)
    fail_at(monkeypatch, 1, ZeroDivisionError("deliberate"))
    save(saver, 1)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*ZeroDivisionError: deliberate"):
        saver.wait()


def test_old_checkpoints_go_and_milestones_stay(tmp_path):
    saver = Saver(tmp_path, keep_last=1, keep_every=4, background=True)
    for step in (2, 4, 6, 8, 10, 11):
        save(saver, step)
    saver.finish()
    names = [p.name for p in ck.complete_checkpoints(tmp_path)]
    assert names == ["step_000004", "step_000008", "step_000011"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == names


def test_a_copy_is_apart_from_its_source():
    source = {"a": torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last), "b": [torch.tensor(1), "x"]}
    copy = copy_to_host(source)
    source["a"].zero_()
    source["b"][0].zero_()
    assert copy["a"].sum() == 96 and copy["b"][0] == 1 and copy["b"][1] == "x"


# -- storage that really fails ------------------------------------------------------------------------------------


def limited(folder, result):
    """In a child: files may not grow above 200 KB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    saver = Saver(folder)
    save(saver, 1)
    try:
        save(saver, 2, size=100_000)
    except UserError as error:
        os.write(result, str(error).encode())
    os._exit(0)


def test_a_quota_names_path_and_cause(tmp_path):
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            limited(tmp_path, writer)
        finally:
            os._exit(1)
    os.close(writer)
    text = os.read(reader, 1000).decode()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert "could not save step 2" in text and "File too large" in text and "step_000001" in text
    assert os.listdir(tmp_path / "checkpoints") == ["step_000001"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def test_a_full_disk_leaves_the_earlier_checkpoints(small_disk):
    saver = Saver(small_disk / "run", background=True)
    save(saver, 1, size=100_000)
    save(saver, 2, size=1_000_000)
    with pytest.raises(UserError, match=r"could not save step 2 under .*No space left on device"):
        saver.wait()
    assert os.listdir(small_disk / "run" / "checkpoints") == ["step_000001"]
    ck.verify_checkpoint(ck.complete_checkpoints(small_disk / "run")[-1])
    save(Saver(small_disk / "run"), 3, size=100_000)  # nothing of the failed write takes up room


def test_a_read_only_disk(small_disk):
    saver = Saver(small_disk / "run")
    save(saver, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"could not save step 2 under .*Read-only file system"):
        save(saver, 2)
    ck.verify_checkpoint(ck.complete_checkpoints(small_disk / "run")[-1])


def test_a_mount_that_went_away_is_not_written_below(small_disk):
    saver = Saver(small_disk / "run")
    save(saver, 1)
    subprocess.run(["umount", "-l", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"could not save step 2 under .*No such file"):
        save(saver, 2)
    assert os.listdir(small_disk) == []


# -- several ranks ------------------------------------------------------------------------------------------------


def no_space(*_):
    raise FULL


def failing_on_ranks(folder):
    """Errors that the ranks see: of a background write that fails on rank 0 only."""
    saver = Saver(folder, background=True)
    save(saver, 1)
    saver.wait()
    if distributed.is_main():
        ck.save_weights = no_space
    save(saver, 2)
    try:
        save(saver, 3)
    except UserError as error:
        return str(error)


def test_every_rank_gets_the_error_of_a_background_write(tmp_path):
    results = run_ranks("tests.storage.test_saver:failing_on_ranks", 2, str(tmp_path))
    assert results[0] == results[1] and "could not save step 2" in results[0] and "No space" in results[0]
