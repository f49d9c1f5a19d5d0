"""One start of a study: what is done already, what is left, and how much time there is."""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from cm.data.images import save_json
from cm.errors import UserError
from cm.runtime.inputs import read_json
from cm.runtime.liveness import EXIT_UNFINISHED, read_status
from cm.runtime.provenance import versions
from evaluations.npz_io import open_images
from evaluations.study.edits import draw_edits, measure_edits
from evaluations.study.levels import errors_by_level
from evaluations.study.measure import Ruler, arrays_of, checkerboard, classifier, draw, prepare, search_middle
from evaluations.study.methods import (
    CONSISTENCY,
    MANY,
    TEACHER,
    Method,
    Study,
    images_seen,
    preset_of,
    set_flags,
    training_flags,
)


class OutOfTime(Exception):
    """The budget is used up; the next start goes on."""


class Runner:
    """One start of a study: what is done already, and how much time is left."""

    def __init__(self, study: Study, args: argparse.Namespace):
        self.study, self.run, self.scale = study, args.run, args.scale
        self.data, self.samples, self.seeds = Path(args.data or study.data), args.samples, range(args.seeds)
        self.methods = {n: m for n, m in study.methods.items() if not args.only or n in args.only.split(",")}
        self.deadline = time.monotonic() + 60 * args.budget
        self._ruler: Ruler | None = None

    @property
    def ruler(self) -> Ruler:
        """The classifier with the test images, prepared when something is measured."""
        if self._ruler is None:
            classifier(self.study, self.run)
            self._ruler = Ruler(self.run)
        return self._ruler

    def minutes_left(self) -> float:
        """OutOfTime when there are none."""
        left = (self.deadline - time.monotonic()) / 60
        if left <= 0:
            raise OutOfTime
        return left

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `results/<name>.json` holds, made now unless it is there."""
        path = self.run / "results" / f"{name}.json"
        if path.exists():
            return read_json(path)
        self.minutes_left()
        print(f"{name} ...", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_json(path, made := make())
        return made

    def train(self, name: str) -> None:
        """The training of a method, as a program of its own; goes on in the next start where time ends."""
        status = read_status(self.run / name) or {}
        if status.get("ended") == "finished":
            return
        method = self.study.methods[name]
        flags = {
            "preset": preset_of(self.study, name),
            "data_dir": self.data / self.study.train,
            "out_dir": self.run / name,
            "max_hours": f"{self.minutes_left() / 60:.4f}",
            **({"teacher_model_path": self.run / method.teacher} if method.teacher else {}),
            **training_flags(self.study, name, self.scale),
        }
        script = Path(__file__).parents[2] / "scripts" / f"{method.script}.py"
        argv = [str(script), *(word for n, v in flags.items() for word in (f"--{n}", str(v)))]
        print(f"python {shlex.join(argv)}", flush=True)
        done = subprocess.run([sys.executable, *argv])
        if done.returncode == EXIT_UNFINISHED:
            raise OutOfTime
        if done.returncode:
            raise UserError(
                f"training of {name} ended with exit code {done.returncode}: see {self.run / name}"
            )

    def measure(self, name: str) -> None:
        """Every sample set of a trained method, and its distance over training."""
        method, middle = self.study.methods[name], None
        if method.figure:
            self.points(name, self.checkpoints(name))
            return
        if method.searches:
            middle = self.once(f"{name}_middle", partial(self.middle, name))["middle"]
        for kind, flags in method.sets.items():
            self.once(f"{name}_{kind}", partial(self.sample_set, name, kind, set_flags(flags, middle)))
        if method.sets.get("nfe1") == CONSISTENCY["nfe1"] or name == TEACHER:
            cache = self.run / "samples" / TEACHER / "trajectory.npz"
            models = (self.run / TEACHER, self.run / name, cache)
            self.once(f"{name}_levels", partial(errors_by_level, *models))
        if method.edits:
            self.once(f"{name}_edits", partial(self.edits, name))
        if method.teacher and "nfe1" in method.sets and not method.models and not method.like:
            self.points(name, self.checkpoints(name)[:-1])

    def points(self, name: str, checkpoints: Iterable[Path]) -> None:
        """The distance at each of these checkpoints."""
        for checkpoint in checkpoints:
            self.once(f"{name}_{checkpoint.name}", partial(self.point, name, checkpoint))

    def middle(self, name: str) -> dict[str, Any]:
        """The second noise level of two-step samples."""
        folder = self.run / "samples" / name / "search"
        return search_middle(self.ruler, self.run / name, self.study.methods[name].middles, folder)

    def edits(self, name: str) -> dict[str, Any]:
        """Scores of edits of test images, and a page of them."""
        model, test, folder = self.run / name, self.run / "test.npz", self.run / "samples" / name
        draw_edits(folder / "edits.png", model, test)
        return measure_edits(model, test, self.ruler.few, folder)

    def sample_set(self, name: str, kind: str, flags: dict[str, Any]) -> dict[str, Any]:
        """Draw a set with every seed and measure it."""
        model = self.model_of(name, self.study.methods[name], kind)
        paths = [self.run / "samples" / name / f"{kind}_seed{seed}.npz" for seed in self.seeds]
        for seed, path in zip(self.seeds, paths):
            draw(model, flags, self.samples, seed, path)
        found = {"method": name, "set": kind, "images_seen": images_seen(self.study, name, self.scale)}
        found |= self.ruler.measure(paths) | {"flags": flags}
        if kind in (MANY, "nfe1"):
            found["checkerboard"] = checkerboard(arrays_of(paths[0])[0])
            found["neighbours"] = self.ruler.neighbours(paths[0])
        return found

    def model_of(self, name: str, method: Method, kind: str) -> Path:
        """The run, or the checkpoint at the end of the stage that a set is drawn from."""
        if kind not in method.models:
            return self.run / name
        return self.checkpoints(name)[method.models[kind] - 1]

    def point(self, name: str, checkpoint: Path) -> dict[str, Any]:
        """The distance of one-step samples while training went on."""
        path = self.run / "samples" / name / f"{checkpoint.name}.npz"
        draw(checkpoint, self.study.methods[name].sets["nfe1"], self.samples, 0, path)
        step, last = (int(c.name.removeprefix("step_")) for c in (checkpoint, self.checkpoints(name)[-1]))
        seen = round(step / last * images_seen(self.study, name, self.scale))
        fid = self.ruler.few.measure(open_images(str(path)))["metrics"]["fid"]
        return {"method": name, "set": checkpoint.name, "images_seen": seen, "fid": fid}

    def checkpoints(self, name: str) -> list[Path]:
        """Those of a training, in order."""
        return sorted((self.run / name / "checkpoints").glob("step_*"))

    def everything(self) -> None:
        """All that is left to do; OutOfTime where time ends before."""
        prepare(self.study, self.data, self.run)
        self.train(TEACHER)
        self.once("floor", lambda: self.ruler.floor(self.samples))
        self.check(self.once("provenance", self.provenance))
        for name in self.methods:
            self.train(name)
            self.measure(name)

    def check(self, begun: dict[str, Any]) -> None:
        """UserError where an earlier start measured in another way: results of one folder can be compared."""
        for name, value in (("scale", self.scale), ("samples", self.samples), ("seeds", len(self.seeds))):
            if begun[name] != value:
                raise UserError(
                    f"--{name} {value}: {self.run} has results with {begun[name]}; give another --run"
                )

    def provenance(self) -> dict[str, Any]:
        """What all results of this run share."""
        shared = {
            "scale": self.scale,
            "samples": self.samples,
            "seeds": len(self.seeds),
            "cores": os.cpu_count(),
        }
        return {
            **self.ruler.provenance(),
            "classifier": classifier(self.study, self.run),
            **shared,
        } | versions()
