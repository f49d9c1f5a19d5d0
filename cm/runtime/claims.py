"""Claims: at most one program at a time writes a result, a run directory or a prepared data set, on any host.

A claim is a small file beside what is claimed, made by a link (or O_EXCL, where there are none), of which one succeeds
also on shared file systems. It says who made it (host, process, when), and its holder renews it. Who finds one asks
whether its holder is gone: on this host the process has ended; of another host, the claim has not been renewed for
TAKEOVER seconds by the file system's own clock, which a new start waits for, so that a job whose node died can be
started again at once.
"""

import errno
import glob
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from cm.errors import UserError
from cm.runtime.inputs import json_or_none, read_json
from cm.runtime.platform import lock, process_birth

RENEWAL, TAKEOVER = 20.0, 120.0
MAX_BYTES = 4096
# What file systems without links answer
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


@contextmanager
def claimed_place(
    path: str | os.PathLike, flag: str = "--out_dir", beside: Sequence[str] = (), folder: bool = False
) -> Iterator[bool]:
    """The place of a result for the length of a with block: its folder is made, tried by the claim, and held.

    Drafts of killed processes are removed; so are, at the end, folders that were made and are empty. UserError before
    anything is written. Yields whether a process was killed that was writing there. flag: what names the place in
    errors. beside: names of what is written with it. folder: the result is a folder. An empty path claims nothing.
    """
    if not os.fspath(path):
        yield False
        return
    path = Path(path).absolute()
    missing = [each for each in path.parents if not each.exists()]
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a null byte
            cause = getattr(error, "strerror", "") or error
            raise UserError(f"{flag} {_shown(path.parent)} cannot be written: {cause}") from None
        with Claim(path) as claim:
            if path.is_dir() and not folder:
                raise UserError(f"{flag} {_shown(path)} is a folder; a file is written")
            for name in {path.name, *beside}:
                _remove_drafts(path.parent / name)
            claim.remove_drafts()
            yield claim.taken_over
    finally:
        with suppress(OSError):
            for each in missing:
                each.rmdir()


def _shown(path: Path) -> str:
    """A path as people write it: below the working directory, relative to that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _remove_drafts(path: Path) -> None:
    """Remove what processes that were killed had written of a file or folder; its claim says that none is left."""
    for draft in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if draft.name.split(".")[-2].isdigit():
            with suppress(OSError):
                shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


class Claim:
    """A claim for the length of a with block; one process enters it. UserError while another holds it, or no place.

    path: the file or folder that the block writes. The claim lies in `folder`, by default beside it.
    """

    def __init__(self, path: str | os.PathLike, folder: str | os.PathLike | None = None):
        path = Path(path).absolute()
        self.path = path
        self.file = Path(folder or path.parent) / f".{path.name}.claim"
        self.taken_over = False  # from a process that did not give it back
        self._stop = threading.Event()

    def __enter__(self) -> "Claim":
        try:
            while not self._make():
                holder, here = self._holder()
                if holder and (here or self._is_renewed()):
                    raise UserError(f"{self.path} is being written by {holder} ({self.file} says so)")
                self._discard()
            threading.Thread(target=self._renew, daemon=True, name="claim").start()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from None
        except KeyboardInterrupt:  # a signal, after which nobody would give it back
            self._stop.set()
            if self._is_mine():
                self.file.unlink(missing_ok=True)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        with suppress(OSError):
            self.file.unlink(missing_ok=True)

    def _make(self) -> bool:
        """Make the claim; False when there is one.

        It comes by a link, with all that it says: a signal or a kill leaves none of which nobody knows the holder.
        """
        pid = os.getpid()
        text = json.dumps({"host": socket.gethostname(), "pid": pid, "born": process_birth(pid)})
        draft = self.file.with_name(f"{self.file.name}.{pid}")
        try:
            draft.write_text(text, encoding="utf-8")
            try:
                os.link(draft, self.file)
            except FileNotFoundError:  # cleared away by a start on another host: once more
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                with open(self.file, "x", encoding="utf-8") as file:
                    file.write(text)
        except FileExistsError:
            return False
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        return True

    def remove_drafts(self) -> None:
        """Remove what processes that were killed while they made a claim have left."""
        for draft in self.file.parent.glob(f"{glob.escape(self.file.name)}.*"):
            pid = draft.suffix[1:]
            if pid.isdigit() and not process_birth(int(pid)):
                with suppress(OSError):
                    draft.unlink()

    def _is_mine(self) -> bool:
        said = json_or_none(self.file, limit=MAX_BYTES) or {}
        return (said.get("host"), said.get("pid")) == (socket.gethostname(), os.getpid())

    def _discard(self) -> None:
        """Remove the claim of a holder that is gone, unless another start has replaced it since.

        Starts agree by a lock on the file itself: who waits for it finds another file under the name.
        """
        with suppress(FileNotFoundError), open(self.file, "r+", encoding="utf-8") as file:
            with suppress(OSError):  # without locks on this file system, what follows is all there is
                lock(file)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(self.file)) and not self._holder()[0]:
                self.file.unlink()
                self.taken_over = True

    def _renew(self) -> None:
        while not self._stop.wait(RENEWAL):
            with suppress(OSError):  # a lost mount is the writer's to report
                os.utime(self.file)

    def _is_renewed(self) -> bool:
        """Wait until the claim of another host lapses or is given back; True if it is renewed meanwhile."""
        with suppress(FileNotFoundError):
            first = self.file.stat().st_mtime
            while self._now() - first < TAKEOVER:
                if self.file.stat().st_mtime != first:
                    return True
                time.sleep(RENEWAL / 20)
        return False

    def _holder(self) -> tuple[str, bool]:
        """(Who holds the claim, in words, or empty when the holder is gone; whether it is a process of this host)."""
        try:
            said = read_json(self.file, limit=MAX_BYTES)
            host, pid, born = said["host"], int(said["pid"]), said["born"]
            age = self._now() - self.file.stat().st_mtime
        except FileNotFoundError:
            return "", True
        except (OSError, UserError, ValueError, KeyError, TypeError):
            # Half-written: by someone who is at it now, or who died in between.
            with suppress(OSError):
                return "another process" if self._now() - self.file.stat().st_mtime < 5 else "", True
            return "", True
        if host == socket.gethostname():
            alive = process_birth(pid) == born and born != 0
            return f"process {pid} of this host" if alive else "", True
        return f"process {pid} of {host}" if age < TAKEOVER else "", False

    def _now(self) -> float:
        """The time by the clock of the file system that the claim lies on, which may be another machine's."""
        probe = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        try:
            probe.touch()
            return probe.stat().st_mtime
        except OSError:
            return time.time()
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
