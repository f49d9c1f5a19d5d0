"""What a study found, from its result files: one JSON, tables within docs/study.md, plots, and a grid of samples."""

import json
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cm.data.images import save_json
from cm.runtime.inputs import parse_json, read_json
from cm.storage.filesystem import write_atomic
from evaluations.reports.figures import FIGURES, draw_figure
from evaluations.reports.plots import Block, Series, image_page, line_plot
from evaluations.reports.results import of_study
from evaluations.study.edits import edits_table, interpolation_table
from evaluations.study.levels import levels_table
from evaluations.study.methods import MANY, TEACHER, Method, Study, evaluations_of

Results = dict[str, dict[str, Any]]
COLUMNS = ("nfe1", "nfe2", "nfe4", "nfe8", MANY)
TITLES = {"nfe1": "one evaluation", "nfe2": "two", "nfe4": "four", "nfe8": "eight", MANY: "35"}
GRID = 12  # samples of each row of the grid
PAGE = "# Study\n"


class Bar(NamedTuple):
    """What the papers lead one to expect: a ratio of two distances, and the most that it may be."""

    text: str
    value: float | None
    limit: float

    @property
    def verdict(self) -> str:
        """Whether it is met; a dash where it was not measured."""
        return "-" if self.value is None else "yes" if self.value <= self.limit else "no"


def load(run: Path) -> Results:
    """Every result of a study's folder by its name."""
    files = sorted((run / "results").glob("*.json"))
    return {path.stem: read_json(path) for path in files}


def fid(results: Results, method: str, kind: str) -> float | None:
    """Mean distance over the seeds of a set; None where it was not measured."""
    found = results.get(f"{method}_{kind}")
    return found["metrics"]["fid"] if found else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def bars(study: Study, results: Results) -> list[Bar]:
    """The study's bars: quality of CD and CT, order of the later methods, two steps, and the teacher in one."""

    def of(method: str, kind: str = "nfe1") -> float | None:
        return fid(results, method, kind)

    teacher = of(TEACHER, MANY)
    found = [
        Bar("CD, one evaluation / teacher, 35", _ratio(of("cd"), teacher), 1.3),
        Bar("CD with iCT's loss, one evaluation / teacher, 35", _ratio(of("cd_huber"), teacher), 1.3),
        Bar("the same, trained twice as long", _ratio(of("cd_huber_long"), teacher), 1.3),
        Bar("CT, one evaluation / teacher, 35", _ratio(of("ct"), teacher), 2.5),
        Bar("iCT / CT, one evaluation", _ratio(of("ict"), of("ct")), 1.0),
        Bar("ECT / CT, one evaluation", _ratio(of("ect"), of("ct")), 1.0),
        Bar("CD / PD, one evaluation (Fig. 4)", _ratio(of("cd"), of("pd")), 1.0),
        Bar("CD with iCT's loss / PD, one evaluation", _ratio(of("cd_huber"), of("pd")), 1.0),
    ]
    students = {n: m for n, m in plain(study).items() if n != TEACHER}
    found += [
        Bar(f"{m.title}: two evaluations / one", _ratio(of(n, "nfe2"), of(n)), 1.0)
        for n, m in students.items()
        if of(n) is not None
    ]
    ones = [value for n in students if (value := of(n)) is not None]
    worst = max(ones) if ones else None
    return [*found, Bar("the worst student / the teacher, one evaluation", _ratio(worst, of(TEACHER)), 0.5)]


def bars_table(study: Study, results: Results) -> list[str]:
    """Markdown."""
    lines = ["| ratio of Fréchet distances | at most | measured | met |", "|---|---|---|---|"]
    for bar in bars(study, results):
        value = "-" if bar.value is None else f"{bar.value:.2f}"
        lines.append(f"| {bar.text} | {bar.limit:g} | {value} | {bar.verdict} |")
    return lines


def plain(study: Study) -> dict[str, Method]:
    """The methods themselves, without their variations and the runs of figures."""
    return {name: m for name, m in study.methods.items() if not (m.like or m.figure)}


def variations_table(study: Study, results: Results) -> list[str]:
    """Markdown: what was changed, beside the method as it is; one evaluation, or the teacher's many."""
    lines = ["| variation | images seen | Fréchet distance | without it |", "|---|---|---|---|"]
    for name, method in study.methods.items():
        for kind in method.sets if method.like else ():
            if found := results.get(f"{name}_{kind}"):
                before = fid(results, method.like, kind)
                cell = "-" if before is None else f"{before:.2f}"
                lines.append(f"| {method.title} | {found['images_seen']:,} | {_cell(found)} | {cell} |")
    return lines


