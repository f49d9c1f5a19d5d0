"""One progress bar for everything that takes long: a bar on a terminal, a line now and then elsewhere."""

import sys
from collections.abc import Iterable
from typing import IO, Any

from cm.runtime import distributed
from cm.runtime.streams import screen

# Seconds between two lines where the output is no terminal: a file, or under mpiexec.
LINE_INTERVAL = 30.0


def progress(
    iterable: Iterable | None = None,
    *,
    total: int | None = None,
    desc: str = "",
    unit: str = "it",
    unit_scale: float = 1,
    initial: int = 0,
    enabled: bool = True,
) -> Any:
    """A tqdm bar on rank 0, silent on other ranks; iterate over it, or call `update(n)`.

    It shows the count, the time left and the speed in `unit` per second, each count being `unit_scale` units: steps of
    a global batch B are shown as images by unit="image", unit_scale=B. A resumed run starts at `initial`.
    """
    from tqdm import tqdm

    stream = screen(sys.stderr)
    options = {"dynamic_ncols": True, "file": stream}
    if not stream.isatty():
        options = {
            "file": _Lines(stream),
            "mininterval": LINE_INTERVAL,
            "maxinterval": LINE_INTERVAL,
            "miniters": 1,
            "bar_format": "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]",
        }
    return tqdm(
        iterable,
        total=total,
        desc=desc or "progress",
        unit=unit,
        unit_scale=unit_scale if unit_scale != 1 else False,
        initial=initial,
        disable=not (enabled and distributed.is_main()),
        **options,
    )


class _Lines:
    """Standard error for a tqdm that redraws its bar: each redraw becomes a line."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> None:
        text = text.strip()
        if text:
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()
