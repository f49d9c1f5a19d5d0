"""Tables 1 to 3 of the paper beside what was measured here: Markdown, plots, and the commands behind each row.

Published numbers lie in paper_tables.json. A measured number comes from a result file of the evaluator, or the row
says that there is none.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cm.config.presets import PRESETS, Preset, values
from cm.errors import UserError
from cm.objectives.curricula import progdist_stage
from evaluations.reports.plots import Figure, Series, line_plot
from evaluations.reports.results import Measurement, best_of

OURS = ("EDM", "CD", "CT", "PD")
# Data set of the paper -> (its title, beginning of our presets' names, protocol)
DATASETS = {
    "cifar10": ("CIFAR-10", "cifar10", "cifar10"),
    "imagenet64": ("ImageNet 64x64", "imagenet64", "adm"),
    "lsun_bedroom256": ("LSUN Bedroom 256x256", "bedroom256", "adm"),
    "lsun_cat256": ("LSUN Cat 256x256", "cat256", "adm"),
}
METRICS = {
    1: {"fid": "FID", "inception_score": "IS"},
    2: {"fid": "FID", "precision": "Prec.", "recall": "Rec."},
}
# Table 3: its column -> our flag
TABLE3_FLAGS = {
    "lr": "lr",
    "batch": "global_batch_size",
    "mu": "start_ema",
    "mu0": "start_ema",
    "s0": "start_scales",
    "s1": "end_scales",
    "N": "start_scales",
    "ode_solver": "ode_solver",
    "ema": "ema_rate",
    "iters": "total_training_steps",
    "fp16": "use_fp16",
    "dropout": "dropout",
}
TABLE3_PRESETS = {
    ("cifar10", "CD"): ("cifar10_cd_lpips",),
    ("cifar10", "CT"): ("cifar10_ct",),
    ("imagenet64", "CD"): ("imagenet64_cd_lpips",),
    ("imagenet64", "CT"): ("imagenet64_ct",),
    ("lsun256", "CD"): ("bedroom256_cd_lpips", "cat256_cd_lpips"),
    ("lsun256", "CT"): ("bedroom256_ct", "cat256_ct"),
}


@cache
def published() -> dict[str, Any]:
    """The numbers of the paper."""
    return json.loads((Path(__file__).parent / "paper_tables.json").read_text(encoding="utf-8"))


def rows_of(table: int, dataset: str) -> list[dict[str, Any]]:
    """Rows of Table 1 or 2 for a data set, as the final version of the paper prints them."""
    rows = published()["rows"]
    return [r for r in rows if (r["table"], r["dataset"]) == (table, dataset) and "icml" in r["versions"]]


def preset_of(row: dict[str, Any]) -> str | None:
    """The preset that reproduces a row; None for other people's methods."""
    if row["method"] not in OURS:
        return None
    prefix = f"{DATASETS[row['dataset']][1]}_{row['method'].lower()}"
    matching = [
        name
        for name, preset in PRESETS.items()
        if name.startswith(prefix) and any((r.nfe, r.fid) == (row["nfe"], row["fid"]) for r in preset.results)
    ]
    if len(matching) != 1:
        raise ValueError(
            f"{row['dataset']} {row['method']}, NFE {row['nfe']}: presets {matching}, expected one"
        )
    return matching[0]


def measured(measurements: Sequence[Measurement], preset: str, nfe: int) -> Measurement | None:
    """What was measured for a row, if anything."""
    return best_of(m for m in measurements if (m.preset, m.nfe) == (preset, nfe))


def table_markdown(table: int, dataset: str, measurements: Sequence[Measurement]) -> str:
    """One table for one data set: published, measured and their difference for each metric."""
    columns = METRICS[table]
    header = ["Method", "NFE"]
    for title in columns.values():
        header += [f"{title} paper", f"{title} here", "gap"]
    lines = [f"### Table {table}: {DATASETS[dataset][0]}", "", _line([*header, "preset"])]
    lines.append(_line(["---", *["---:"] * (len(header) - 1), "---"]))
    notes = []
    for row in rows_of(table, dataset):
        preset = preset_of(row)
        found = measured(measurements, preset, row["nfe"]) if preset else None
        cells = [f"**{row['method']}**" if preset else row["method"], str(row["nfe"])]
        for metric in columns:
            paper, here = row.get(metric), found and found.metrics.get(metric)
            cells += [_number(paper), _number(here) if preset else "", _gap(paper, here)]
        if preset and not found:
            cells[3] = "not measured"
        if found and not found.comparable:
            notes.append(
                f"{preset}, NFE {row['nfe']}: not comparable, {found.count:,} samples ({found.path})."
            )
        lines.append(_line([*cells, f"`{preset}`" if preset else ""]))
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def table3_markdown() -> str:
    """Table 3, hyperparameters: the paper's value, and ours where variant `paper` of a preset differs."""
    columns = [c for c in published()["table3"] if (c["dataset"], c["method"]) in TABLE3_PRESETS]
    lines = ["### Table 3: hyperparameters (preset with `--variant paper`)", ""]
    lines.append(_line(["", *(f"{c['dataset']} {c['method']}" for c in columns)]))
    lines.append(_line(["---"] * (len(columns) + 1)))
    for name in TABLE3_FLAGS:
        lines.append(_line([name, *(_table3_cell(c, name) for c in columns)]))
    return "\n".join(lines) + "\n"


