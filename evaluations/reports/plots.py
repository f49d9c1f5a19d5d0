"""Line plots with error bars as PNG, drawn with Pillow alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cm.data.images import save_png

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 78, 190, 50, 56
COLORS = (
    (31, 119, 180),
    (214, 39, 40),
    (44, 160, 44),
    (148, 103, 189),
    (255, 127, 14),
    (23, 160, 170),
    (90, 90, 90),
)
INK, GRID = (40, 40, 40), (225, 225, 225)


@dataclass(frozen=True)
class Series:
    """One line: its name, x and y, and optional half-lengths of error bars. `dashed` marks published numbers."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()
    dashed: bool = False


def line_plot(
    path: str | Path, series: Sequence[Series], *, title: str, x_label: str, y_label: str, log_x: bool = False
) -> None:
    """Write a plot of all series; points are marked, so that a series of one point shows."""
    from PIL import Image, ImageDraw

    series = [s for s in series if len(s.x)]
    if not series:
        raise ValueError(f"{title}: nothing to plot")
    image = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    to_x = _Axis([x for s in series for x in s.x], LEFT, WIDTH - RIGHT, log_x)
    spread = [y + e for s in series for y, e in zip(s.y, s.error or [0] * len(s.y))]
    spread += [y - e for s in series for y, e in zip(s.y, s.error or [0] * len(s.y))]
    to_y = _Axis(spread, HEIGHT - BOTTOM, TOP)
    _draw_frame(draw, to_x, to_y, title, x_label, y_label)
    for i, s in enumerate(series):
        color = COLORS[i % len(COLORS)]
        points = sorted(zip(s.x, s.y, s.error or [0] * len(s.x)))
        pixels = [(to_x(x), to_y(y)) for x, y, _ in points]
        for a, b in pairwise(pixels):
            _line(draw, a, b, color, s.dashed)
        for (x, y), (_, value, error) in zip(pixels, points):
            if error:
                draw.line([(x, to_y(value - error)), (x, to_y(value + error))], fill=color)
            draw.ellipse(
                [x - 3, y - 3, x + 3, y + 3], fill=(255, 255, 255) if s.dashed else color, outline=color
            )
        row = TOP + 6 + 18 * i
        _line(draw, (WIDTH - RIGHT + 12, row), (WIDTH - RIGHT + 36, row), color, s.dashed)
        draw.text((WIDTH - RIGHT + 42, row - 6), s.name, fill=INK)
    save_png(path, image)


class _Axis:
    """Maps values to pixels, linearly or by logarithm, with a margin, and knows round tick values."""

    def __init__(self, values: Sequence[float], start: float, stop: float, log: bool = False):
        self._log = log
        low, high = min(map(self._scaled, values)), max(map(self._scaled, values))
        margin = 0.05 * (high - low) or max(abs(high) * 0.05, 0.5)
        self._low, self._high, self._start, self._stop = low - margin, high + margin, start, stop
        self.ticks = sorted(set(values)) if log else self._round_ticks()

    def _scaled(self, value: float) -> float:
        return math.log(value) if self._log else value

    def _round_ticks(self) -> list[float]:
        raw = (self._high - self._low) / 6
        power = 10 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
        first = math.ceil(self._low / step)
        return [i * step for i in range(first, math.floor(self._high / step) + 1)]

    def __call__(self, value: float) -> float:
        share = (self._scaled(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._stop - self._start)


def _draw_frame(draw, to_x: _Axis, to_y: _Axis, title: str, x_label: str, y_label: str) -> None:
    for tick in to_x.ticks:
        x = to_x(tick)
        draw.line([(x, TOP), (x, HEIGHT - BOTTOM)], fill=GRID)
        draw.text((x, HEIGHT - BOTTOM + 6), f"{tick:.6g}", fill=INK, anchor="ma")
    for tick in to_y.ticks:
        y = to_y(tick)
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=GRID)
        draw.text((LEFT - 6, y), f"{tick:.6g}", fill=INK, anchor="rm")
    draw.rectangle([LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM], outline=INK)
    draw.text((LEFT, 10), title, fill=INK)
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 22), x_label, fill=INK, anchor="ma")
    draw.text((LEFT, TOP - 16), y_label, fill=INK)


def _line(
    draw, a: tuple[float, float], b: tuple[float, float], color: tuple[int, int, int], dashed: bool
) -> None:
    if not dashed:
        draw.line([a, b], fill=color, width=2)
        return
    pieces = max(1, round(math.dist(a, b) / 8))
    for i in range(0, pieces, 2):
        ends = [
            (a[0] + (b[0] - a[0]) * t / pieces, a[1] + (b[1] - a[1]) * t / pieces)
            for t in (i, min(i + 1, pieces))
        ]
        draw.line(ends, fill=color)
