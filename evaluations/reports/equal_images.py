"""Compare the ways to train a few-step model on handwritten digits (8 px): one teacher, equal images seen.

    OMP_NUM_THREADS=1 python -m evaluations.reports.equal_images RUN [--images 19712] [--only cd,ect,sct]
        [--out docs/results/digits_equal_images.json]
    OMP_NUM_THREADS=1 python -m evaluations.reports.equal_images RUN --students distilled_maps
        [--out docs/results/digits_distilled_maps.json]
    OMP_NUM_THREADS=1 python -m evaluations.reports.equal_images RUN --students flow_maps
        [--out docs/results/digits_flow_maps.json]

RUN is a folder for data, models and samples; a second call goes on where the first one stopped. Prints a table of what
is there, writes its numbers as JSON and a picture: the first samples as RUN/equal_images.png, or of the maps, which are
sampled with 1, 2, 4 and 8 evaluations, their distances as RUN/equal_images_nfe.png. Each student is trained by its
preset, but for what must be equal: the network, whose clock is slow so that continuous time works, too, the average of
the weights, and the number of images. Lengths of a preset's own schedules (stages, warm-up) go with the run. `family`
and `distilled_maps` begin with the teacher's weights; `flow_maps` begin with random ones on the networks of their
presets and see five times as many images.
"""

import argparse
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cm.commands.cli import parse
from cm.commands.sample import run_image_sample
from cm.commands.train import run_train
from cm.config.scripts import SCRIPTS, SampleConfig
from cm.data.images import save_json
from cm.errors import choose
from cm.runtime import job, logger
from cm.runtime.inputs import read_json
from cm.runtime.provenance import versions
from evaluations.reports.digits_report import TITLES, measure, picture
from evaluations.reports.learning_proof import MODELS, PREPARATION, execute
from evaluations.reports.plots import Series, image_page, line_plot

BATCH = 64
TEACHER = "cont_edm"
SAME = "--time_scale 4 --ema_rate 0.98"
SAME_LONGER = "--time_scale 4 --ema_rate 0.99"
FIRST_STAGE = "tcm1"
# Steps that seven stages of progressive distillation and two halves of TCM divide
DEFAULT_IMAGES, LONGER = 308 * BATCH, 1540 * BATCH
# What runs in this process, which saves a start of the interpreter each
HERE = {"edm_train": run_train, "cm_train": run_train, "image_sample": run_image_sample}


# Name of a sample set -> flags that draw it
Sets = Mapping[str, str]
COLUMNS = {"nfe1": "1", "nfe2": "2", "nfe4": "4", "nfe8": "8", "many": "35"}
FEW = (1, 2, 4, 8)
DENOISER: Sets = {"many": "", **{f"nfe{n}": f"--sampler euler --steps {n}" for n in FEW}}
# Noise levels, not searched
LEVELS = {2: "80,1.1", 4: "80,8.4,1.1,0.3", 8: "80,28,8.4,3.3,1.1,0.6,0.3,0.14"}
CONSISTENCY: Sets = {"nfe1": "--sampler onestep"} | {
    f"nfe{n}": f"--sampler multistep --ts '' --sigmas {levels}" for n, levels in LEVELS.items()
}
JUMPS: Sets = {f"nfe{n}": f"--sampler jumps --steps {n}" for n in FEW}
GAMMA: Sets = {f"nfe{n}": f"--sampler gamma --steps {n}" for n in FEW}


@dataclass(frozen=True)
class Student:
    """A training run. source: whose weights it is given, a folder of RUN; empty: none. sets: empty: it has no row."""

    name: str
    preset: str
    source: str
    steps: int
    flags: str = ""
    sets: Sets = field(default_factory=dict)
    title: str = ""
    same: str = SAME

    def command(self, run: str) -> str:
        """Arguments of `python` that train it in a folder."""
        paths = f"--data_dir {run}/data --out_dir {run}/{self.name}"
        given = f" --teacher_model_path {run}/{self.source}" if self.source else ""
        length = f"--total_training_steps {self.steps} --save_interval -1 --preview_count 0"
        line = f"scripts/cm_train.py --preset {self.preset} {paths}{given} {self.same} {length} {self.flags}"
        return line.strip()


