"""File access: local paths stay local, remote ones go through a stand-in for blobfile (no network)."""

import io
import os
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cm.errors import UserError
from cm.storage import filesystem


class FakeBlobfile(types.ModuleType):
    """The few functions of blobfile that cm.storage.filesystem calls, over a dict of path -> bytes."""

    def __init__(self):
        super().__init__("blobfile")
        self.files, self.calls, self.contexts = {}, [], []

    def create_context(self, **options):
        """The functions with other retries."""
        self.contexts.append(options)
        return self

    def BlobFile(self, path, mode="rb", **options):
        self.calls.append((path, mode, options))
        if "r" in mode:
            self.stat(path)
            return io.BytesIO(self.files[path])
        store = self.files

        class Upload(io.BytesIO):
            def __exit__(self, kind, value, trace):
                if kind is None or options.get("partial_writes_on_exc", True):
                    store[path] = self.getvalue()

        return Upload()

    def exists(self, path):
        return path in self.files or self.isdir(path)

    def isdir(self, path):
        return any(name.startswith(path.rstrip("/") + "/") for name in self.files)

    def makedirs(self, path):
        self.calls.append(("makedirs", path))

    def listdir(self, path):
        root = path.rstrip("/") + "/"
        below = [name[len(root) :] for name in self.files if name.startswith(root)]
        return {name.split("/")[0] + ("/" if "/" in name else "") for name in below}

    def walk(self, path):
        root = path.rstrip("/") + "/"
        folders = {name.rsplit("/", 1)[0] for name in self.files if name.startswith(root)}
        for folder in sorted(folders):
            yield folder, [], [n.rsplit("/", 1)[1] for n in self.files if n.rsplit("/", 1)[0] == folder]

    def stat(self, path):
        if path not in self.files:
            raise FileNotFoundError(path)
        return types.SimpleNamespace(size=len(self.files[path]), mtime=1.0)


@pytest.fixture
def remote(monkeypatch):
    fake = FakeBlobfile()
    monkeypatch.setitem(sys.modules, "blobfile", fake)
    return fake


def test_schemes():
    for path in ("gs://b/x", "az://a/c/x", "https://acc.blob.core.windows.net/c/x"):
        assert filesystem.is_remote(path)
    for path in ("/a/b", "a/b", "C:\\x", "gs:/b", "a/gs://b", "."):
        assert not filesystem.is_remote(path)
    for path in (
        "s3://b/x",
        "http://h/x",
        "https://example.org/x",
        "https://blob.core.windows.net.evil.org/x",
    ):
        with pytest.raises(UserError, match="only local paths") as info:
            filesystem.open_file(path)
        assert path in str(info.value)


def test_local_paths_never_import_blobfile(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "blobfile", None)  # an import would now raise
    target = tmp_path / "a" / "x.bin"
    filesystem.makedirs(target.parent)
    filesystem.write_atomic(target, b"abc")
    assert filesystem.open_file(target, "rb").read() == b"abc"
    assert filesystem.exists(target) and filesystem.isdir(target.parent) and not filesystem.isdir(target)
    assert filesystem.size(target) == 3
    assert filesystem.cache_locally(target) == str(target)
    assert filesystem.list_files(tmp_path) == ["a"]
    with pytest.raises(UserError, match="blobfile"):
        filesystem.exists("gs://bucket/x")


