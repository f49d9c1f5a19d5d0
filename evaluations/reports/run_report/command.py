"""One HTML page about training runs, in one file: curves, previews, samples, metrics, configurations, provenance.

    python -m evaluations.reports.run_report.command RUN [RUN ...] [--out PAGE.html]

A run that is still going on is shown as it is now. Results are looked for in each run, in the folders beside it, and in
--results.
"""

import argparse
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cm import __version__
from cm.config.fields import flags_of
from cm.config.parsing import expanded
from cm.config.rows import METRICS, OBJECTIVES
from cm.config.scripts import SCRIPTS, configuration_class
from cm.errors import UserError, extra
from cm.runtime import job, liveness
from cm.runtime.claims import claimed_place
from cm.runtime.inputs import json_or_none, listed, misfit, open_regular, read_regular
from cm.storage.filesystem import write_atomic
from cm.tools.findings import Finding, find_results, metric_names
from cm.tools.runs import Run, number, read_run, since
from evaluations.reports.run_report.curves import COLOURS, Picture, curves, data_uri, fid_by_nfe, short

PREVIEWS = 40  # steps shown at most: the page holds every picture
MESSAGES = 40
LARGEST_PICTURE = 64 << 20  # bytes
LOG_TAIL = 1 << 20  # bytes of log.txt in which the last messages are looked for
# Flags that say where a run lies and not what it is
PLACES = {"out_dir", "data_dir", "mirror", "config", "dry_run"}


def page(runs: Sequence[Run], *, results: Sequence[str] = (), previews: int = PREVIEWS) -> str:
    """The HTML of the page."""
    try:
        import jinja2
    except ImportError:
        raise UserError(f"the page needs jinja2: {extra('plots')}") from None
    findings = {run.name: find_results(run, results) for run in runs}
    everything = [f for found in findings.values() for f in found]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    environment.filters["counted"] = "{:,}".format
    strips = [
        strip for run, c in zip(runs, COLOURS * len(runs)) for strip in preview_strips(run, c, previews)
    ]
    return environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        runs=[card(run, colour) for run, colour in zip(runs, COLOURS * len(runs))],
        curves=curves(runs),
        strips=strips,
        steps=sorted({step for strip in strips for step, _ in strip["pictures"]}),
        grids=[grid(run, f) for run, found in findings.items() for f in found if f.picture],
        metrics=[
            (name, METRICS[name].title if name in METRICS else name) for name in metric_names(everything)
        ],
        results=[(run, f, values(f)) for run, found in findings.items() for f in found if f.metrics],
        fid=fid_by_nfe(findings),
        differences=differences(runs),
        version=__version__,
        now=time.strftime("%Y-%m-%d %H:%M"),
    )


def card(run: Run, colour: str) -> dict[str, Any]:
    """What the page says of one run besides its pictures."""
    chosen, defaults = configuration(run)
    return {
        "name": run.name,
        "colour": colour,
        "status": run.status,
        "share": min(100, 100 * run.step / run.total) if run.total else 0,
        "facts": facts(run),
        "notes": notes(run),
        "chosen": chosen,
        "defaults": defaults,
        "provenance": provenance(run),
        "messages": messages(run),
    }


def facts(run: Run) -> list[tuple[str, str]]:
    """The first things to know, as (name, value)."""
    c = run.config
    steps = f"{run.step:,}" + (f" of {run.total:,}" if run.total else "")
    side, channels = c.get("image_size"), c.get("in_channels") or 3
    size = f"{side} x {side}, " + {1: "grey", 3: "colour"}.get(channels, f"{channels} channels")
    classes = f", {c.get('num_classes')} classes" if c.get("class_cond") else ""
    return [
        ("experiment", c.get("preset") or "-"),
        ("objective", run.mode or "-"),
        ("step", steps),
        ("images seen", f"{int(run.last('samples') or 0):,}"),
        ("loss", number(run.last("loss"))),
        ("images per second", number(run.last("images_per_sec"))),
        ("images", size + classes),
        ("last row", f"{since(time.time() - run.written)} ago"),
    ]


def notes(run: Run) -> list[str]:
    """What a reader should know before the curves are believed."""
    found = []
    if not run.rows:
        found.append("No row has been logged yet: the first comes after --log_interval steps.")
    if skipped := int(run.last("skipped") or 0):
        found.append(f"{skipped} step(s) had numbers that were not finite and were skipped.")
    if odd := sum(
        any(isinstance(v, float) and not math.isfinite(v) for v in row.values()) for row in run.rows
    ):
        found.append(f"{odd} row(s) of the log hold numbers that are not finite; curves leave these out.")
    if run.mode in OBJECTIVES and OBJECTIVES[run.mode].consistency:
        found.append(
            "The consistency loss grows with the number of grid points N(k): it is no measure of quality."
        )
    return found


def configuration(run: Run) -> tuple[list[tuple[str, Any]], list[tuple[str, Any]]]:
    """(flags that differ from their defaults, flags that do not), each as (name, value)."""
    try:
        flags = flags_of(configuration_class(SCRIPTS[run.config["script"]], run.config))
    except UserError:  # a row of a plug-in that is not loaded
        flags = flags_of(SCRIPTS[run.config["script"]])
    items = [(name, value) for name, value in run.config.items() if not isinstance(value, dict)]
    same = {name for name, value in items if name in flags and str(value) == str(flags[name].default)}
    return [i for i in items if i[0] not in same], [i for i in items if i[0] in same]


