"""Measurements read back from the JSON files that the evaluator writes."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm.errors import UserError
from cm.runtime.inputs import json_or_none, misfit
from cm.storage.filesystem import list_recursive
from cm.tools.findings import MEASURED

# What a study's file has beside its results, and a result of a sample set and of a checkpoint
STUDY = {"provenance", "floor"}
STUDY_SET = {"method": str, "set": str, "metrics": {"fid": float}, "runs": [{"count": int}]}
STUDY_POINT = {"method": str, "set": str, "fid": float}


@dataclass(frozen=True)
class Measurement:
    """One evaluated set of samples and how it was drawn. step: training step of the model, 0 if unknown."""

    path: str
    preset: str
    nfe: int
    step: int
    count: int
    comparable: bool
    metrics: dict[str, float]
    samples: str
    flags: dict[str, Any]


def load_results(folder: str | Path) -> list[Measurement]:
    """All measurements below a folder, oldest first; JSON files of other kinds are passed over.

    Samples must carry the JSON that image_sample writes beside them: it says which preset and sampler they are from.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--results {folder}: no such folder")
    found = []
    files = [Path(folder, name) for name in list_recursive(folder) if name.endswith(".json")]
    for path in sorted(files, key=lambda p: (p.lstat().st_mtime, str(p))):
        content = json_or_none(path)
        if content and content.keys() >= STUDY:
            found += of_study(path.stem, content)
        elif content and {"metrics", "protocol", "features"} <= content.keys():
            if problem := misfit(content, MEASURED):
                raise UserError(f"{path}: {problem}")
            found += [m for m in [_measurement(str(path), content)] if m]
    return found


def of_study(name: str, results: Mapping[str, Any]) -> list[Measurement]:
    """What evaluations.study measured, from the JSON that it writes: its methods are presets `<name>_<method>`."""
    found = []
    for key, result in results.items():
        if not isinstance(result, Mapping) or not str(result.get("set", "")):
            continue
        one_step = str(result["set"]).startswith("step_")
        schema = STUDY_POINT if one_step else STUDY_SET
        if problem := misfit(result, schema) or ", ".join(schema.keys() - result.keys()):
            raise UserError(f"{name}.json: {key}: {problem}")
        kind, runs = result["set"], result.get("runs") or [{}]
        step, nfe = (re.fullmatch(p, kind) for p in (r"step_(\d{1,12})", r"nfe(\d{1,6})"))
        found.append(
            Measurement(
                path=f"{name}.json: {key}",
                preset=f"{name}_{result['method']}",
                nfe=int(nfe[1]) if nfe else 1 if step else 0,
                step=int(step[1]) if step else 0,
                count=runs[0].get("count", 0),
                comparable=False,
                metrics={"fid": result["fid"]} if one_step else result["metrics"],
                samples="",
                flags={},
            )
        )
    return found


def _measurement(path: str, content: dict[str, Any]) -> Measurement | None:
    run = (content.get("runs") or [content])[0]  # several seeds: all of one model
    samples = run.get("samples", {})
    meta = samples.get("meta") or {}
    flags = meta.get("config", {})
    if "nfe" not in meta or not flags.get("preset") or not {"path", "count"} <= samples.keys():
        return None
    step = re.findall(r"step_(\d+)|_(\d+)\.pt$", meta.get("model_path") or "")
    return Measurement(
        path=path,
        preset=flags["preset"],
        nfe=int(meta["nfe"]),
        step=int("".join(step[0])) if step else 0,
        count=samples["count"],
        comparable=run.get("comparable", False),
        metrics=content["metrics"],
        samples=samples["path"],
        flags=flags,
    )


def best_of(measurements: Iterable[Measurement]) -> Measurement | None:
    """The one to report: comparable before not, more samples before fewer, longer training, the newest."""
    ranked = sorted(measurements, key=lambda m: (m.comparable, m.count, m.step))
    return ranked[-1] if ranked else None