def test_import_is_light():
    code = "import sys, cm.storage.filesystem; sys.exit('blobfile' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_list_recursive_order_links_and_loops(tmp_path):
    for name in ("b.png", "a-x.png", "a/z.png", "a/b/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "other").symlink_to(tmp_path / "a" / "b")
    # Folder by folder: the folder "a" comes before "a-x.png", as in a recursive listing.
    assert filesystem.list_recursive(tmp_path) == ["a/b/c.png", "a/z.png", "a-x.png", "b.png", "other/c.png"]


def test_write_atomic_keeps_the_old_file_when_the_writer_fails(tmp_path):
    target = tmp_path / "x"
    filesystem.write_atomic(target, b"old")

    def half(file):
        file.write(b"new")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        filesystem.write_atomic(target, half)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_write_atomic_names_path_and_cause(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*nowhere/x: No such file") as info:
        filesystem.write_atomic(tmp_path / "nowhere" / "x", b"1")
    assert isinstance(info.value.__cause__, OSError)

    def full(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        filesystem.write_atomic(tmp_path / "x", full)
    assert os.listdir(tmp_path) == []


def test_remote_access(remote, tmp_path, monkeypatch):
    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path))
    filesystem.write_atomic("gs://b/d/x", b"12345")
    assert remote.calls[-1] == ("gs://b/d/x", "wb", {"streaming": False, "partial_writes_on_exc": False})
    filesystem.write_atomic("gs://b/d/e/y", lambda file: file.write(b"6"))
    assert filesystem.open_file("gs://b/d/x").read() == b"12345"
    assert (
        filesystem.exists("gs://b/d/x")
        and filesystem.isdir("gs://b/d")
        and filesystem.size("gs://b/d/x") == 5
    )
    assert filesystem.list_files("gs://b/d") == ["e", "x"]
    assert filesystem.list_recursive("gs://b/d/") == ["e/y", "x"]

    local = filesystem.cache_locally("gs://b/d/x")
    assert local.startswith(str(tmp_path)) and local.endswith("-x")
    assert Path(local).read_bytes() == b"12345"
    remote.calls.clear()
    assert filesystem.cache_locally("gs://b/d/x") == local and remote.calls == []  # copied once
    remote.files["gs://b/d/x"] = b"123456"
    assert filesystem.cache_locally("gs://b/d/x") != local  # another content, another copy
    with pytest.raises(UserError, match="gs://b/d: no such remote file"):
        filesystem.cache_locally("gs://b/d")


def test_the_cache_folder_may_begin_with_the_home_folder(remote, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    remote.files["gs://b/x"] = b"12345"
    for setting, folder in (("~/c", "c"), ("", ".cache/consistency-models")):
        monkeypatch.setenv("CM_CACHE_DIR", setting)
        assert Path(filesystem.cache_locally("gs://b/x")).parent == tmp_path / folder
    assert not Path("~").exists()


def test_who_comes_together_fetches_once(remote, tmp_path, monkeypatch):
    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path))
    remote.files["gs://b/x"] = b"12345"
    write, all_here = filesystem.write_atomic, threading.Barrier(4)
    monkeypatch.setattr(filesystem, "write_atomic", lambda *args: (time.sleep(0.2), write(*args)))

    def fetch(_):
        all_here.wait(10)
        return Path(filesystem.cache_locally("gs://b/x")).read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(fetch, range(4))) == [b"12345"] * 4
    assert [call[:2] for call in remote.calls] == [("gs://b/x", "rb")]


def test_few_retries_until_a_storage_has_answered(remote, monkeypatch):
    monkeypatch.setattr(filesystem, "_answered", set())
    used = []
    monkeypatch.setattr(
        remote, "create_context", lambda **options: used.append(options) or Context(len(used))
    )

    class Context:
        def __init__(self, number):
            self.number = number

        def exists(self, path):
            calls.append((path, used[self.number - 1]["retry_limit"]))
            if path.endswith("lost"):
                raise TimeoutError("message=no route, request=<Request and much more>")
            return True

    calls = []
    with pytest.raises(
        filesystem.Unreachable, match=r"^gs://b/lost cannot be reached: TimeoutError: no route$"
    ):
        filesystem.exists("gs://b/lost")
    for path in ("gs://b/x", "gs://b/y", "gs://other/x"):
        filesystem.exists(path)
    filesystem.be_patient("az://account/container/run")
    filesystem.exists("az://account/container/x")
    quick, patient = filesystem._QUICK["retry_limit"], filesystem._PATIENT["retry_limit"]
    assert [limit for _, limit in calls] == [quick, quick, patient, quick, patient]
    # Three tries without an answer: the line comes in time.
    assert (quick + 1) * max(filesystem._QUICK["connect_timeout"], filesystem._QUICK["read_timeout"]) <= 15
    assert patient >= 10


def test_the_real_blobfile_takes_these_options():
    blobfile = pytest.importorskip("blobfile")
    for options in (filesystem._QUICK, filesystem._PATIENT):
        assert hasattr(blobfile.create_context(**options, log_callback=print), "BlobFile")


def test_failed_remote_write_leaves_nothing(remote):
    def fail(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        filesystem.write_atomic("gs://b/x", fail)
    assert not filesystem.exists("gs://b/x")


def test_a_cache_folder_that_cannot_be_is_named(remote, tmp_path, monkeypatch):
    remote.files["gs://b/x"] = b"12345"
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write downloads to .*file.*set CM_CACHE_DIR"):
        filesystem.cache_locally("gs://b/x")
    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *args: False)  # as for another user
    with pytest.raises(UserError, match=r"Permission denied.*set CM_CACHE_DIR"):
        filesystem.cache_locally("gs://b/x")


def test_without_a_home_folder_the_setting_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CM_CACHE_DIR", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no HOME, no entry for the user
    with pytest.raises(UserError, match=r"HOME is not set.*CM_CACHE_DIR"):
        filesystem.cache_folder()
    with pytest.raises(UserError, match="set HOME"), filesystem.reaching("gs://b/x"):
        raise KeyError("HOME")
