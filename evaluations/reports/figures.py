"""Figures 3, 4 and 5 of the paper: which runs they need, the commands of these runs, and the plots of their results.

Every run is a preset. Each figure exists in three sizes: on CIFAR-10 as in the paper, and on handwritten digits and
Fashion-MNIST in minutes, where it shows the same comparison and not the same numbers. `ict` is the ablation of improved
consistency training (Song & Dhariwal 2023, Figure 5), in miniature only.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cm.config.presets import PRESETS
from cm.config.presets.figures import (
    CIFAR_N,
    CIFAR_SOLVER_N,
    SAME_RUN,
    SMALL_FIXED_N,
    SMALL_N,
    SMALL_SOLVER_N,
)
from cm.errors import UserError
from evaluations.npz_io import open_images
from evaluations.reports.paper_tables import needs_teacher, sampling_flags
from evaluations.reports.plots import Block, Series, image_page, line_plot
from evaluations.reports.results import Measurement, best_of

COLUMNS = 12  # pictures in a row of Figure 5
# What the samples of a size are compared with
REFERENCES = {"cifar10": "references/cifar10.npz", "digits": "data/digits"}


@dataclass(frozen=True)
class Curve:
    """One line of a figure: its presets (several where x is N), and the evaluations per image it is drawn with."""

    label: str
    presets: tuple[str, ...]
    nfe: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Figure:
    """x: `step` (training steps), `N` (grid points of training), `nfe`, or "" for a picture of samples."""

    title: str
    x: str
    curves: dict[str, tuple[Curve, ...]]  # size -> curves


def _run(preset: str) -> str:
    """The preset itself, or the same run of another figure."""
    return SAME_RUN.get(preset, preset)


def _solvers(prefix: str, sizes: Iterable[int]) -> tuple[Curve, ...]:
    return tuple(
        Curve(f"{solver.title()}, N = {n}", (_run(f"{prefix}_fig3b_{solver}_n{n}"),))
        for n in sizes
        for solver in ("euler", "heun")
    )


_STEPS = (1, 2, 3, 4)
_PD_STEPS = (1, 2, 4)
MINIATURES = ("digits", "fashion")
ICT_LABELS = {
    "nothing": "iCT",
    "no_ema": "target network, mu = 0.9",
    "huber": "l2",
    "weight": "weight 1",
    "pairs": "the other law of pairs",
    "doubling": "CT's N(k), 2 to 17",
}


def _miniatures(make: Callable[[str], tuple[Curve, ...]]) -> dict[str, tuple[Curve, ...]]:
    """The curves of a figure in each small size, from the beginning of its presets' names."""
    return {size: make(size) for size in MINIATURES}


