"""Writers of log rows and messages: screen line or table, text, CSV, JSON lines, TensorBoard.

Files are opened for each write and appended to, so that nothing is lost when the process dies and a resumed run goes
on in the same files.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from cm.errors import UserError, extra
from cm.runtime.files import whole_file
from cm.runtime.inputs import LINES_LIMIT, check_regular, open_regular, parse_json, read_regular
from cm.runtime.streams import screen


class KVWriter:
    """Receives the values of one dump."""

    def writekvs(self, kvs: dict[str, Any]) -> None:
        """Write one row."""
        raise NotImplementedError

    def writeflags(self, flags: dict[str, Any]) -> None:
        """Keep the flags of the run. Called once; most writers have no place for them."""

    def writepicture(self, name: str, path: str | os.PathLike, step: int) -> None:
        """Show a PNG file under a name. Most writers show none."""

    def truncate_after(self, step: int) -> None:
        """Drop the first row whose "step" exceeds `step`, and all rows after it. Called before the first write."""

    def close(self) -> None:
        """Release what the writer holds. Most hold nothing between writes."""


class SeqWriter:
    """Receives messages."""

    def writeseq(self, seq: list[str]) -> None:
        """Write one message, given as its parts."""
        raise NotImplementedError


class HumanOutputFormat(KVWriter, SeqWriter):
    """A table per dump and a line per message, to an open stream or appended to a file."""

    def __init__(self, filename_or_file: str | os.PathLike | IO[str]):
        self.target = filename_or_file
        if isinstance(self.target, str | os.PathLike):
            check_regular(self.target)  # a pipe would wait for a reader

    def writekvs(self, kvs: dict[str, Any]) -> None:
        cells = {
            key: f"{value:.4g}" if isinstance(value, float) else str(value)
            for key, value in sorted(kvs.items())
        }
        if not cells:
            return
        left, right = max(map(len, cells)), max(map(len, cells.values()))
        rule = "-" * (left + right + 7)
        rows = [f"| {key:<{left}} | {cell:<{right}} |" for key, cell in cells.items()]
        self._write("\n".join([rule, *rows, rule]) + "\n")

    def writeseq(self, seq: list[str]) -> None:
        self._write(" ".join(seq) + "\n")

    def _write(self, text: str) -> None:
        if isinstance(self.target, (str, os.PathLike)):
            with open(self.target, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        elif "tqdm" in sys.modules:
            # A running progress bar is redrawn below the text instead of being torn by it.
            sys.modules["tqdm"].tqdm.write(text, file=self.target, end="")
            self.target.flush()
        else:
            self.target.write(text)
            self.target.flush()


class LineOutputFormat(HumanOutputFormat):
    """A line per dump with what one watches of training, and a line per message. total: steps, 0 for no end."""

    def __init__(self, stream: IO[str], total: int = 0):
        super().__init__(stream)
        self.total = total

    def writekvs(self, kvs: dict[str, Any]) -> None:
        parts = {
            f"{kvs.get('step', '?')}/{self.total}" if self.total else f"{kvs.get('step', '?')}": "step"
            in kvs,
            f"loss {kvs.get('loss', math.nan):.4g}": "loss" in kvs,
            f"lr {kvs.get('lr', 0):.3g}": "lr" in kvs,
            f"N {kvs.get('num_scales')}": "num_scales" in kvs,
            f"{kvs.get('images_per_sec', 0):.3g} img/s": "images_per_sec" in kvs,
            f"ETA {self._left(kvs)}": bool(self._left(kvs)),
            f"mem {kvs.get('peak_memory_mib', 0) / 1024:.1f} GB": "peak_memory_mib" in kvs,
            f"skipped {kvs.get('skipped')}": bool(kvs.get("skipped")),
        }
        shown = [text for text, known in parts.items() if known]
        if shown:
            self._write("step " + "  ".join(shown) + "\n")

    def _left(self, kvs: dict[str, Any]) -> str:
        """Time to the last step at the present speed; empty where it cannot be told."""
        step, seen, speed = (kvs.get(key, 0) for key in ("step", "samples", "images_per_sec"))
        if not (self.total and step and speed):
            return ""
        return duration((self.total - step) * seen / step / speed)


class JSONOutputFormat(KVWriter):
    """One JSON object per line, appended; numbers that are not finite become null."""

    def __init__(self, filename: str | os.PathLike):
        self.path = Path(filename)
        _drop_torn_line(self.path)

    def writekvs(self, kvs: dict[str, Any]) -> None:
        row = {key: None if is_number(v) and not math.isfinite(v) else v for key, v in kvs.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")

    def truncate_after(self, step: int) -> None:
        if self.path.exists():
            with _readable(self.path):
                lines = read_regular(self.path, LINES_LIMIT).decode().splitlines(keepends=True)
            kept = _until(lines, [_json_step(line) for line in lines], step)
            with whole_file(self.path) as file:
                file.write("".join(kept).encode())


class CSVOutputFormat(KVWriter):
    """Comma-separated values, appended. A new key becomes a new last column: the file is rewritten, no row is lost."""

    def __init__(self, filename: str | os.PathLike):
        self.path = Path(filename)
        _drop_torn_line(self.path)
        self.keys = self._read()[0]

    def writekvs(self, kvs: dict[str, Any]) -> None:
        new = [key for key in kvs if key not in self.keys]
        if new:
            rows = self._read()[1]
            self.keys = self.keys + new
            self._rewrite(rows)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([kvs.get(key, "") for key in self.keys])

    def truncate_after(self, step: int) -> None:
        if "step" in self.keys:
            rows = self._read()[1]
            self._rewrite(_until(rows, [dict(zip(self.keys, row)).get("step") for row in rows], step))

    def _read(self) -> tuple[list[str], list[list[str]]]:
        if not self.path.exists():
            return [], []
        with _readable(self.path):
            text = read_regular(self.path, LINES_LIMIT).decode()
            header, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
        return header, rows

    def _rewrite(self, rows: list[list[str]]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.keys)
        writer.writerows(row + [""] * (len(self.keys) - len(row)) for row in rows)
        with whole_file(self.path) as file:
            file.write(text.getvalue().encode())


class TensorBoardOutputFormat(KVWriter):
    """For TensorBoard: scalars in groups at the row's "step" (else at a running count), previews, flags.

    Needs the package tensorboard.
    """

    def __init__(self, dir: str | os.PathLike):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"log format tensorboard needs the package tensorboard: {extra('tensorboard')}"
            ) from error
        self._open = functools.partial(SummaryWriter, os.fspath(dir))
        self._writer = None
        self._purge_step = None
        self._count = 0

    def writekvs(self, kvs: dict[str, Any]) -> None:
        writer = self._opened()
        self._count += 1
        step = int(kvs.get("step", self._count))
        for key, value in kvs.items():
            if is_number(value):
                writer.add_scalar(grouped(key), value, step)
        writer.flush()

    def writeflags(self, flags: dict[str, Any]) -> None:
        plain = {key: value if is_number(value) else str(value) for key, value in flags.items()}
        self._opened().add_hparams(plain, {}, run_name=".")

    def writepicture(self, name: str, path: str | os.PathLike, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._opened().add_image(f"previews/{name}", pixels, step, dataformats="HWC")

    def _opened(self) -> Any:
        self._writer = self._writer or self._open(purge_step=self._purge_step)
        return self._writer

    def truncate_after(self, step: int) -> None:
        self._purge_step = step + 1

    def close(self) -> None:
        if self._writer:
            self._writer.close()


class WandbOutputFormat(KVWriter):
    """For Weights & Biases: scalars, previews, flags. WANDB_MODE=offline keeps all in the folder.

    Needs the package wandb.
    """

    def __init__(self, folder: str, project: str):
        try:
            import wandb
        except ImportError:
            raise UserError(f"--wandb {project} needs the package wandb: {extra('wandb')}") from None
        self._wandb = wandb
        name = os.path.basename(os.path.abspath(folder))
        try:
            self._run = wandb.init(
                project=project, name=name, id=_identifier(folder), dir=folder, resume="allow"
            )
        except Exception as error:  # no account, no network, a project of somebody else: its own types
            why = " ".join(str(error).split())
            raise UserError(f"--wandb {project}: {why} (WANDB_MODE=offline needs no account)") from None

    def writekvs(self, kvs: dict[str, Any]) -> None:
        row = {grouped(key): value for key, value in kvs.items() if is_number(value)}
        self._run.log({**row, "step": kvs.get("step")})

    def writeflags(self, flags: dict[str, Any]) -> None:
        self._run.config.update(flags, allow_val_change=True)

    def writepicture(self, name: str, path: str | os.PathLike, step: int) -> None:
        self._run.log({f"previews/{name}": self._wandb.Image(os.fspath(path)), "step": step})

    def close(self) -> None:
        self._run.finish()


FORMATS: dict[str, Callable[..., KVWriter]] = {
    "line": lambda folder, suffix, total="0": LineOutputFormat(screen(sys.stdout), int(total)),
    "stdout": lambda folder, suffix: HumanOutputFormat(screen(sys.stdout)),
    "log": lambda folder, suffix: HumanOutputFormat(os.path.join(folder, f"log{suffix}.txt")),
    "json": lambda folder, suffix: JSONOutputFormat(os.path.join(folder, f"progress{suffix}.jsonl")),
    "csv": lambda folder, suffix: CSVOutputFormat(os.path.join(folder, f"progress{suffix}.csv")),
    "wandb": lambda folder, suffix, project="cm": WandbOutputFormat(folder, project),
    "tensorboard": lambda folder, suffix: TensorBoardOutputFormat(os.path.join(folder, f"tb{suffix}")),
}


def make_output_format(format: str, ev_dir: str, log_suffix: str = "") -> KVWriter:
    """A writer by name (a key of FORMATS) whose files lie in the folder `ev_dir`, created when missing.

    `line:800` says how many steps the run has.
    """
    name, _, argument = format.partition(":")
    if name not in FORMATS:
        raise UserError(f"log format {format!r} is unknown; choose from {', '.join(FORMATS)}")
    os.makedirs(ev_dir, exist_ok=True)
    return FORMATS[name](ev_dir, log_suffix, *([argument] if argument else []))


# What a key belongs to, by what it contains; the others are losses
TAIL = 1 << 16  # bytes read at a time from the end of a log
GROUPS = {
    "speed": ("images_per_sec", "data_wait", "peak_memory"),
    "schedule": ("lr", "num_scales", "target_ema", "scale"),
    "weights": ("norm",),
    "run": ("step", "samples", "skipped"),
}


def grouped(key: str) -> str:
    """`speed/images_per_sec`: a key under its group, as boards fold them."""
    for group, parts in GROUPS.items():
        if any(key.startswith(part) or key.endswith(part) for part in parts):
            return f"{group}/{key}"
    return f"loss/{key}"


def _identifier(folder: str) -> str:
    """The same for every start of a run in a folder."""
    return hashlib.sha256(os.path.abspath(folder).encode(errors="surrogatepass")).hexdigest()[:16]


def duration(seconds: float) -> str:
    """4:10, 2:00:10 or 3d 2:00 of a time to come."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def is_number(value: Any) -> bool:
    """True for what a table, CSV or TensorBoard shows as a number."""
    return isinstance(value, (int, float))


def _until(rows: list, steps: list, last: int) -> list:
    """The rows before the first whose step exceeds `last`; a row without a step belongs to the one before."""
    for index, step in enumerate(steps):
        with contextlib.suppress(TypeError, ValueError):
            if float(step) > last:
                return rows[:index]
    return rows


def _json_step(line: str) -> Any:
    try:
        return parse_json(line, "").get("step")
    except UserError:
        return None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """UserError when the body finds another kind of file than this program writes."""
    try:
        yield
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no log of a run ({error}): move it away") from None


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line without its line end: the process died, or the disk was full, while writing it."""
    if not path.exists():
        return
    with open_regular(path) as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:  # backwards, piece by piece: a log may be long
            start = max(end - TAIL, 0)
            file.seek(start)
            if (found := file.read(end - start).rfind(b"\n")) >= 0:
                end = start + found + 1
                break
            end = start
    if end < size:
        os.truncate(path, end)