def students(images: int) -> list[Student]:
    """All of them in order, each on so many images; TCM's count for both of its stages."""
    steps = images // BATCH
    stage, half = steps // 7, steps // 2
    changes = {
        "pd": {"steps": 7 * stage, "flags": f"--distill_steps_per_iter {stage}"},
        # From random weights so short a run shows nothing
        **{name: {"flags": "--init teacher", "source": TEACHER} for name in ("ct", "ict")},
        "ect": {"flags": f"--ratio_steps {steps // 8}"},
        "tcm": {"steps": half, "source": FIRST_STAGE},
        **{name: {"flags": f"--tangent_warmup {steps // 5}"} for name in ("sct", "scd")},
    }
    found = []
    for name, (script, flags, _) in MODELS.items():
        if script == "cm_train":
            plain = {"source": TEACHER if flags else "", "steps": steps, **_named(name)}
            found.append(Student(name, f"digits_{name}", **{**plain, **changes.get(name, {})}))
    at = next(i for i, student in enumerate(found) if student.name == "tcm")
    flags = f"--ratio_steps {half // 8}"
    found.insert(at, Student(FIRST_STAGE, "digits_ect", TEACHER, half, flags))
    return found


def _named(name: str) -> dict[str, Any]:
    """Title and sample sets of a model of the learning proof."""
    return {"sets": MODELS[name][2], "title": TITLES[f"{name}_onestep"].rpartition(", ")[0]}


def distilled_maps(images: int) -> list[Student]:
    """Maps of two times and segments that begin with the teacher's weights, with CD, ECT and TCM beside them."""
    steps = images // BATCH
    half = steps // 2

    def segments(n: int) -> Student:
        flags = f"--segments {n} --teacher_steps_ramp {half}"
        sets = {f"nfe{n}": f"--sampler progdist --steps {n}"}
        return Student(f"mcd{n}", "digits_mcd4", TEACHER, steps, flags, sets, f"multistep CD, segments: {n}")

    def own(name: str, title: str) -> Student:
        """One that learns from itself, on the teacher's network in the place of its preset's."""
        network = "--network adm --precond edm --sigma_max 80"
        sets = {way: f"{flags} {network}" for way, flags in JUMPS.items()}
        return Student(name, f"digits_{name}", TEACHER, steps, f"--init teacher {network}", sets, title)

    two = {n: CONSISTENCY[n] for n in ("nfe1", "nfe2")}  # it learned nothing below its transition at 1
    lagrangian, eulerian = (f"flow map distillation, {name}" for name in ("Lagrangian", "Eulerian"))
    return [
        Student("cd", "digits_cd", TEACHER, steps, "", CONSISTENCY, "CD"),
        Student("ect", "digits_ect", TEACHER, steps, f"--ratio_steps {steps // 8}", CONSISTENCY, "ECT"),
        Student(FIRST_STAGE, "digits_ect", TEACHER, half, f"--ratio_steps {half // 8}"),
        Student("tcm", "digits_tcm", FIRST_STAGE, half, "", two, "TCM"),
        *(segments(n) for n in FEW),
        Student("ctm", "digits_ctm", TEACHER, steps, "", GAMMA, "CTM"),
        Student("lmd", "digits_lmd", TEACHER, steps, "", JUMPS, lagrangian),
        Student("emd", "digits_emd", TEACHER, steps, "", JUMPS, eulerian),
        *(own(name.lower(), name) for name in ("shortcut", "LSD", "PSD", "ESD")),
    ]