def differences(runs: Sequence[Run]) -> tuple[list[tuple[str, list[Any]]], list[tuple[str, list[Any]]]]:
    """(flag, its value in each run) of the flags in which runs differ: those that all have, and those that some have.

    None stands for a flag that a run does not have.
    """
    names = dict.fromkeys(name for run in runs for name in run.config)
    rows = [(name, [run.config.get(name) for run in runs]) for name in names if name not in PLACES]
    rows = [(name, row) for name, row in rows if any(value != row[0] for value in row)]
    return [row for row in rows if None not in row[1]], [row for row in rows if None in row[1]]


def provenance(run: Run) -> list[tuple[str, str]]:
    """Where the run lies, what it was made from and with, and how it ended."""
    found = [("run directory", str(run.path.resolve()))]
    found += [("state", text)] if (text := liveness.describe_last_run(run.path)) else []
    for flag, title in (
        ("data_dir", "data"),
        ("teacher_model_path", "teacher"),
        ("resume_checkpoint", "resumed from"),
    ):
        found += [(title, run.config[flag])] if run.config.get(flag) else []
    checkpoints = run.checkpoints()
    if not checkpoints:
        return [*found, ("checkpoints", "none yet")]
    found.append(("checkpoints", ", ".join(path.name for path in checkpoints[-12:])))
    state = json_or_none(checkpoints[-1] / "state.json") or {}
    state = {} if misfit(state, {"versions": (dict, None)}) else state
    found += [("data fingerprint", str(state["data"]))] if state.get("data") else []
    found += [("images per step", str(state["global_batch_size"]))] if state.get("global_batch_size") else []
    versions = state.get("versions") or {}
    return [*found, ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]


def messages(run: Run) -> list[str]:
    """The last messages of log.txt, without its tables."""
    try:
        with open_regular(run.path / "log.txt") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - LOG_TAIL, 0))
            lines = file.read().decode(errors="replace").splitlines()
    except (OSError, UserError):
        return []
    return [line for line in lines if line and not line.startswith(("|", "---"))][-MESSAGES:]


def preview_strips(run: Run, colour: str, most: int) -> list[dict[str, Any]]:
    """The previews of a run, one strip per sampler: its name and (step, picture) in order, thinned out evenly."""
    strips: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted(run.path.glob("previews/step_*_*.png")):
        step, _, sampler = path.stem.removeprefix("step_").partition("_")
        if step.isdecimal():
            strips.setdefault(sampler, []).append((int(step), path))
    return [
        {
            "run": run.name,
            "colour": colour,
            "sampler": sampler,
            "pictures": [
                (step, data_uri(content, "png"))
                for step, path in thinned(sorted(found), most)
                if (content := picture(path))
            ],
        }
        for sampler, found in strips.items()
    ]


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many items, taken evenly, the first and the last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def picture(path: Path) -> bytes:
    """The bytes of a picture; empty for what cannot be read or is none."""
    try:
        return read_regular(path, LARGEST_PICTURE)
    except (OSError, UserError):
        return b""


def grid(run: str, finding: Finding) -> Picture:
    """The picture that image_sample drew beside its samples."""
    return Picture(
        f"{short(run)}: {described(finding)}", data_uri(picture(finding.picture), "png"), finding.source
    )


def described(f: Finding) -> str:
    """How samples were drawn, in a few words."""
    step = f", step {f.step:,}" if f.step else ""
    weights = f", weights {f.weights}" if f.weights else ""
    return f"{f.sampler}, {f.nfe} network evaluation{'s' * (f.nfe != 1)}{step}{weights}"


def values(finding: Finding) -> dict[str, str]:
    """The metrics of a finding as text, in their digits."""
    return {
        name: f"{value:.{METRICS[name].digits}f}" if name in METRICS else number(value)
        for name, value in finding.metrics.items()
    }


def distinct(runs: Iterable[Run]) -> list[Run]:
    """The runs, each once; UserError where two have one name, which the page could not tell apart."""
    found: dict[str, Run] = {}
    for run in runs:
        other = found.setdefault(run.name, run)
        if other.path.resolve() != run.path.resolve():
            raise UserError(f"{other.path} and {run.path} have one name: the page could not tell them apart")
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="cm report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", metavar="RUN", type=expanded, nargs="+", help="run directory; several are compared"
    )
    parser.add_argument(
        "--out", type=expanded, default="", help="default: RUN/report.html, for several runs report.html"
    )
    parser.add_argument(
        "--results",
        type=expanded,
        nargs="+",
        default=[],
        metavar="DIR",
        help="further folders with samples and results",
    )
    parser.add_argument(
        "--previews", type=int, default=PREVIEWS, help=f"steps shown at most (default: {PREVIEWS})"
    )
    options = parser.parse_args(argv)
    if options.previews < 2:
        raise UserError(f"--previews must be at least 2, got {options.previews}")
    runs = distinct(read_run(path) for path in options.runs)
    out = Path(options.out or (runs[0].path / "report.html" if len(runs) == 1 else "report.html"))
    for folder in options.results:
        if not Path(folder).is_dir():
            raise UserError(f"--results {folder}: no such folder")
        listed(folder)  # what lies in it may be passed over, but not the whole
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    with claimed_place(out, "--out"):
        html = page(runs, results=options.results, previews=options.previews)
        write_atomic(out, html.encode(errors="backslashreplace"))  # names that are not UTF-8
    print(f"report: {out} ({len(html) / 2**20:.1f} MiB)")


if __name__ == "__main__":
    job.run_main(main)
