"""Line plots and pages of images as PNG. matplotlib (extra `plots`) is imported when something is drawn."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cm.errors import UserError, extra
from cm.storage.filesystem import write_atomic

Figure = Any  # matplotlib's
DPI = 100
TILE = 48  # pixels: smaller images are enlarged to at least this size on a page
MARKERS = "os^"
TITLE = 0.32  # inches above the images of a block
LEGEND_LINE = 0.22  # inches of a row of a legend


@dataclass(frozen=True)
class Series:
    """One line: its name, x and y, and optional half-lengths of error bars. `dashed` marks published numbers."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Block:
    """A titled strip of a page. groups: images (rows, columns, H, W, C) uint8 that are shown side by side."""

    title: str
    groups: Sequence[np.ndarray]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches. Without pyplot there is no window: savefig uses the Agg backend."""
    try:
        from matplotlib import figure
    except ImportError:
        raise UserError(f"pictures of reports need matplotlib: {extra('plots')}") from None
    return figure.Figure((width, height), dpi=DPI, layout="constrained")


def saved(figure: Figure, path: str | os.PathLike) -> Figure:
    """The figure, written as PNG, all of it or nothing."""
    write_atomic(path, lambda file: figure.savefig(file, format="png"))
    return figure


def line_plot(
    path: str | os.PathLike,
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
) -> Figure:
    """Write a plot of all series; points are marked, so that a series of one point shows.

    x holds whole numbers. y is logarithmic when it is positive and spans more than a factor of ten.
    """
    series = [s for s in series if len(s.x)]
    if not series:
        raise ValueError(f"{title}: nothing to plot")
    figure = new_figure(7.2, max(4.4, 0.4 + LEGEND_LINE * len(series)))
    axes = figure.subplots()
    for i, s in enumerate(series):
        x, y, error = zip(*sorted(zip(s.x, s.y, s.error or [0] * len(s.x))))
        style = {"linestyle": "--", "markerfacecolor": "white"} if s.dashed else {}
        marker = MARKERS[i // 10 % len(MARKERS)]  # there are ten colours
        axes.errorbar(x, y, error if s.error else None, marker=marker, label=s.name, **style)
    if log_x:
        ticks = sorted({x for s in series for x in s.x})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    values = [y for s in series for y in s.y]
    if 0 < 10 * min(values) < max(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    figure.suptitle(title, x=0.01, ha="left")  # a title of the axes would run into the legend
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    return saved(figure, path)


def image_page(path: str | os.PathLike, blocks: Sequence[Block]) -> Figure:
    """Write a page with the blocks below one another."""
    size = blocks[0].groups[0].shape[2]
    tile = size * -(-TILE // size) / DPI
    heights = [TITLE + tile * block.groups[0].shape[0] for block in blocks]
    columns = max(sum(group.shape[1] for group in block.groups) for block in blocks)
    figure = new_figure(tile * (columns + 0.6), sum(heights))
    figure.get_layout_engine().set(h_pad=0.02, hspace=0)
    strips = figure.subfigures(len(blocks), squeeze=False, height_ratios=heights)[:, 0]
    for block, strip in zip(blocks, strips):
        strip.suptitle(block.title, x=0.002, ha="left", fontsize=9)
        widths = [group.shape[1] for group in block.groups]
        for axes, group in zip(
            strip.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0], block.groups
        ):
            draw_grid(axes, group)
    return saved(figure, path)


def draw_grid(axes, images: np.ndarray) -> None:
    """Show (rows, columns, H, W, C) images as one picture with white lines between them."""
    rows, columns, height, width, channels = images.shape
    joined = images.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    axes.imshow(joined.repeat(3 // channels, axis=2), interpolation="nearest")
    axes.set_xticks(width * np.arange(1, columns) - 0.5, [])
    axes.set_yticks(height * np.arange(1, rows) - 0.5, [])
    axes.grid(color="white", linewidth=1.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_anchor("W")
