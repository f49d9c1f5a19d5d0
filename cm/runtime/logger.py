"""Metrics and messages of a run: a table on the screen, log.txt, progress.csv, progress.jsonl, TensorBoard.

`logkv` and `logkv_mean` collect values (numbers, or 0-dim tensors that stay on their device); `dumpkvs` averages them
over ranks, writes one row and starts anew. Files are appended to. Only rank 0 writes rows; the messages of another rank
go to log-rank001.txt and so on. Before `configure`, messages and tables go to the screen only.
"""

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cm.errors import UserError, masked
from cm.runtime import distributed, launch
from cm.runtime.log_writers import (
    HumanOutputFormat,
    KVWriter,
    SeqWriter,
    is_number,
    make_output_format,
)
from cm.runtime.streams import screen

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50


class Logger:
    """Collects values and messages and hands them to its writers.

    `comm` may be an mpi4py communicator to average over; without one, the ranks of `torch.distributed` do.
    """

    def __init__(self, dir: str | None, output_formats: list[KVWriter], comm: Any = None):
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm
        self.level = INFO
        self._values: dict[str, tuple[Any, int]] = {}  # key -> sum, count

    def logkv(self, key: str, val: Any) -> None:
        """Set a value of the next row."""
        self._values[key] = (val.detach() if isinstance(val, torch.Tensor) else val, 1)

    def logkv_mean(self, key: str, val: Any) -> None:
        """Add to a value that the next row holds as a mean. 0-dim tensors are summed where they are."""
        val = val.detach().double() if isinstance(val, torch.Tensor) else val
        total, count = self._values.get(key, (0.0, 0))
        self._values[key] = (total + val, count + 1)

    def getkvs(self) -> dict[str, Any]:
        """This rank's values so far, not yet averaged over ranks."""
        return {key: total / count if count > 1 else total for key, (total, count) in self._values.items()}

    def dumpkvs(self) -> dict[str, Any]:
        """Average over ranks, write one row, start anew; returns the row. All ranks must call it.

        A key may be missing on some ranks. Each rank counts as often as it logged the key.
        """
        row = mpi_weighted_mean(self.comm, _to_numbers(self._values))
        self._values = {}
        self._to(self._row_writers(), lambda writer: writer.writekvs(row))
        return row

    def log_flags(self, flags: dict[str, Any]) -> None:
        """Hand the flags of the run to the writers that keep them."""
        self._to(self._row_writers(), lambda writer: writer.writeflags(flags))

    def log_picture(self, name: str, path: str | os.PathLike, step: int) -> None:
        """Hand a PNG file to the writers that show pictures."""
        self._to(self._row_writers(), lambda writer: writer.writepicture(name, path, step))

    def _row_writers(self) -> list[KVWriter]:
        """Those that write rows; none on other ranks than 0."""
        here = self.level != DISABLED and distributed.is_main()
        return [writer for writer in self.output_formats if isinstance(writer, KVWriter)] if here else []

    def log(self, *args: Any, level: int = INFO) -> None:
        """Write a message when its level reaches the logger's."""
        if level >= self.level:
            self._do_log(args)

    def set_level(self, level: int) -> None:
        """Least level of messages to write; DISABLED also stops rows."""
        self.level = level

    def set_comm(self, comm: Any) -> None:
        """Average over the ranks of an mpi4py communicator from now on."""
        self.comm = comm

    def get_dir(self) -> str | None:
        """Folder of the log files; None when there is none."""
        return self.dir

    def close(self) -> None:
        """Close all writers."""
        for writer in self.output_formats:
            writer.close()

    def _do_log(self, args: tuple) -> None:
        writers = [writer for writer in self.output_formats if isinstance(writer, SeqWriter)]
        self._to(writers, lambda writer: writer.writeseq([masked(str(arg)) for arg in args]))

    def _to(self, writers: list, write: Callable[[Any], None]) -> None:
        """Call a function with each writer; UserError when the storage fails."""
        for writer in writers:
            try:
                write(writer)
            except OSError as error:
                raise _unwritable(self.dir, error) from error


def mpi_weighted_mean(comm: Any, local_name2valcount: dict[str, tuple[Any, int]]) -> dict[str, Any]:
    """Means over ranks of {name: (mean on this rank, count)}, weighted by count; the same dict on every rank.

    What is equal on all ranks (a step, a text) is kept as it is; of unequal texts the lowest rank's wins.
    """
    gather = distributed.all_gather_object if comm is None else comm.allgather
    collected: dict[str, list[tuple[Any, int]]] = {}
    for rank_values in gather(local_name2valcount):
        for key, pair in rank_values.items():
            collected.setdefault(key, []).append(pair)
    return {key: _mean(pairs) for key, pairs in collected.items()}