def flow_maps(images: int) -> list[Student]:
    """Maps of two times that begin with random weights, with iCT beside them."""
    steps = images // BATCH

    def student(name: str, title: str, flags: str = "", sets: Sets = JUMPS) -> Student:
        return Student(name, f"digits_{name}", "", steps, flags, sets, title, SAME_LONGER)

    def segments(n: int) -> Student:
        flags = f"--segments {n} --teacher_steps_ramp {steps // 2}"
        sets = {f"nfe{n}": f"--sampler progdist --steps {n}"}
        title = f"multistep CT, segments: {n}"
        return Student(f"mct{n}", "digits_mct2", "", steps, flags, sets, title, SAME_LONGER)

    alone = "--training_mode ctm_training --init random"
    split = f"--split_steps {2 * steps // 3}"
    return [
        student("ict", "iCT", sets=CONSISTENCY),
        student("meanflow", "MeanFlow"),
        student("improved_meanflow", "improved MeanFlow"),
        student("esd", "ESD"),
        student("lsd", "LSD"),
        student("psd", "PSD"),
        student("shortcut", "shortcut"),
        student("alphaflow", "alpha-Flow", split),
        student("soflow", "SoFlow", split),
        Student("ctm_training", "digits_ctm", "", steps, alone, GAMMA, "CTM without a teacher", SAME_LONGER),
        *(segments(n) for n in FEW),
    ]


@dataclass(frozen=True)
class Comparison:
    """students(images), the length of each where the command gives none, and how the teacher is sampled."""

    students: Callable[[int], list[Student]]
    images: int
    teacher: Sets


COMPARISONS = {
    "family": Comparison(students, DEFAULT_IMAGES, MODELS[TEACHER][2]),
    "distilled_maps": Comparison(distilled_maps, DEFAULT_IMAGES, DENOISER),
    "flow_maps": Comparison(flow_maps, LONGER, DENOISER),
}


def models(images: int, compared: str = "family") -> list[Student]:
    """What has a row, the teacher first; its length is its preset's."""
    comparison = COMPARISONS[compared]
    title = _named(TEACHER)["title"]
    teacher = Student(TEACHER, f"digits_{TEACHER}", "", 0, sets=comparison.teacher, title=title)
    return [teacher, *(student for student in comparison.students(images) if student.sets)]


def commands(run: str, images: int, only: Collection[str] = (), compared: str = "family") -> list[str]:
    """Arguments of `python`, in order. only: students to train now; empty: all."""
    known = {student.name: student for student in COMPARISONS[compared].students(images)}
    chosen = {choose(known, name, "--only").name for name in only} or set(known)
    chosen |= {FIRST_STAGE} if "tcm" in chosen else set()
    teacher = models(images, compared)[0]
    paths = f"--data_dir {run}/data --out_dir {run}/{TEACHER}"
    lines = [line.format(run=run) for line in PREPARATION]
    lines += [f"scripts/edm_train.py --preset {teacher.preset} {paths}", *draws(teacher, run)]
    for student in known.values():
        if student.name in chosen:
            lines += [student.command(run), *draws(student, run)]
    return lines


def draws(student: Student, run: str) -> list[str]:
    """Arguments of `python` that draw the sample sets of a model."""
    paths = f"--model_path {run}/{student.name} --out_dir {run}/samples/{student.name}"
    return [
        f"scripts/image_sample.py --preset {student.preset} {paths}_{way} --overwrite True {flags}".strip()
        for way, flags in student.sets.items()
    ]


def follow(line: str) -> None:
    """Run a line of `commands`; samples that are newer than their model stay."""
    first, *argv = shlex.split(line)
    script = Path(first).stem
    if script not in HERE:
        execute(line)
        return
    config = parse(SCRIPTS[script], argv)
    if script == "image_sample" and _drawn(config):
        return
    print(f"python {line}", flush=True)
    try:
        HERE[script](config)
    finally:
        logger.reset()


def _drawn(config: SampleConfig) -> bool:
    """Whether the samples of a run are there already."""
    sets = Path(config.out_dir).glob("samples_*.json")
    checkpoints = [path.stat().st_mtime for path in Path(config.model_path, "checkpoints").glob("step_*")]
    return any(path.stat().st_mtime > max(checkpoints, default=0) for path in sets)


