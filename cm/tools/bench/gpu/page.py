"""The Markdown page of the GPU report."""

from typing import Any, Protocol

from cm.tools.profiling.report import Report, Row, markdown

# What is aimed at: (part, row, figure) -> least value
AIMS = {
    ("cd", "cd/bf16", "share_of_ceiling"): 0.40,
    ("cd_compiled", "cd_compiled/bf16, compiled", "share_of_ceiling"): 0.40,
    ("sample", "one step/batch 256", "share_of_ceiling"): 0.55,
}


class Content(Protocol):
    """What the page shows. parts: by name, with a title each. states: what became of a part. rows: of a part."""

    parts: dict[str, Any]
    environment: dict[str, Any]
    states: dict[str, dict[str, Any]]
    rows: dict[str, list[dict]]


def page(content: Content, *, tiny: bool = False) -> str:
    """The whole page: what ran where, what became of each part, and its rows."""
    lines = ["# GPU report", ""]
    if tiny:
        lines += ["A trial of the report itself with tiny networks: the numbers say nothing of speed.", ""]
    known = content.environment
    device, date, commit = (known.get(key, "unknown") for key in ("device", "date", "commit"))
    versions = ", ".join(f"{k} {v}" for k, v in known.get("versions", {}).items())
    lines += [f"{device}; {date}; commit {commit[:12] or 'unknown'}; {versions}.", ""]
    states = [
        [content.parts[n].title, s["state"], s.get("seconds", ""), s.get("why", "").strip().split("\n")[-1]]
        for n, s in content.states.items()
    ]
    lines += markdown(["part", "state", "seconds", "why"], states)
    lines += [] if tiny else _aims(content.rows)
    for name, found in content.rows.items():
        lines += ["", f"## {content.parts[name].title}", ""]
        lines += _part([Row(**row) for row in found])
    return "\n".join(lines) + "\n"


def _aims(rows: dict[str, list[dict]]) -> list[str]:
    found = []
    for (part, name, figure), least in AIMS.items():
        for row in rows.get(part, []):
            if row["name"] == name and figure in row["figures"]:
                value = row["figures"][figure]
                found.append([name, f"{least:.0%}", f"{value:.1%}", "met" if value >= least else "missed"])
    if not found:
        return []
    return ["", "## Aims", "", *markdown(["share of the ceiling", "aim", "measured", ""], found)]


def _part(rows: list[Row]) -> list[str]:
    """Timed rows as one table, then what each has beside its times."""
    timed = [row for row in rows if "median_ms" in row.figures]
    lines = Report(timed).table().splitlines() if timed else []
    facts = []
    for row in rows:
        details = _details(row)
        if details:
            lines += ["", f"**{row.name}**", "", *details]
        elif row not in timed:
            facts += [[row.name, name, _text(value)] for name, value in row.figures.items()]
    return lines + (markdown(["of", "what", "value"], facts) if facts else [])


def _details(row: Row) -> list[str]:
    f, lines = row.figures, []
    if "phases_ms" in f:
        shares = f.get("ceiling_by_phase", {})
        cells = [
            [name, f"{ms:.4g}", f"{shares[name]:.0%}" if name in shares else ""]
            for name, ms in f["phases_ms"].items()
        ]
        lines += markdown(["phase", "ms", "of ceiling"], cells)
    if "peers" in f:
        lines += [
            "",
            *markdown(["peer", "ms"], [[n, f"{p['median_ms']:.4g}"] for n, p in f["peers"].items()]),
        ]
    for name, why in f.get("left_out", {}).items():
        lines += ["", f"Left out: {name} ({why})"]
    if "kernels" in f:
        cells = [
            [k["name"][:90].replace("|", "/"), f"{k['calls']:g}", f"{k['ms']:.4g}", f"{k['share']:.1%}"]
            for k in f["kernels"]
        ]
        lines += markdown(["kernel", "calls per step", "ms per step", "share"], cells)
    if "losses" in f:
        lines += [
            f"{f['steps']} steps; loss, in equal windows: " + ", ".join(f"{v:.4g}" for v in f["losses"])
        ]
    return lines


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