FIGURES: dict[str, Figure] = {
    "3a": Figure(
        "Figure 3a: metric of consistency distillation",
        "step",
        {
            "cifar10": tuple(Curve(d.upper(), (f"cifar10_cd_{d}",)) for d in ("l1", "l2", "lpips")),
            **_miniatures(lambda size: tuple(Curve(d, (f"{size}_fig3a_{d}",)) for d in ("l1", "l2"))),
        },
    ),
    "3b": Figure(
        "Figure 3b: ODE solver and N",
        "step",
        {
            "cifar10": _solvers("cifar10", CIFAR_SOLVER_N),
            **_miniatures(lambda size: _solvers(size, SMALL_SOLVER_N)),
        },
    ),
    "3c": Figure(
        "Figure 3c: N with Heun's solver",
        "N",
        {
            "cifar10": (Curve("CD, Heun", tuple(f"cifar10_fig3c_n{n}" for n in CIFAR_N)),),
            **_miniatures(
                lambda size: (Curve("CD, Heun", tuple(_run(f"{size}_fig3c_n{n}") for n in SMALL_N)),)
            ),
        },
    ),
    "3d": Figure(
        "Figure 3d: adaptive N and mu of consistency training",
        "step",
        {
            "cifar10": (
                Curve("adaptive", ("cifar10_ct",)),
                Curve("N = 120, mu = 0.99", ("cifar10_ct_fixed",)),
            ),
            **_miniatures(
                lambda size: (
                    Curve("adaptive", (f"{size}_fig3d_adaptive",)),
                    *(Curve(f"N = {n}, mu = 0.9", (f"{size}_fig3d_n{n}",)) for n in SMALL_FIXED_N),
                )
            ),
        },
    ),
    "4": Figure(
        "Figure 4: multistep generation, CD against PD",
        "nfe",
        {
            "cifar10": (
                Curve("PD, l2", ("cifar10_pd_l2",), _PD_STEPS),
                Curve("PD, LPIPS", ("cifar10_pd_lpips",), _PD_STEPS),
                Curve("CD, l2", ("cifar10_cd_l2",), _STEPS),
                Curve("CD, LPIPS", ("cifar10_cd_lpips",), _STEPS),
            ),
            "digits": (
                Curve("PD, l2", ("digits_fig4_pd",), _PD_STEPS),
                Curve("CD, l2", ("digits_cd",), _STEPS),
            ),
            "fashion": (
                Curve("PD, l2", ("fashion_pd",), _PD_STEPS),
                Curve("CD, l2", ("fashion_cd",), _PD_STEPS),
                Curve("CD, iCT's loss", ("fashion_cd_huber",), _PD_STEPS),
            ),
        },
    ),
    "ict": Figure(
        "iCT without each of its parts",
        "step",
        _miniatures(
            lambda size: tuple(Curve(label, (f"{size}_figict_{what}",)) for what, label in ICT_LABELS.items())
        ),
    ),
    "5": Figure(
        "Figure 5: samples from the same noise",
        "",
        {
            size: (
                Curve("EDM", (f"{size}_edm",), (35,)),
                Curve("CT, one step", (f"{size}_ct",), (1,)),
                Curve("CT, two steps", (f"{size}_ct",), (2,)),
            )
            for size in ("cifar10", *MINIATURES)
        },
    ),
}


def figure(name: str, size: str) -> tuple[Figure, tuple[Curve, ...]]:
    """A figure and its curves in one size."""
    if name not in FIGURES:
        raise UserError(f"--figure {name}: choose {', '.join(FIGURES)}")
    if size not in FIGURES[name].curves:
        raise UserError(f"--size {size}: choose {', '.join(FIGURES[name].curves)}")
    return FIGURES[name], FIGURES[name].curves[size]


def points(x: str, curve: Curve, measurements: Sequence[Measurement]) -> list[tuple[float, Measurement]]:
    """(x, measurement) of a curve; of several measurements with the same x the best known."""
    groups: dict[float, list[Measurement]] = {}
    for m in measurements:
        if m.preset in curve.presets and m.nfe in curve.nfe and "fid" in m.metrics:
            groups.setdefault(_x_of(x, m), []).append(m)
    return [(value, best_of(group)) for value, group in sorted(groups.items())]


def _x_of(x: str, m: Measurement) -> float:
    if x == "N":
        return PRESETS[m.preset].scripts["cm_train"]["start_scales"]
    return m.step if x == "step" else m.nfe


def draw_figure(path: Path, name: str, size: str, measurements: Sequence[Measurement]) -> list[str]:
    """Write a figure as PNG if anything was measured; returns what was not, as lines."""
    fig, curves = figure(name, size)
    missing = []
    for curve in curves:
        for preset in curve.presets:
            for nfe in curve.nfe:
                if not any((m.preset, m.nfe) == (preset, nfe) for m in measurements):
                    missing.append(f"not measured: {preset}, NFE {nfe}")
    if not fig.x:
        found = [
            (c.label, best_of(m for m in measurements if (m.preset, m.nfe) == (c.presets[0], c.nfe[0])))
            for c in curves
        ]
        if all(m for _, m in found):
            image_page(path, [first_samples(label, m.samples) for label, m in found])
        return missing
    series = []
    for curve in curves:
        found = points(fig.x, curve, measurements)
        series.append(Series(curve.label, [x for x, _ in found], [m.metrics["fid"] for _, m in found]))
    if any(s.x for s in series):
        x_label = {"step": "training steps", "N": "N", "nfe": "network evaluations"}[fig.x]
        # Miniatures are measured in other features than Inception's.
        distance = "Fréchet distance" if size in MINIATURES else "FID"
        title = f"{fig.title} ({size})"
        line_plot(path, series, title=title, x_label=x_label, y_label=distance, log_x=fig.x == "N")
    return missing


