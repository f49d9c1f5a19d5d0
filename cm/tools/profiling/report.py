"""What a benchmark leaves: rows that describe themselves, as JSON and as a table, and the comparison of two files."""

import datetime
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cm.errors import UserError
from cm.runtime import distributed
from cm.runtime.cpu import usable_cores
from cm.runtime.files import whole_file, writing
from cm.runtime.inputs import read_json
from cm.runtime.platform import processor
from cm.runtime.provenance import versions

PACKAGES = ("pillow", "torchvision", "piq", "diffusers")
# The figures that the table shows: key -> (heading, format)
COLUMNS = {
    "images_per_second": ("img/s", "{:.4g}"),
    "median_ms": ("ms", "{:.4g}"),
    "spread_ms": ("quartiles", "{}"),
    "cpu_ms": ("cpu ms", "{:.4g}"),
    "ratio_to_best_peer": ("time / best peer", "{:.2f}"),
    "share_of_network": ("of network", "{:.3%}"),
    "share_of_ceiling": ("of ceiling", "{:.0%}"),
    "peak_memory_mib": ("MiB", "{:.4g}"),
    "state_memory_mib": ("state MiB", "{:.4g}"),
    "largest_gap": ("largest gap", "{:.2g}"),
}


@dataclass(frozen=True)
class Row:
    """One measurement. config: what was run. figures: numbers by name, possibly nested (phases, peers)."""

    name: str
    config: dict[str, Any]
    figures: dict[str, Any]

    def cells(self) -> list[str]:
        """Texts of the table's columns."""
        f = dict(self.figures)
        if "q25_ms" in f:
            f["spread_ms"] = f"{f['q25_ms']:.4g}-{f['q75_ms']:.4g}"
        return [self.name, *(form.format(f[key]) if key in f else "" for key, (_, form) in COLUMNS.items())]

    def notes(self) -> list[str]:
        """What has no column: communication between ranks."""
        c = self.figures.get("communication")
        if not c:
            return []
        sent, bare, exposed = c["bytes_per_rank"] / 2**20, c["all_reduce_ms"], c["exposed_ms"]
        return [
            f"{self.name}: each rank sends {sent:.4g} MiB of gradients per step; all-reduce alone {bare:.4g} ms, "
            f"{exposed:.4g} ms of it seen in the step, {c['overlap']:.0%} hidden behind the backward pass"
        ]


@dataclass(frozen=True)
class Report:
    """Rows of one run of the benchmark, with where and when they were measured."""

    rows: list[Row]
    environment: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """Markdown table, a row each."""
        head = ["what", *(heading for heading, _ in COLUMNS.values())]
        notes = [note for row in self.rows for note in row.notes()]
        return "\n".join([*markdown(head, [row.cells() for row in self.rows]), *notes])

    def save(self, path: str) -> None:
        """Write the JSON file."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with writing(target), whole_file(target) as file:
            file.write((json.dumps(asdict(self), indent=1) + "\n").encode())


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("\n", " ") for cell in cells) + " |" for cells in lines]


def load_report(path: str) -> Report:
    """A report from its JSON file; UserError when it is none."""
    try:
        content = read_json(path)
        return Report([Row(**row) for row in content["rows"]], content["environment"])
    except (OSError, UserError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a report of scripts/benchmark.py ({type(error).__name__})") from None


def environment(device: torch.device) -> dict[str, Any]:
    """Commit, versions, device, threads and processes of this run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len(_git("status", "--porcelain", "--untracked-files=no").splitlines()),
        "versions": versions() | _packages(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "processes": distributed.get_world_size(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"


def device_facts(device: torch.device) -> dict[str, Any]:
    """What is known of the machine before anything is measured."""
    facts: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__}
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        facts |= {
            "memory_gib": round(p.total_memory / 2**30, 1),
            "multiprocessors": p.multi_processor_count,
            "capability": f"{p.major}.{p.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "devices": torch.cuda.device_count(),
            "fp32_products": torch.get_float32_matmul_precision(),
        }
    return facts | {"processors": usable_cores()}


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[3]
    try:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _packages() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def compare(first: str, second: str) -> str:
    """Table of the rows that two reports share: times, and the second's over the first's."""
    a, b = (load_report(path) for path in (first, second))
    before = {row.name: row.figures for row in a.rows}
    shared = [row for row in b.rows if row.name in before]
    if not shared:
        raise UserError(f"{first} and {second} have no row in common")
    head = ["what", f"{Path(first).stem} ms", f"{Path(second).stem} ms", "time ratio", "memory ratio"]
    lines = markdown(head, [_compared(row.name, before[row.name], row.figures) for row in shared])
    if a.environment.get("device") != b.environment.get("device"):
        lines.append(f"devices differ: {a.environment.get('device')}; {b.environment.get('device')}")
    return "\n".join(lines)


def _compared(name: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    def ratio(key: str) -> str:
        return f"{new[key] / old[key]:.3f}" if old.get(key) and new.get(key) else ""

    times = [f"{f['median_ms']:.4g}" if "median_ms" in f else "" for f in (old, new)]
    return [name, *times, ratio("median_ms"), ratio("peak_memory_mib")]
