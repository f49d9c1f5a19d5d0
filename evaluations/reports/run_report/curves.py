"""Curves of runs as SVG: losses, norms, speed, memory, schedules, and FID against network evaluations."""

import base64
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from cm.tools.findings import Finding
from cm.tools.runs import Run
from evaluations.reports.plots import new_figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; one per run
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Noise levels from the lowest quartile to the highest
QUARTILES = ("#d9a400", "#35b779", "#31688e", "#440154")
LEVELS = ("lowest noise", "low", "high", "highest noise")
WIDTH, HEIGHT = 4.4, 2.8  # inches
# Longer curves are drawn thin, with a running median over this part of them on top.
SMOOTH_FROM, WINDOW = 120, 1 / 40
MOST_POINTS = 3000
LONGEST = 30  # letters of a run's name in a title or a legend


@dataclass(frozen=True)
class Panel:
    """One plot: the column of the log that it shows. whole: its values are whole numbers."""

    title: str
    key: str
    log: bool = False
    whole: bool = False
    note: str = ""


PANELS = (
    Panel("Loss", "loss", log=True),
    Panel("Squared error of the denoised image", "xs_mse", log=True),
    Panel("Gradient norm", "grad_norm", log=True),
    Panel("Parameter norm", "param_norm"),
    Panel("Images per second", "images_per_sec"),
    Panel("Peak memory (MiB)", "peak_memory_mib"),
    Panel("Share of time spent waiting for data", "data_wait"),
    Panel("Learning rate", "lr"),
    Panel("Grid points N(k)", "num_scales", whole=True),
    Panel("Target decay mu(k)", "target_ema"),
    Panel("Steps skipped for numbers that are not finite", "skipped"),
    Panel("log2 of the loss scale", "lg_loss_scale"),
)
KNOWN = {"step", "samples", *(panel.key for panel in PANELS)}


@dataclass(frozen=True)
class Picture:
    """A drawn plot: title, SVG as a data URI, and a sentence below it."""

    title: str
    uri: str
    note: str = ""


def short(name: str) -> str:
    """A run's name where there is little room: its middle is left out, for its end tells runs of a sweep apart."""
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST // 3]}…{name[LONGEST // 3 + 1 - LONGEST :]}"


def curves(runs: Sequence[Run]) -> list[Picture]:
    """Every plot for which there are numbers: the known columns, losses by noise level, then any other column."""
    drawn = [_panel(panel, runs) for panel in PANELS]
    by_level = [picture for run in runs for picture in _by_noise_level(run, several=len(runs) > 1)]
    others = [_panel(Panel(key, key), runs) for key in _other_keys(runs)]
    found = [drawn[0], *by_level, *drawn[1:], *others]
    return [picture for picture in found if picture is not None]


def _other_keys(runs: Iterable[Run]) -> list[str]:
    keys = {
        key
        for run in runs
        for row in run.rows
        for key, value in row.items()
        if isinstance(value, int | float)
    }
    return sorted(key for key in keys - KNOWN if key[-3:-1] != "_q")


def _series(run: Run, key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a column, its finite ones; long ones are thinned out evenly."""
    rows = [row for row in run.rows if isinstance(row.get(key), int | float) and math.isfinite(row[key])]
    rows = rows[:: max(1, len(rows) // MOST_POINTS)]
    return [row["step"] for row in rows], [row[key] for row in rows]


def _panel(panel: Panel, runs: Sequence[Run]) -> Picture | None:
    series = [
        (short(run.name), colour, *_series(run, panel.key)) for run, colour in zip(runs, cycle(COLOURS))
    ]
    series = [s for s in series if s[-1]]
    # A column that never changes is told by the configuration, or says nothing.
    if len({value for *_, y in series for value in y}) < 2:
        return None
    figure, axes = _axes("step")
    for name, colour, x, y in series:
        _draw(axes, x, y, colour, name)
    if panel.whole:
        axes.yaxis.get_major_locator().set_params(integer=True)
    _finish(axes, [v for *_, y in series for v in y], log=panel.log, legend=len(runs) > 1)
    return Picture(panel.title, _svg(figure), panel.note)


def _by_noise_level(run: Run, *, several: bool) -> Iterable[Picture]:
    """The loss in four bands of equal width in ln sigma, between sigma_min and sigma_max."""
    series = [_series(run, f"loss_q{q}") for q in range(len(QUARTILES))]
    if not any(y for _, y in series):
        return
    figure, axes = _axes("step")
    for (x, y), colour, name in zip(series, QUARTILES, LEVELS):
        if y:
            _draw(axes, x, y, colour, name)
    _finish(axes, [v for _, y in series for v in y], log=True, legend=True)
    title = "Loss by noise level" + (f": {short(run.name)}" if several else "")
    yield Picture(title, _svg(figure), "Four bands of equal width in ln sigma.")


def fid_by_nfe(findings: dict[str, list[Finding]]) -> Picture | None:
    """FID against network evaluations; a line joins the best of each number of evaluations of a run and a protocol."""
    groups: dict[str, list[Finding]] = {}
    for run, found in findings.items():
        for f in found:
            if "fid" in f.metrics and f.nfe:
                named = f"{short(run)} ({f.protocol})" if f.protocol else short(run)
                groups.setdefault(named, []).append(f)
    if not groups:
        return None
    figure, axes = _axes("network evaluations per image")
    for (name, found), colour in zip(groups.items(), cycle(COLOURS)):
        best = {
            nfe: min(f.metrics["fid"] for f in found if f.nfe == nfe)
            for nfe in sorted({f.nfe for f in found})
        }
        axes.plot([f.nfe for f in found], [f.metrics["fid"] for f in found], "o", color=colour, alpha=0.35)
        axes.plot(list(best), list(best.values()), "-o", color=colour, label=name)
    ticks = sorted({f.nfe for found in groups.values() for f in found})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_ylabel("FID")
    values = [f.metrics["fid"] for found in groups.values() for f in found]
    _finish(axes, values, log=True, legend=True)
    note = (
        "Lower is better; lines join the best results. In brackets: the protocol, and numbers of different "
    )
    note += "protocols do not compare."
    return Picture("FID against network evaluations", _svg(figure), note)


def _axes(x_label: str) -> tuple[Any, Any]:
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def _draw(axes, x: Sequence[float], y: Sequence[float], colour: str, name: str) -> None:
    if len(y) < SMOOTH_FROM:
        axes.plot(x, y, color=colour, label=name, linewidth=1.6, marker="o" if len(y) < 3 else None)
        return
    axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
    half = max(1, round(len(y) * WINDOW / 2))
    smooth = [statistics.median(y[max(0, i - half) : i + half + 1]) for i in range(len(y))]
    axes.plot(x, smooth, color=colour, label=name, linewidth=1.6)


def _finish(axes, values: Sequence[float], *, log: bool, legend: bool) -> None:
    if log and 0 < 3 * min(values) < max(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        if max(values) < 30 * min(values):  # few powers of ten: name others too
            axes.yaxis.set_minor_formatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "235" else "")
        else:
            axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        labels = axes.get_legend_handles_labels()[1]
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0, "columnspacing": 1.2}
        axes.legend(frameon=False, fontsize="small", ncols=min(4, len(labels)), handlelength=1.2, **above)


def _svg(figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return data_uri(file.getvalue(), "svg+xml")


def data_uri(content: bytes, kind: str) -> str:
    """An image as text that an HTML page holds."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