def first_samples(label: str, path: str) -> Block:
    """A row of the first images of an npz."""
    images = open_images(path)
    count = min(COLUMNS, images.shape[0])
    return Block(label, [next(iter(images.batches(range(count), count)))[None]])


def commands(name: str, size: str) -> list[str]:
    """What to type for a figure: data, teacher, then training, samples and evaluation of each run.

    Fashion-MNIST's runs belong to its study, which goes on where it stopped.
    """
    fig, curves = figure(name, size)
    presets = list(dict.fromkeys(p for c in curves for p in c.presets))
    if size == "fashion":
        only = ",".join(preset.removeprefix("fashion_") for preset in presets)
        return [f"python -m evaluations.study fashion --only {only}"]
    small = size in MINIATURES
    mpi = f"mpiexec -n {2 if small else 8} python"
    reference = REFERENCES[size]
    measure = f"--features classifier={size}_classifier.pt" if small else "--protocol cifar10"
    lines = ["set -e"]
    if size == "digits":
        lines.append("python scripts/prepare_data.py digits data/digits --image_size 8 --overwrite True")
    if small:
        lines.append(f"python -m evaluations.small_classifier data/{size} {size}_classifier.pt")
    else:
        lines.append(f"{mpi} -m evaluations.reference data/cifar10 {reference} --protocol cifar10")
    if any(needs_teacher(PRESETS[p]) for p in presets):
        teacher = f"{size}_edm"
        lines += [_train(mpi, teacher, size)] if teacher not in presets else []
    lines += [_train(mpi, p, size) for p in presets]
    for curve in curves:
        for preset in curve.presets:
            for nfe in curve.nfe:
                lines += _measure(mpi, preset, nfe, reference, measure, loop=fig.x == "step")
    return lines


def _train(mpi: str, preset: str, size: str) -> str:
    teacher = f" --teacher_model_path runs/{size}_edm" if needs_teacher(PRESETS[preset]) else ""
    script = PRESETS[preset].training_script
    return (
        f"{mpi} scripts/{script}.py --preset {preset} --data_dir data/{size} --out_dir runs/{preset}{teacher}"
    )


def _measure(mpi: str, preset_name: str, nfe: int, reference: str, measure: str, loop: bool) -> list[str]:
    """Samples and their evaluation, of the last checkpoint or (loop) of each."""
    run, preset = f"runs/{preset_name}", PRESETS[preset_name]
    sampling, model = sampling_flags(preset, run, nfe)
    if "TS" in sampling:
        # Without a search: points evenly spaced on the training grid.
        steps = preset.scripts["image_sample"]["steps"]
        ts = [round(i * (steps - 1) / nfe) for i in range(nfe + 1)]
        sampling = sampling.replace("TS", ",".join(map(str, ts)))
    out = f"{run}/samples_nfe{nfe}"
    result = f"results/{preset_name}_nfe{nfe}"
    if loop:
        model, out, result = '"$c"', f'{out}/"$(basename "$c")"', f'{result}_"$(basename "$c")"'
    sample = (
        f"{mpi} scripts/image_sample.py --preset {preset_name} --model_path {model} --out_dir {out}{sampling}"
    )
    sample += " --overwrite True"
    evaluate = f"{mpi} -m evaluations.evaluator {reference} {out}/samples_*.npz {measure} --out {result}.json"
    if loop:
        return [f"for c in {run}/checkpoints/step_*; do {sample}; {evaluate}; done"]
    return [sample, evaluate]