def distances_table(study: Study, results: Results) -> list[str]:
    """Markdown: method x evaluations; the mean over seeds, and the bootstrap's standard deviation of the first."""
    lines = [
        "| method | images seen | " + " | ".join(TITLES[c] for c in COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for name, method in plain(study).items():
        sets = [results.get(f"{name}_{kind}") for kind in COLUMNS]
        if not any(sets):
            continue
        seen = next(s["images_seen"] for s in sets if s)
        cells = [_cell(s) if s else "" for s in sets]
        lines.append(f"| {method.title} | {seen:,} | " + " | ".join(cells) + " |")
    if "floor" in results:
        lines.append(f"| training images {'| ' * len(COLUMNS)}| {results['floor']['metrics']['fid']:.2f} |")
    return lines


def _cell(found: dict[str, Any]) -> str:
    interval = found["runs"][0]["intervals"].get("fid", {})
    return f"{found['metrics']['fid']:.2f} ± {interval.get('std', 0):.2f}"


def details_table(study: Study, results: Results) -> list[str]:
    """Markdown: what else was measured, of one evaluation and of the teacher's own samples."""
    names = (
        "read as their class",
        "KID x 1000",
        "precision",
        "recall",
        "to the nearest training image",
        "2 x 2 pattern",
    )
    lines = ["| samples | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    rows = [(f"{m.title}, {TITLES[k]}", f"{n}_{k}") for n, m in plain(study).items() for k in (MANY, "nfe1")]
    rows += [(m.title, f"{n}_nfe1") for n, m in study.methods.items() if m.like]
    for title, key in [*rows, ("training images", "floor")]:
        if key not in results:
            continue
        m, near = results[key]["metrics"], results[key].get("neighbours")
        distance = f"{near['samples']:.3f} (test images: {near['test']:.3f})" if near else "0"
        pattern = results[key].get("checkerboard")
        cells = [
            f"{m['accuracy']:.1%}",
            f"{1000 * m['kid']:.2f}",
            f"{m['precision']:.3f}",
            f"{m['recall']:.3f}",
        ]
        cells += [distance, "" if pattern is None else f"{pattern:+.2f}"]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def middles_table(study: Study, results: Results) -> list[str]:
    """Markdown: the second noise level of two steps, and what the other candidates gave."""
    lines = ["| method | chosen | distance to the training images with each level |", "|---|---|---|"]
    for name, method in study.methods.items():
        if found := results.get(f"{name}_middle"):
            tried = ", ".join(f"{level}: {value:.2f}" for level, value in found["tried"].items())
            lines.append(f"| {method.title} | {found['middle']:g} | {tried} |")
    return lines


def over_training(study: Study, results: Results) -> list[Series]:
    """One-evaluation distance of each student by the images that it has seen."""
    series = []
    for name, method in plain(study).items():
        points = [r for r in results.values() if r.get("method") == name and r["set"].startswith("step_")]
        pairs = [(r["images_seen"], r["fid"]) for r in points]
        if pairs and (last := results.get(f"{name}_nfe1")):
            pairs = sorted([*pairs, (last["images_seen"], last["runs"][0]["metrics"]["fid"])])
            series.append(Series(method.title, *map(list, zip(*pairs))))
    return series


def by_evaluations(study: Study, results: Results) -> list[Series]:
    """Distance of each method by network evaluations."""
    series = []
    for name, method in plain(study).items():
        pairs = [(evaluations_of(k), value) for k in COLUMNS if (value := fid(results, name, k)) is not None]
        if pairs:
            series.append(Series(method.title, *map(list, zip(*sorted(pairs)))))
    return series


def pictures(name: str, study: Study, run: Path, results: Results, folder: Path) -> list[str]:
    """Draw what there is to draw; Markdown that shows it."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = (
        ("nfe", by_evaluations(study, results), "network evaluations", True),
        ("images", over_training(study, results), "images seen", False),
    )
    lines = []
    for kind, series, label, log_x in plots:
        if series:
            path = folder / f"{name}_{kind}.png"
            line_plot(
                path, series, title="Fréchet distance", x_label=label, y_label="Fréchet distance", log_x=log_x
            )
            lines.append(f"![Fréchet distance by {label}](pictures/{path.name})")
    blocks = []
    for method, row in plain(study).items():
        for kind in (MANY, "nfe1"):
            path = run / "samples" / method / f"{kind}_seed0.npz"
            if f"{method}_{kind}" in results and path.exists():
                with np.load(path, allow_pickle=False) as arrays:
                    images = arrays["arr_0"][None, :GRID].repeat(2, 2).repeat(2, 3)  # twice as large
                value = results[f"{method}_{kind}"]["metrics"]["fid"]
                blocks.append(Block(f"{row.title}, {TITLES[kind]}: {value:.1f}", [images]))
    if blocks:
        path = folder / f"{name}_grid.png"
        image_page(path, blocks)
        lines.append(f"![The same noise and classes with every method](pictures/{path.name})")
    return [*lines, *edit_pages(name, study, run, results, folder), *figures_of(name, results, folder)]


def figures_of(name: str, results: Results, folder: Path) -> list[str]:
    """Draw the paper's figures in miniature whose every run was measured; Markdown that shows them, and what lacks."""
    measured, lines, lacking = of_study(name, results), [], {}
    for figure, about in FIGURES.items():
        if not about.x or name not in about.curves:
            continue
        path = folder / f"{name}_figure{figure}.png"
        missing = draw_figure(path, figure, name, measured)
        lacking |= dict.fromkeys(missing)
        if sum(len(c.presets) * len(c.nfe) for c in about.curves[name]) < len(missing) + 2:
            path.unlink(missing_ok=True)  # one run compares nothing
        if path.exists():
            lines.append(f"![{about.title}](pictures/{path.name})")
    runs = ", ".join(line.removeprefix("not measured: ").removeprefix(f"{name}_") for line in lacking)
    return [*lines, *([textwrap.fill(f"Not measured for the figures: {runs}.", 119)] if lacking else [])]


def edit_pages(name: str, study: Study, run: Path, results: Results, folder: Path) -> list[str]:
    """Copy the pages of edits; Markdown that shows them."""
    lines = []
    for method, row in study.methods.items():
        page = run / "samples" / method / "edits.png"
        if f"{method}_edits" in results and page.exists():
            path = folder / f"{name}_edits_{method}.png"
            write_atomic(path, page.read_bytes())
            lines.append(f"![Edits of test images by {row.title}](pictures/{path.name})")
    return lines


def found_of(kind: str, study: Study, results: Results) -> tuple[Results, dict[str, str]]:
    """(method -> its result of a kind, method -> its title), of those that have one."""
    titles = {name: method.title for name, method in study.methods.items() if f"{name}_{kind}" in results}
    return {name: results[f"{name}_{kind}"] for name in titles}, titles


def tables(study: Study, results: Results) -> list[str]:
    """All tables as Markdown, under their headings."""
    about = results.get("provenance", {})
    said = ""
    if about:
        said = (
            f"{about['samples']:,} samples of each of {about['seeds']} seeds; lengths of training {about['scale']:g} x "
            f"the presets'; classifier {about['features']['sha256'][:12]}, which reads "
            f"{about['classifier']['test_accuracy']:.2%} of the test images right; ± is the bootstrap's standard "
            "deviation of the first seed's distance."
        )
        said = textwrap.fill(said, 119, break_on_hyphens=False)
    parts = (
        ("Fréchet distance by network evaluations", distances_table(study, results)),
        ("Bars", bars_table(study, results)),
        ("Variations", variations_table(study, results)),
        ("Other measures", details_table(study, results)),
        ("Noise levels of two steps", middles_table(study, results)),
        (
            "Distance from the end of the teacher's trajectory",
            levels_table(*found_of("levels", study, results)),
        ),
    )
    if any(edited := found_of("edits", study, results)):
        parts += (("Edits of test images", [*edits_table(*edited), "", *interpolation_table(*edited)]),)
    return [said, *(line for title, table in parts for line in ("", f"### {title}", "", *table))]


def between(text: str, name: str, block: str) -> str:
    """A page with the block of a study replaced, or put at its end; what stands around it is written by hand."""
    begin, end = f"<!-- {name}: written by evaluations.study -->", f"<!-- end of {name} -->"
    block = f"{begin}\n{block}\n{end}"
    if begin in text and end in text:
        head, _, rest = text.partition(begin)
        return head + block + rest.partition(end)[2]
    return f"{text.rstrip()}\n\n{block}\n"


def write_report(name: str, study: Study, run: Path, docs: Path) -> None:
    """docs/results/<name>.json, docs/pictures/<name>_*.png, and the study's block of docs/study.md."""
    results = load(run)
    if not results:
        return
    (docs / "results").mkdir(parents=True, exist_ok=True)
    # Where a run lay on this machine is nobody's business.
    portable = parse_json(json.dumps(results).replace(str(run), f"runs/{name}"), str(run))
    save_json(docs / "results" / f"{name}.json", portable)
    shown = pictures(name, study, run, results, docs / "pictures")
    page = docs / "study.md"
    text = page.read_text(encoding="utf-8") if page.exists() else PAGE
    block = "\n".join([*tables(study, results), "", *(f"{line}\n" for line in shown)]).rstrip()
    write_atomic(page, between(text, name, block).encode())
