"""Several sets of samples side by side: one row per model, the seeds of a model as mean and range."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cm.config.rows import METRICS
from cm.errors import UserError

# What two sets of samples of one model may differ in
_OF_A_SET = (
    "seed",
    "out_dir",
    "num_samples",
    "batch_size",
    "overwrite",
    "grid_images",
    "grid_columns",
    "device",
)


def grouped(runs: Sequence[Mapping[str, Any]], seeds: int = 0) -> list[list[int]]:
    """Which runs are seeds of one model, as lists of their places.

    seeds: so many in turn are; 0: those whose metadata differ in nothing but the seed, others stand alone.
    """
    if seeds:
        if len(runs) % seeds:
            raise UserError(f"--seeds {seeds}: {len(runs)} sets of samples are no multiple of it")
        return [list(range(i, i + seeds)) for i in range(0, len(runs), seeds)]
    groups: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        groups.setdefault(_model_of(run["samples"]) or str(i), []).append(i)
    return list(groups.values())


def _model_of(samples: Mapping[str, Any]) -> str:
    """What is the same for all seeds of a model; empty where the samples do not say what made them."""
    meta = samples.get("meta") or {}
    if not meta.get("model_sha256") and not meta.get("model_path"):
        return ""
    config = {k: v for k, v in (meta.get("config") or {}).items() if k not in _OF_A_SET}
    return json.dumps([meta.get("model_sha256"), meta.get("model_path"), config], sort_keys=True, default=str)


def compare(runs: Sequence[Mapping[str, Any]], seeds: int = 0) -> list[dict[str, Any]]:
    """One entry per model: name, sampler, nfe, images, the means of its metrics, and over seeds their summary."""
    groups = [[runs[i] for i in group] for group in grouped(runs, seeds)]
    names = _names([group[0]["samples"] for group in groups])
    found = []
    for name, group in zip(names, groups):
        meta = group[0]["samples"].get("meta") or {}
        summary = summarised(group)
        entry = {
            "name": name,
            "sampler": _sampler(meta.get("config") or {}),
            "nfe": meta.get("nfe"),
            "images": group[0]["samples"]["count"],
            "seeds": len(group),
            "metrics": {metric: s["mean"] for metric, s in summary.items()},
        }
        found.append(entry | ({"summary": summary} if len(group) > 1 else {}))
    return found


def summarised(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean, range and standard deviation (0 of one run) of each metric that all runs have."""
    columns = {
        m: [run["metrics"][m] for run in runs]
        for m in runs[0]["metrics"]
        if all(m in r["metrics"] for r in runs)
    }
    return {
        m: {
            "mean": float(np.mean(v)),
            "min": min(v),
            "max": max(v),
            "std": float(np.std(v, ddof=1)) if len(v) > 1 else 0.0,
        }
        for m, v in columns.items()
    }


def _names(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Short names: of the run that the weights lie in, else of the file; with more of the path where two are equal."""
    paths = [_place(s) for s in samples]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if all(names.count(name) == 1 or paths.count(path) > 1 for name, path in zip(names, paths)):
            return names
    return [str(path) for path in paths]


def _place(samples: Mapping[str, Any]) -> Path:
    model = str((samples.get("meta") or {}).get("model_path") or "")
    path = Path(model or samples["path"])
    if model and len(path.parts) > 3 and path.parts[-3] == "checkpoints":
        return Path(*path.parts[:-3])  # RUN/checkpoints/step_N/FILE
    return path


def _sampler(config: Mapping[str, Any]) -> str:
    name = config.get("sampler", "")
    if name == "multistep":
        return f"multistep {config.get('ts') or config.get('sigmas') or ''}".strip()
    return name if name in ("", "onestep") else f"{name} {config.get('steps', '')}".strip()


def comparison_table(models: Sequence[Mapping[str, Any]], features: str) -> list[str]:
    """The lines of the table of what the network `features` measured."""
    metrics = [m for m in METRICS if any(m in model["metrics"] for model in models)]
    head = ["model", "sampler", "NFE", "images", *(METRICS[m].title_in(features) for m in metrics)]
    rows = [head]
    for model in models:
        seeds = f" x {model['seeds']}" if model["seeds"] > 1 else ""
        nfe = "-" if model["nfe"] is None else str(model["nfe"])
        row = [model["name"], model["sampler"] or "-", nfe, f"{model['images']:,}{seeds}"]
        rows.append([*row, *(_cell(model, m) for m in metrics)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]


def _cell(model: Mapping[str, Any], metric: str) -> str:
    if metric not in model["metrics"]:
        return "-"
    digits = METRICS[metric].digits
    text = f"{model['metrics'][metric]:.{digits}f}"
    if s := model.get("summary", {}).get(metric):
        text += f" ({s['min']:.{digits}f} to {s['max']:.{digits}f})"
    return text
