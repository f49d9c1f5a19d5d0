"""Whole files or none, whatever happens in between."""

import errno
import os
import stat

import pytest

from cm.errors import UserError
from cm.runtime import files
from cm.runtime.files import sync_folder, whole_file


def test_a_file_has_its_name_only_when_it_is_whole_and_on_disk(tmp_path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=original: (events.append(n), f(*a))[1])
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new content")
        file.seek(0)
        assert file.read(3) == b"new" and path.read_bytes() == b"old"
        assert len(os.listdir(tmp_path)) == 2
    assert path.read_bytes() == b"new content" and os.listdir(tmp_path) == ["x.bin"]
    assert events == ["fsync", "replace", "fsync"]  # content, name, folder


def test_files_have_the_rights_that_others_have(tmp_path):
    with whole_file(tmp_path / "a") as file:
        file.write(b"1")
    (tmp_path / "b").write_bytes(b"1")
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == stat.S_IMODE(os.stat(tmp_path / "b").st_mode)


@pytest.mark.parametrize(
    "error", [RuntimeError("stopped"), KeyboardInterrupt(), OSError(28, "No space left")]
)
def test_an_error_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(type(error)), whole_file(tmp_path / "x") as file:
        file.write(b"half")
        raise error
    assert (tmp_path / "x").read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failing_storage_is_told_by_its_first_error(tmp_path, monkeypatch, name):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="No space"), whole_file(tmp_path / "x") as file:
        file.write(b"1")
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "nowhere" / "x"):
        pass


def test_folders_that_cannot_be_flushed_are_left_and_broken_ones_are_not(tmp_path, monkeypatch):
    def answer(number):
        def fail(descriptor):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(files.os, "fsync", fail)
        sync_folder(tmp_path)

    answer(errno.EINVAL)
    answer(errno.ENOTSUP)
    with pytest.raises(OSError, match="Input/output"):
        answer(errno.EIO)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind):
    """A rename over /dev/null takes it from the whole machine."""
    path = tmp_path / "out"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/null")
    with pytest.raises(UserError, match=f"out is a {kind}, not a file"), whole_file(path) as file:
        file.write(b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not path.is_file()
