"""Compare the ways to train a few-step model on handwritten digits (8 px): one network, one teacher, equal images.

    OMP_NUM_THREADS=1 python -m evaluations.reports.equal_images RUN [--images 19712] [--only cd,ect,sct]
        [--out docs/results/digits_equal_images.json]

RUN is a folder for data, models and samples; a second call goes on where the first one stopped. Prints a table of what
is there, writes its numbers as JSON and the first samples as RUN/equal_images.png. Each student is trained by its
preset, but for what must be equal: the network, whose clock is slow so that continuous time works, too, the average of
the weights, and the number of images. Lengths of a preset's own schedules (stages, warm-up) shrink with the run.
"""

import argparse
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cm.commands.cli import parse
from cm.commands.sample import run_image_sample
from cm.commands.train import run_train
from cm.config.scripts import SCRIPTS
from cm.data.images import save_json
from cm.errors import choose
from cm.runtime import job, logger
from cm.runtime.inputs import read_json
from cm.runtime.provenance import versions
from evaluations.reports.digits_report import TITLES, measure, picture
from evaluations.reports.learning_proof import MODELS, execute
from evaluations.reports.plots import image_page

BATCH = 64
TEACHER = "cont_edm"
PREPARATION = (
    "scripts/prepare_data.py digits {run}/data --image_size 8 --overwrite True",
    "-m evaluations.small_classifier {run}/data {run}/classifier.pt",
)
SAME = "--time_scale 4 --ema_rate 0.98"
FIRST_STAGE = "tcm1"
# Steps that seven stages of progressive distillation and two halves of TCM divide
DEFAULT_IMAGES = 308 * BATCH
# What runs in this process, which saves a start of the interpreter each
HERE = {"edm_train": run_train, "cm_train": run_train, "image_sample": run_image_sample}


@dataclass(frozen=True)
class Student:
    """A training run. source: whose weights it is given, a folder of RUN; empty: none. sampled: it has a row."""

    name: str
    preset: str
    source: str
    steps: int
    flags: str = ""
    sampled: bool = True

    def command(self, run: str) -> str:
        """Arguments of `python` that train it in a folder."""
        paths = f"--data_dir {run}/data --out_dir {run}/{self.name}"
        given = f" --teacher_model_path {run}/{self.source}" if self.source else ""
        length = f"--total_training_steps {self.steps} --save_interval -1 --preview_count 0"
        line = f"scripts/cm_train.py --preset {self.preset} {paths}{given} {SAME} {length} {self.flags}"
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
            plain = {"source": TEACHER if flags else "", "steps": steps}
            found.append(Student(name, f"digits_{name}", **{**plain, **changes.get(name, {})}))
    at = next(i for i, student in enumerate(found) if student.name == "tcm")
    flags = f"--ratio_steps {half // 8}"
    found.insert(at, Student(FIRST_STAGE, "digits_ect", TEACHER, half, flags, sampled=False))
    return found


def commands(run: str, images: int, only: Collection[str] = ()) -> list[str]:
    """Arguments of `python`, in order. only: students to train now; empty: all."""
    known = {student.name: student for student in students(images)}
    chosen = {choose(known, name, "--only").name for name in only} or set(known)
    chosen |= {FIRST_STAGE} if "tcm" in chosen else set()
    trained = [student for student in known.values() if student.name in chosen]
    teacher = (
        f"scripts/edm_train.py --preset digits_{TEACHER} --data_dir {{run}}/data --out_dir {{run}}/{TEACHER}"
    )
    lines = [*PREPARATION, teacher, *draws(TEACHER)]
    for student in trained:
        lines += [student.command("{run}"), *(draws(student.name) if student.sampled else ())]
    return [line.format(run=run) for line in lines]


def draws(name: str) -> list[str]:
    """Arguments of `python` that draw the sample sets of a model; {run} stands for the folder."""
    paths = "--model_path {run}/" + name + " --out_dir {run}/samples/" + name
    return [
        f"scripts/image_sample.py --preset digits_{name} {paths}_{way} --overwrite True {flags}".strip()
        for way, flags in MODELS[name][2].items()
    ]


def follow(line: str) -> None:
    """Run a line of `commands`."""
    first, *argv = shlex.split(line)
    script = Path(first).stem
    if script not in HERE:
        execute(line)
        return
    print(f"python {line}", flush=True)
    try:
        HERE[script](parse(SCRIPTS[script], argv))
    finally:
        logger.reset()


def collect(run: Path, images: int) -> dict[str, Any]:
    """The numbers of all models that have samples, and how they were made."""
    measured = {row.title: row for row in measure(run)}
    trained = {student.name: student for student in students(images)}
    rows = []
    for name in (TEACHER, *(n for n, student in trained.items() if student.sampled)):
        if not all(TITLES[f"{name}_{way}"] in measured for way in MODELS[name][2]):
            continue
        config = read_json(run / name / "config.json")
        scores = {
            way: {"nfe": (row := measured[TITLES[f"{name}_{way}"]]).nfe, **row.metrics}
            for way in MODELS[name][2]
        }
        steps = sum(
            s.steps for s in trained.values() if s.name in (name, FIRST_STAGE if name == "tcm" else name)
        )
        first = "teacher" if config.get("teacher_model_path") else "random"
        about = {"model": name, "preset": config["preset"], "starts_from": first}
        about["steps"] = steps or config["total_training_steps"]
        rows.append({**about, "images": about["steps"] * BATCH, "scores": scores})
    return {"batch": BATCH, "samples": 1000, "rows": rows, "versions": versions()}


def table(result: dict[str, Any]) -> str:
    """Markdown: one row per model, with a column for each number of evaluations; a teacher's first."""
    lines = [
        "| model | first weights | images | evaluations: read as asked, Fréchet distance | |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        title = TITLES[f"{row['model']}_onestep"].rpartition(", ")[0]
        cells = [f"{s['nfe']}: {s['accuracy']:.1%}, {s['fid']:.3f}" for s in row["scores"].values()]
        cells += [""] * (2 - len(cells))
        lines.append(f"| {title} | {row['starts_from']} | {row['images']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line: train, sample, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder for data, models and samples")
    parser.add_argument("--images", type=int, default=DEFAULT_IMAGES, help="images that each student sees")
    parser.add_argument("--only", default="", help="students to train now, as a list (default: all)")
    parser.add_argument("--out", type=Path, default=None, help="JSON to write (default: in RUN)")
    args = parser.parse_args()
    lines = commands(str(args.run), args.images, [name for name in args.only.split(",") if name])
    prepared = (args.run / "classifier.pt").exists()
    for line in lines[len(PREPARATION) if prepared else 0 :]:
        follow(line)
    result = collect(args.run, args.images)
    out = args.out or args.run / "equal_images.json"
    save_json(out, result)
    image_page(args.run / "equal_images.png", picture(args.run))
    print(table(result))


if __name__ == "__main__":
    job.run_main(main)
