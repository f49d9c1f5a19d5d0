"""What was drawn and measured with the weights of a run, as the JSON files beside samples and results tell."""

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cm.runtime.inputs import json_or_none, misfit
from cm.tools.runs import PASSED_OVER, Run

# Where results are looked for: in the run, and this deep in the folder that it lies in
INSIDE = ("*.json", "*/*.json", "*/*/*.json")
LARGEST = 4 * 2**20  # bytes; JSON files beyond it are no results
# What image_sample writes beside samples, and the evaluator of them, as far as reports read it (see `misfit`)
DRAWN = {
    "nfe": int,
    "model_path": (str, None),
    "weights": (str, None),
    "config": {"preset": str, "sampler": str, "num_samples": int},
}
_SET = {"samples": {"path": str, "count": int, "meta": (DRAWN, None)}, "comparable": bool, "metrics": dict}
MEASURED = {"protocol": {"name": str}, "runs": [_SET], **_SET}
ROW = {"nfe": int, "model_path": str, "images": int, "samples": str}  # of the quick start's table


@dataclass(frozen=True)
class Finding:
    """One set of samples of a model, or a measurement of one that is no longer there."""

    nfe: int
    sampler: str = ""
    step: int = 0
    weights: str = ""
    count: int = 0
    protocol: str = ""
    comparable: bool = True
    metrics: dict[str, float] = field(default_factory=dict)
    source: str = ""
    picture: Path | None = None


# What was read of a folder's JSON files, for callers that ask for many runs in it
Contents = dict[Path, list[tuple[Path, dict[str, Any]]]]


def find_results(run: Run, places: Sequence[str | Path] = (), known: Contents | None = None) -> list[Finding]:
    """Samples and measurements made with a run's weights, by network evaluations. places: further folders.

    known: what was read already; it is added to.
    """
    known = {} if known is None else known
    folders = dict.fromkeys(
        folder.resolve() for folder in (run.path, run.path.resolve().parent, *map(Path, places))
    )
    contents = sorted({path: content for folder in folders for path, content in _read(folder, known)}.items())
    found: dict[str, Finding] = {}
    for path, content in contents:  # first the samples, which results point to
        if "nfe" in content and "sigmas" in content and "ts" not in content and belongs(content, run):
            found[str(path.with_suffix(".npz"))] = _samples(path, content)
    for path, content in contents:
        for key, finding in _measurements(path, content, run):
            if key in found:  # the samples themselves say more of how they were drawn
                drawn = found[key]
                finding = replace(
                    finding, sampler=drawn.sampler, weights=drawn.weights, picture=drawn.picture
                )
            found[f"{key} {path}" if key in found and found[key].metrics else key] = finding
    return sorted(found.values(), key=lambda f: (f.nfe, f.sampler, f.step))


def _read(folder: Path, known: Contents) -> list[tuple[Path, dict[str, Any]]]:
    """Every JSON object near the top of a folder."""
    if folder not in known:
        files = sorted({Path(os.path.realpath(p)) for pattern in INSIDE for p in folder.glob(pattern)})
        known[folder] = [(path, content) for path in files if (content := _object(path)) is not None]
    return known[folder]


def best_fid(findings: Iterable[Finding]) -> Finding | None:
    """The finding with the lowest finite FID."""
    measured = [f for f in findings if math.isfinite(f.metrics.get("fid", math.nan))]
    return min(measured, key=lambda f: f.metrics["fid"], default=None)


def _object(path: Path) -> dict[str, Any] | None:
    content = None if PASSED_OVER & set(path.parts) else json_or_none(path, limit=LARGEST)
    if content is None or misfit(
        content, MEASURED if "protocol" in content and "features" in content else DRAWN
    ):
        return None
    return content


def belongs(meta: dict[str, Any], run: Run) -> bool:
    """Whether weights that metadata names are those of a run; also when the run was moved since."""
    path = Path(str(meta.get("model_path") or ""))
    if Path(os.path.realpath(path)).is_relative_to(run.path.resolve()):
        return True
    moved = path.parts[-4:-2] == (run.name, "checkpoints")
    return moved and not path.exists()


def _step(meta: dict[str, Any]) -> int:
    found = re.search(r"step_(\d+)", str(meta.get("model_path")))
    return int(found[1]) if found else 0


def _samples(path: Path, meta: dict[str, Any]) -> Finding:
    config, picture = meta.get("config", {}), path.with_suffix(".png")
    return Finding(
        nfe=meta["nfe"],
        sampler=config.get("sampler", ""),
        step=_step(meta),
        weights=str(meta.get("weights", "")),
        count=config.get("num_samples", 0),
        source=str(path.with_suffix(".npz")),
        picture=picture if picture.is_file() else None,
    )


def _measurements(path: Path, content: dict[str, Any], run: Run) -> Iterator[tuple[str, Finding]]:
    """(samples that were measured, result) of a file of the evaluator, of a search, or of the quick start."""
    if {"protocol", "features"} <= content.keys() and {"metrics", "models"} & content.keys():
        runs = content.get("runs") or [content]
        for one in [runs[0] | {"metrics": content["metrics"]}] if "metrics" in content else runs:
            samples = one.get("samples", {})
            meta = samples.get("meta") or {}
            if belongs(meta, run) and "nfe" in meta and {"path", "count"} <= samples.keys():
                npz = Path(samples["path"])
                yield (
                    os.path.realpath(npz),
                    replace(
                        _samples(npz, meta),
                        count=samples["count"],
                        comparable=one.get("comparable", False),
                        metrics=numbers(one.get("metrics", {})),
                        protocol=content["protocol"].get("name", ""),
                    ),
                )
    elif {"ts", "fid", "nfe"} <= content.keys() and belongs(content, run):
        yield (
            str(path),
            replace(
                _samples(path, content),
                sampler="multistep (search)",
                metrics=numbers({"fid": content["fid"]}),
                protocol=str(content.get("protocol", "")),
            ),
        )
    else:
        for title, row in content.items():
            fits = isinstance(row, dict) and not misfit(row, ROW)
            if fits and {"nfe", "model_path", "images"} <= row.keys() and belongs(row, run):
                metrics = numbers({k: v for k, v in row.items() if k not in ("nfe", "images")})
                yield (
                    str(Path(row.get("samples", path / title)).resolve()),
                    Finding(row["nfe"], title, _step(row), "", row["images"], "digits", metrics=metrics),
                )


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """Those values that are numbers."""
    return {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def metric_names(findings: Iterable[Finding]) -> list[str]:
    """Every metric that was measured, in the order in which they appear."""
    return list(dict.fromkeys(name for f in findings for name in f.metrics))