def collect(run: Path, images: int, compared: str = "family") -> dict[str, Any]:
    """The numbers of all models that have samples, and how they were made."""
    known = models(images, compared)
    titles = {f"{m.name}_{way}": f"{m.title}, {way}" for m in known for way in m.sets}
    measured = {row.title: row for row in measure(run, titles)}
    rows = []
    for model in known:
        found = {way: measured.get(titles[f"{model.name}_{way}"]) for way in model.sets}
        if not all(found.values()):
            continue
        config = read_json(run / model.name / "config.json")
        steps = config["total_training_steps"] * (2 if model.source == FIRST_STAGE else 1)
        about = {"model": model.name, "preset": config["preset"]}
        about["starts_from"] = "teacher" if config.get("teacher_model_path") else "random"
        scores = {way: {"nfe": row.nfe, **row.metrics} for way, row in found.items()}
        rows.append({**about, "steps": steps, "images": steps * BATCH, "scores": scores})
    return {"batch": BATCH, "samples": 1000, "rows": rows, "versions": versions()}


def table(result: dict[str, Any], compared: str = "family") -> str:
    """Markdown: one row per model, with a cell for each number of evaluations; a teacher's first."""
    titles = {m.name: m.title for m in models(DEFAULT_IMAGES, compared)}
    columns = list(COLUMNS.values())
    heads = ["evaluations: read as asked, Fréchet distance", ""] if compared == "family" else columns
    lines = [
        f"| model | first weights | images | {' | '.join(heads)} |".replace("|  |", "| |"),
        "|---|---|---|" + "---|" * len(heads),
    ]
    for row in result["rows"]:
        scores = row["scores"]
        if compared == "family":
            cells = [f"{s['nfe']}: {_cell(s)}" for s in scores.values()]
            cells += [""] * (2 - len(cells))
        else:
            cells = [_cell(scores[way]) if way in scores else "" for way in COLUMNS]
        about = f"| {titles[row['model']]} | {row['starts_from']} | {row['images']:,} | "
        lines.append(f"{about}{' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_curves(path: Path, result: dict[str, Any], compared: str) -> None:
    """Write the curves as PNG."""
    labels = {"title": "Digits at equal images seen", "x_label": "network evaluations"}
    line_plot(path, curves(result, compared), **labels, y_label="Fréchet distance", log_x=True)


def curves(result: dict[str, Any], compared: str) -> list[Series]:
    """Fréchet distance by evaluations, a line for each model; multistep models of several segments are one line."""
    titles = {m.name: m.title for m in models(DEFAULT_IMAGES, compared)}
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in result["rows"]:
        line = lines.setdefault(titles[row["model"]].partition(", segments")[0], [])
        line += [(s["nfe"], s["fid"]) for s in row["scores"].values()]
    return [Series(name, *zip(*sorted(points))) for name, points in lines.items()]


def _cell(scores: dict[str, float]) -> str:
    return f"{scores['accuracy']:.1%}, {scores['fid']:.3f}"


def main() -> None:
    """Command line: train, sample, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder for data, models and samples")
    parser.add_argument("--students", choices=COMPARISONS, default="family", help="what is compared")
    parser.add_argument(
        "--images", type=int, default=0, help="images that each student sees; 0: as documented"
    )
    parser.add_argument("--only", default="", help="students to train now, as a list (default: all)")
    parser.add_argument("--out", type=Path, default=None, help="JSON to write (default: in RUN)")
    args = parser.parse_args()
    images = args.images or COMPARISONS[args.students].images
    only = [name for name in args.only.split(",") if name]
    lines = commands(str(args.run), images, only, args.students)
    prepared = (args.run / "classifier.pt").exists()
    for line in lines[len(PREPARATION) if prepared else 0 :]:
        follow(line)
    result = collect(args.run, images, args.students)
    out = args.out or args.run / "equal_images.json"
    save_json(out, result)
    if args.students == "family":
        image_page(args.run / "equal_images.png", picture(args.run))
    else:
        draw_curves(args.run / "equal_images_nfe.png", result, args.students)
    print(table(result, args.students))


if __name__ == "__main__":
    job.run_main(main)