def table3_differences() -> list[tuple[str, str, Any, Any]]:
    """(preset, column, paper, ours) wherever a preset's variant `paper` is not what Table 3 says."""
    differences = []
    for column in published()["table3"]:
        for preset in TABLE3_PRESETS[column["dataset"], column["method"]]:
            for name in TABLE3_FLAGS:
                ours = _preset_value(preset, name)
                if name in column and not _equal(column[name], ours):
                    differences.append((preset, name, column[name], ours))
    return differences


def _table3_cell(column: dict[str, Any], name: str) -> str:
    if name not in column:
        return "-"
    presets = TABLE3_PRESETS[column["dataset"], column["method"]]
    others = {p: _preset_value(p, name) for p in presets}
    wrong = [f"{p}: {v}" for p, v in others.items() if not _equal(column[name], v)]
    return f"{column[name]}" + (f" ({'; '.join(wrong)})" if wrong else "")


def _preset_value(preset: str, name: str) -> Any:
    from cm.config.scripts import CmTrainConfig

    flag = TABLE3_FLAGS[name]
    value = values(preset, "paper", "cm_train").get(flag, getattr(CmTrainConfig(), flag))
    return float(str(value).split(",")[-1]) if flag == "ema_rate" else value


def _equal(paper: Any, ours: Any) -> bool:
    if isinstance(paper, float):
        return abs(float(ours) - paper) <= 1e-6 * max(1, abs(paper))
    return paper == ours


def commands(preset_name: str, nfe: int, ranks: int = 8) -> list[str]:
    """What to type for one row: reference, training, search, samples, evaluation."""
    preset = PRESETS[preset_name]
    prefix = preset_name.split("_")[0]
    protocol = next((p for _, name, p in DATASETS.values() if name == prefix), None)
    if protocol is None:
        raise UserError(f"{preset_name} belongs to no table of the paper")
    script, mpi = preset.training_script, f"mpiexec -n {ranks} python"
    run, reference = f"runs/{preset_name}", f"references/{prefix}.npz"
    teacher = needs_teacher(preset)
    lines = []
    if protocol == "cifar10":
        lines.append(f"{mpi} -m evaluations.reference data/{prefix} {reference} --protocol cifar10")
    lines.append(
        f"{mpi} scripts/{script}.py --preset {preset_name} --variant paper --data_dir data/{prefix} --out_dir {run}"
        + (f" --teacher_model_path runs/{prefix}_edm" if teacher else "")
    )
    sampling, model = sampling_flags(preset, run, nfe)
    if nfe > 1 and "ternary_search" in preset.scripts:
        search = f"{mpi} scripts/ternary_search.py --preset {preset_name} --model_path {model} --ref_batch {reference}"
        lines.append(f"{search} --points {nfe - 1} --out_dir {run}/search  # prints --ts")
    size = preset.model["image_size"]
    out = f"{run}/samples_nfe{nfe}"
    lines.append(
        f"{mpi} scripts/image_sample.py --preset {preset_name} --model_path {model} --num_samples 50000 "
        f"--out_dir {out}{sampling}"
    )
    lines.append(
        f"{mpi} -m evaluations.evaluator {reference} {out}/samples_50000x{size}x{size}x3.npz "
        f"--protocol {protocol} --out results/{preset_name}_nfe{nfe}.json"
    )
    return lines


def needs_teacher(preset: Preset) -> bool:
    """Whether training distils a teacher, or begins with its weights."""
    train = preset.scripts.get("cm_train", {})
    distils = train.get("training_mode", "") in ("consistency_distillation", "progdist")
    return distils or train.get("init") == "teacher"


def sampling_flags(preset: Preset, run: str, nfe: int) -> tuple[str, str]:
    """(flags of image_sample for a number of evaluations, the model): what differs from the preset's own samples."""
    mode = preset.scripts.get("cm_train", {}).get("training_mode", "edm")
    if mode == "progdist":
        train = preset.scripts["cm_train"]
        stage = progdist_stage(0, train["start_scales"], train["distill_steps_per_iter"])
        while stage.num_scales > nfe:
            stage = progdist_stage(
                stage.start + stage.length, train["start_scales"], train["distill_steps_per_iter"]
            )
        return f" --steps {nfe}", f"{run}/checkpoints/step_{stage.start + stage.length:06d}"
    if mode == "edm" or nfe == 1:
        return "", run
    if nfe == 2 and "ts" in preset.scripts["image_sample"]:
        return f" --sampler multistep --ts {preset.scripts['image_sample']['ts']}", run
    return " --sampler multistep --ts TS", run  # as the search printed them


def plot_table(path: Path, table: int, dataset: str, measurements: Sequence[Measurement]) -> Figure:
    """FID against NFE of our rows: published (dashed) and measured."""
    series = []
    for method in OURS:
        rows = [r for r in rows_of(table, dataset) if r["method"] == method]
        found = [(r["nfe"], measured(measurements, preset_of(r), r["nfe"])) for r in rows]
        here = [(nfe, m.metrics["fid"]) for nfe, m in found if m and "fid" in m.metrics]
        series.append(
            Series(f"{method} paper", [r["nfe"] for r in rows], [r["fid"] for r in rows], dashed=True)
        )
        series.append(Series(f"{method} here", [x for x, _ in here], [y for _, y in here]))
    title = f"Table {table}: {DATASETS[dataset][0]}"
    return line_plot(path, series, title=title, x_label="network evaluations", y_label="FID", log_x=True)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _gap(paper: float | None, here: float | None) -> str:
    return "" if paper is None or here is None else f"{here - paper:+.3g}"
