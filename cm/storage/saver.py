"""Checkpoints of a run, written in the background: the training loop waits for the copy to host memory only."""

import contextlib
import os
import threading
import traceback
from pathlib import Path

import torch
from torch import Tensor

from cm.errors import UserError
from cm.runtime import distributed, logger
from cm.runtime.provenance import versions
from cm.storage.checkpoint import begin_checkpoint, complete_checkpoints, prune_checkpoints, write_checkpoint
from cm.storage.mirror import Mirror
from cm.storage.shards import save_shards
from cm.storage.weights import map_tensors


class Saver:
    """Writes the checkpoints of a run from rank 0 and deletes old ones; every rank calls every method.

    At most one write is under way: the next save waits for it. A failed write raises the same error on all ranks, at
    the next `save`, `wait` or `check`. With on_error "warn" it is a warning, except for the last one (`finish`).
    meta: what every checkpoint says of the run, beside the versions it was made with.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        *,
        keep_last: int = 0,
        keep_every: int = 0,
        meta: dict | None = None,
        background: bool = False,
        on_error: str = "stop",
        mirror: Mirror | None = None,
    ):
        self.run_dir = Path(run_dir)
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.meta = {"versions": versions(), **(meta or {})}
        self.background = background
        self.on_error = on_error
        self.mirror = mirror
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None  # why the last write failed
        self._folder = self.run_dir / "checkpoints"
        if distributed.is_main():
            with contextlib.suppress(OSError):  # the first save will say so
                self._folder.mkdir(parents=True, exist_ok=True)

    @property
    def failed(self) -> bool:
        """Whether a write has failed in a way that should end the run; known to rank 0 only."""
        tolerated = self.on_error == "warn" and isinstance(self._problem, UserError)
        return self._problem is not None and not tolerated

    def save(self, files: dict[str, dict], scalars: dict) -> None:
        """Write one checkpoint: tensors by file name, and the JSON part with its "step".

        Returns when both are copied (in the background) or on disk.
        """
        self.wait()
        if distributed.is_main():
            if self.background:
                arguments = (copy_to_host(files), scalars)
                self._thread = threading.Thread(target=self._write, args=arguments, name="saver")
                self._thread.start()
            else:
                self._write(files, scalars)
        if not self.background:
            self.check()

    def save_shards(self, shards: dict[str, Tensor], files: dict[str, dict], scalars: dict) -> None:
        """As `save`, with tensors of which each rank has a part and writes it. Returns when all is on disk."""
        self.wait()
        try:
            begun = distributed.on_main(lambda: self._begin(scalars["step"]))
            save_shards(begun, shards)
        except UserError as error:  # on all ranks
            if distributed.is_main():
                self._fail_save(scalars["step"], error)
        else:
            if distributed.is_main():
                self._write(files, scalars, begun)
        self.check()

    def _begin(self, step: int) -> Path:
        try:
            os.stat(self._folder)
            return begin_checkpoint(self.run_dir, step)
        except OSError as error:
            raise UserError(str(error)) from None

    def catch_up(self) -> None:
        """Give the mirror the newest complete checkpoint if it lacks it; a failure is one of a save."""
        if self.mirror is None:
            return
        self.wait()
        if distributed.is_main():
            try:
                self._problem = None
                self.mirror.catch_up()
            except (OSError, UserError) as error:
                self._fail(f"could not copy the newest checkpoint to the mirror: {error}")
        self.check()

    def wait(self) -> None:
        """Wait for the write that is under way, if any."""
        self.join()
        self.check()

    def check(self) -> None:
        """Raise the error of the last finished write, on all ranks."""
        problem = distributed.broadcast_object(self._problem if self.failed else None)
        if problem is not None:
            raise problem

    def finish(self) -> None:
        """End of the run: as `wait`, but a failed last write is an error whatever on_error says."""
        self.on_error = "stop"
        self.wait()
        self.catch_up()

    def join(self) -> None:
        """Let the write under way end, without a word to other ranks: for a run that ends by an error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, files: dict[str, dict], scalars: dict, begun: Path | None = None) -> None:
        step, self._problem = scalars["step"], None
        try:
            # Where a mount has gone, the folder must not be made anew on the disk below it.
            os.stat(self._folder)
            path = write_checkpoint(self.run_dir, step, files, scalars, self.meta, begun)
            logger.log(f"saved {path}")
            if self.mirror is not None:
                self.mirror.push(path)
        except (OSError, UserError) as error:
            self._fail_save(step, error)
            return
        except Exception:
            self._problem = RuntimeError(f"could not save step {step}:\n{traceback.format_exc()}")
            return
        try:
            prune_checkpoints(self.run_dir, self.keep_last, self.keep_every)
        except (OSError, UserError) as error:
            logger.warn(f"warning: an old checkpoint could not be deleted: {error}")

    def _fail_save(self, step: int, error: Exception) -> None:
        self._fail(f"could not save step {step} under {self.run_dir}: {error}{self._remaining()}")

    def _fail(self, text: str) -> None:
        self._problem = UserError(text)
        if self.on_error == "warn":
            logger.warn(f"warning: {text}; training goes on to the next save")

    def _remaining(self) -> str:
        try:
            earlier = complete_checkpoints(self.run_dir)
        except (OSError, UserError):
            return ""
        return f"; the newest complete checkpoint is {earlier[-1]}" if earlier else ""


class Snapshot(dict):
    """The content of a file whose tensors training does not touch, so that they need not be copied once more."""


def copy_to_host(content: dict) -> dict:
    """A copy of nested tensors that training does not touch; from a GPU through page-locked memory, all at once.

    Snapshots among the values are taken as they are.
    """
    streams = set()

    def copy(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.device.type != "cuda":
            return tensor.clone()
        streams.add(torch.cuda.current_stream(tensor.device))
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    copied = {k: v if isinstance(v, Snapshot) else map_tensors(v, copy) for k, v in content.items()}
    for stream in streams:
        stream.synchronize()
    return copied
