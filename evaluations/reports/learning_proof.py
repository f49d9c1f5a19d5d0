"""Train every objective on handwritten digits (8 px) and on points in the plane; write what each reached, and how.

    OMP_NUM_THREADS=1 python -m evaluations.reports.learning_proof RUN [--ranks 2] [--doc docs/learning_proof.md]

RUN is a folder for data, models and samples; a second call goes on where the first one stopped.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from cm.errors import UserError
from cm.runtime import job
from cm.runtime.provenance import versions

# Model -> (script, flags of training) and names of its sample sets with the flags that draw them
ONE_AND_TWO = {"onestep": "", "twostep": "--sampler multistep"}
FROM_TEACHER = "--teacher_model_path {run}/edm"
FROM_SLOW_TEACHER = "--teacher_model_path {run}/cont_edm"
MODELS: dict[str, tuple[str, str, dict[str, str]]] = {
    "edm": ("edm_train", "", {"heun18": "", "heun2": "--steps 2", "onestep": "--steps 1"}),
    "cd": ("cm_train", FROM_TEACHER, ONE_AND_TWO),
    "ct": ("cm_train", "", ONE_AND_TWO),
    "pd": ("cm_train", FROM_TEACHER, {"onestep": ""}),
    "cont_edm": ("edm_train", "", {"heun18": "", "onestep": "--steps 1"}),
    "cont_cd": ("cm_train", FROM_SLOW_TEACHER, ONE_AND_TWO),
    "cont_ct": ("cm_train", FROM_SLOW_TEACHER, ONE_AND_TWO),
    "ict": ("cm_train", "", ONE_AND_TWO),
    "ect": ("cm_train", FROM_TEACHER, ONE_AND_TWO),
    "tcm": ("cm_train", "--teacher_model_path {run}/ect", ONE_AND_TWO),
    "sct": ("cm_train", FROM_SLOW_TEACHER, ONE_AND_TWO),
    "scd": ("cm_train", FROM_SLOW_TEACHER, ONE_AND_TWO),
}
PREPARATION = (
    "scripts/prepare_data.py digits {run}/data --image_size 8 --overwrite True",
    "-m evaluations.small_classifier {run}/data {run}/classifier.pt",
)
POINTS = "-m tests.helpers.learning --length 3"
DOCUMENT = """# Learning proof

Every objective learns, on a CPU and in minutes. Written by `python -m evaluations.reports.learning_proof RUN`.

## Handwritten digits, 8 x 8 pixels

Each model from its preset; 1,000 class-conditional samples each, from the same noise and labels. "Read as their class":
by a small classifier, which reads blurred class means well too: one step of a teacher gives these. Fréchet distance: in
that classifier's features, to the 1,797 images.

{digits}
![The first samples of each model]({picture})

## Points in the plane

Four Gaussian spots (standard deviation 0.15) on a circle of radius 0.6, a network of 4,500 weights, the same training
loop. Distance: sliced Wasserstein, in units of the data. On the spots: share of points within three standard
deviations of a spot. tests/test_learning.py holds runs of a third of this length to stated bars.

{points}
## Commands

Wall time on {cores} cores, not all of them free; torch {torch}, OMP_NUM_THREADS={threads}. {total} in all.

| time | command |
|---|---|
{commands}
"""


def commands(run: str, ranks: int) -> list[str]:
    """Arguments of `python`, in order."""
    launch = f"-m torch.distributed.run --nproc-per-node {ranks} " if ranks > 1 else ""
    lines = [*PREPARATION]
    for model, (script, flags, _) in MODELS.items():
        paths = f"--data_dir {{run}}/data --out_dir {{run}}/{model} {flags}"
        lines.append(f"{launch}scripts/{script}.py --preset digits_{model} {paths}".strip())
    lines += [line for model in MODELS for line in draws(model)]
    return [line.format(run=run) for line in [*lines, "-m evaluations.reports.digits_report {run}", POINTS]]


def draws(name: str) -> list[str]:
    """Arguments of `python` that draw the sample sets of a model; {run} stands for the folder."""
    paths = "--model_path {run}/" + name + " --out_dir {run}/samples/" + name
    return [
        f"scripts/image_sample.py --preset digits_{name} {paths}_{way} --overwrite True {flags}".strip()
        for way, flags in MODELS[name][2].items()
    ]


def execute(line: str) -> tuple[str, float]:
    """(standard output, seconds) of `python line`; UserError with the end of its errors if it fails."""
    print(f"python {line}", flush=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *shlex.split(line)], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        raise UserError(f"python {line} ended with exit code {done.returncode}")
    return done.stdout, time.perf_counter() - start


def minutes(seconds: float) -> str:
    """m:ss."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole}:{rest:02d}"


def main() -> None:
    """Command line: run everything, then write the document and its picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder for data, models and samples")
    parser.add_argument("--ranks", type=int, default=2, help="processes that train together")
    parser.add_argument("--doc", type=Path, default=Path("docs/learning_proof.md"), help="what to write")
    args = parser.parse_args()
    done = {line: execute(line) for line in commands(str(args.run), args.ranks)}
    picture = Path("pictures", f"{args.doc.stem}.png")
    (args.doc.parent / picture.parent).mkdir(parents=True, exist_ok=True)
    shutil.copy(args.run / "report.png", args.doc.parent / picture)
    text = DOCUMENT.format(
        digits=(args.run / "report.md").read_text(),
        picture=picture,
        points=done[POINTS][0],
        cores=os.cpu_count(),
        torch=versions()["torch"],
        threads=os.environ.get("OMP_NUM_THREADS", "unset"),
        total=minutes(sum(seconds for _, seconds in done.values())),
        commands="\n".join(
            f"| {minutes(seconds)} | `python {line}` |" for line, (_, seconds) in done.items()
        ),
    )
    args.doc.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    job.run_main(main)