def _mean(pairs: list[tuple[Any, int]]) -> Any:
    first = pairs[0][0]
    if not all(is_number(value) for value, _ in pairs) or all(value == first for value, _ in pairs):
        return first
    return sum(value * count for value, count in pairs) / sum(count for _, count in pairs)


def _to_numbers(values: dict[str, tuple[Any, int]]) -> dict[str, tuple[Any, int]]:
    """Means in plain Python numbers; all tensors of a device come over in one transfer."""
    result = dict(values)
    by_device: dict[torch.device, list[str]] = {}
    for key, (total, _) in values.items():
        if isinstance(total, torch.Tensor):
            by_device.setdefault(total.device, []).append(key)
    for keys in by_device.values():
        numbers = torch.stack([values[key][0].double().reshape(()) for key in keys]).tolist()
        for key, number in zip(keys, numbers, strict=True):
            is_float = values[key][0].is_floating_point()
            result[key] = (number if is_float else int(number), values[key][1])
    return {key: (_plain(total) / n if n > 1 else _plain(total), n) for key, (total, n) in result.items()}


def _plain(value: Any) -> Any:
    """NumPy scalars as Python numbers."""
    return value.item() if hasattr(value, "item") else value


def _unwritable(folder: str | None, error: OSError) -> UserError:
    return UserError(f"cannot write logs to {error.filename or folder}: {error.strerror or error}")


# The logger in use: the configured one, or one that only prints.
_current: Logger | None = None


def get_current() -> Logger:
    """The configured logger, or a plain one that prints on rank 0."""
    global _current
    if _current is None:
        _current = Logger(None, [HumanOutputFormat(screen(sys.stdout))] if distributed.is_main() else [])
    return _current


def configure(
    dir: str | os.PathLike | None = None,
    format_strs: list[str] | None = None,
    comm: Any = None,
    log_suffix: str = "",
    resume_step: int | None = None,
) -> None:
    """Log into a folder: `dir`, else OPENAI_LOGDIR, else a new folder under ./runs. All ranks call it.

    Formats: `format_strs`, else OPENAI_LOG_FORMAT (names with commas), else stdout, log, csv and json. With
    `resume_step`, rows of later steps are dropped first, so that the log of a resumed run equals an uninterrupted one.
    """
    global _current
    dir = dir or os.environ.get("OPENAI_LOGDIR")
    if dir is None:
        stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
        dir = distributed.broadcast_object(os.path.join("runs", stamp))
    dir = os.path.expanduser(os.fspath(dir))
    rank = distributed.get_rank() or launch.detect().rank
    if rank > 0:
        format_strs, log_suffix = ["log"], f"{log_suffix}-rank{rank:03d}"
    elif format_strs is None:
        format_strs = os.environ.get("OPENAI_LOG_FORMAT", "stdout,log,csv,json").split(",")
    try:
        writers = [make_output_format(name, dir, log_suffix) for name in format_strs if name]
        if resume_step is not None:
            for writer in writers:
                writer.truncate_after(resume_step)
    except OSError as error:
        raise _unwritable(dir, error) from error
    _current = Logger(dir, writers, comm)


def reset() -> None:
    """Close the configured logger; messages go to the screen again."""
    global _current
    if _current is not None:
        _current.close()
        _current = None


@contextlib.contextmanager
def scoped_configure(
    dir: str | os.PathLike | None = None, format_strs: list[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """`configure` for the length of a with block."""
    global _current
    previous = _current
    configure(dir, format_strs, comm)
    try:
        yield
    finally:
        _current.close()
        _current = previous


def logkv(key: str, val: Any) -> None:
    """Set a value of the next row."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: Any) -> None:
    """Add to a value that the next row holds as a mean."""
    get_current().logkv_mean(key, val)


def logkvs(d: dict[str, Any]) -> None:
    """Set several values of the next row."""
    for key, val in d.items():
        logkv(key, val)


def dumpkvs() -> dict[str, Any]:
    """Average over ranks, write one row, start anew; returns the row. All ranks must call it."""
    return get_current().dumpkvs()


def getkvs() -> dict[str, Any]:
    """This rank's values so far."""
    return get_current().getkvs()


def log(*args: Any, level: int = INFO) -> None:
    """Write a message: its parts, separated by spaces."""
    get_current().log(*args, level=level)


def log_flags(flags: dict[str, Any]) -> None:
    """Hand the flags of the run to the writers that keep them."""
    get_current().log_flags(flags)


def log_picture(name: str, path: str | os.PathLike, step: int) -> None:
    """Hand a PNG file to the writers that show pictures."""
    get_current().log_picture(name, path, step)


def warn(*args: Any) -> None:
    """`log` at level WARN."""
    log(*args, level=WARN)


def get_dir() -> str:
    """Folder of this run's files; configures the default folder when nothing is configured."""
    if get_current().dir is None:
        configure()
    return get_current().get_dir()
