"""Kill training at random moments and start it again, many times: the end must equal an undisturbed run bit by bit.

Every start is a process forked from a server that has imported torch already, so that a kill costs less than a second.
Storage is slowed down, so that many kills hit a checkpoint half-way.
"""

import contextlib
import json
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from cm.storage.checkpoint import complete_checkpoints, read_state
from cm.storage.weights import load_weights
from cm.training.meters import MEASURED

STEPS = 10
NETWORK = (
    "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 8 "
    "--num_head_channels 16 --dropout 0.1"
)
LOOP = (
    f"--global_batch_size 4 --num_workers 0 --log_interval 3 --save_interval 2 --keep_last 2 --preview_count 0 "
    f"--ema_rate 0.9,0.99 --lr 1e-3 --total_training_steps {STEPS} --deterministic True --device cpu"
)
CONSISTENCY = "--loss_norm l2 --weight_schedule uniform --start_ema 0.5 --start_scales 4"
# name -> (script, its own flags); {teacher} is the undisturbed edm run
RUNS = {
    "edm": ("edm_train", "--schedule_sampler loss-second-moment --num_timesteps 4"),
    "ct": ("cm_train", f"--training_mode consistency_training {CONSISTENCY}"),
    "cd": (
        "cm_train",
        f"--training_mode consistency_distillation --teacher_model_path {{teacher}} {CONSISTENCY}",
    ),
    "pd": (
        "cm_train",
        "--training_mode progdist --scale_mode progdist --loss_norm l2 --start_scales 4 --distill_steps_per_iter 3 "
        "--teacher_model_path {teacher}",
    ),
}


@dataclass
class Tally:
    """What happened: kills in all and while a checkpoint was being written, starts, and finished runs by their kind."""

    kills: int = 0
    kills_in_save: int = 0
    starts: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        runs = ", ".join(f"{count} {name}" for name, count in self.finished.items())
        return (
            f"{self.kills} kills, {self.kills_in_save} of them while a checkpoint was being written, in {self.starts} "
            f"starts; {sum(self.finished.values())} runs reached their end ({runs}), each bitwise equal to the "
            f"undisturbed one in weights, averages, optimizer, counters and logged rows; {self.seconds:.0f} s"
        )


class Torture:
    """Runs in a folder, over and over, with kills at moments that `seed` decides, as far as the machine is even."""

    def __init__(
        self,
        folder: str | os.PathLike,
        runs: tuple[str, ...] = tuple(RUNS),
        seed: int = 0,
        report: Callable[[str], object] = print,
    ):
        self.folder = Path(folder)
        self.runs = runs
        self.report = report
        self.random = random.Random(seed)
        self.tally = Tally()
        self._server = multiprocessing.get_context("forkserver")
        self._server.set_forkserver_preload(
            ["torch", "torch._dynamo", "cm.tools.torture", "cm.commands.train"]
        )
        self._undisturbed: dict[str, tuple[Path, float]] = {}  # name -> run directory, seconds

    def run(self, kills: int) -> Tally:
        """Kill so many times, let the last run finish; AssertionError where a finished run differs."""
        begin = time.monotonic()
        write_images(self.folder / "images.npz")
        warm = self._server.Process(target=os.getpid)  # the server imports torch now, not within a timed run
        warm.start()
        warm.join()
        number = 0
        while self.tally.kills < kills:
            name = self.runs[number % len(self.runs)]
            reference, seconds = self.undisturbed(name)
            run_dir = self.folder / f"{name}_{number}"
            self._until_finished(name, run_dir, seconds, kills)
            compare(run_dir, reference)
            self.tally.finished[name] = self.tally.finished.get(name, 0) + 1
            self.report(f"{self.tally.kills} kills: {run_dir.name} equals the undisturbed run")
            number += 1
        self.tally.seconds = time.monotonic() - begin
        return self.tally

    def undisturbed(self, name: str) -> tuple[Path, float]:
        """Run directory of the same training without kills, made once, and how long it took."""
        if name not in self._undisturbed:
            run_dir, begin = self.folder / f"{name}_undisturbed", time.monotonic()
            process = self._start(name, run_dir)
            process.join()
            if process.exitcode != 0:
                raise RuntimeError(f"training failed without kills: {_output(run_dir)}")
            self._undisturbed[name] = run_dir, time.monotonic() - begin
        return self._undisturbed[name]

    def _until_finished(self, name: str, run_dir: Path, seconds: float, kills: int) -> None:
        while True:
            process = self._start(name, run_dir)
            self.tally.starts += 1
            # Once the kills are used up, the run may finish.
            alive_for = self.random.uniform(0.0, 1.1 * seconds) if self.tally.kills < kills else None
            process.join(alive_for)
            if process.exitcode is None:
                before = _newest_step(run_dir)
                process.kill()
                process.join()
                self.tally.kills += 1
                self.tally.kills_in_save += any((run_dir / "checkpoints").glob(".tmp_*"))
                assert _newest_step(run_dir) >= before, f"{run_dir}: a complete checkpoint was lost"
            elif process.exitcode == 0:
                return
            else:
                raise RuntimeError(f"training failed after a kill: {_output(run_dir)}")

    def _start(self, name: str, run_dir: Path) -> multiprocessing.Process:
        teacher = ""
        if "{teacher}" in RUNS[name][1]:
            teacher = str(self.undisturbed("edm")[0])
        arguments = (name, str(run_dir), str(self.folder / "images.npz"), teacher)
        process = self._server.Process(target=train, args=arguments)
        process.start()
        return process


def write_images(path: Path) -> None:
    """A data set of 12 random images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = np.random.RandomState(0).randint(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(path, arr_0=images)


def train(name: str, run_dir: str, data: str, teacher: str, delay: float = 0.003) -> None:
    """One start of a run, in a process of its own; what it prints goes to <run>.txt."""
    with open(f"{run_dir}.txt", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from tqdm import tqdm

    from cm.commands.cli import parse
    from cm.commands.train import run_train
    from cm.config.scripts import SCRIPTS

    tqdm.set_lock(threading.RLock())  # its own would leave a semaphore behind at each kill
    torch.set_num_threads(1)
    script, own = RUNS[name]
    flags = f"{NETWORK} {LOOP} {own}".split()
    places = ["--data_dir", data, "--out_dir", run_dir]
    with slow_storage(delay):
        run_train(parse(SCRIPTS[script], [flag.format(teacher=teacher) for flag in flags] + places))


@contextlib.contextmanager
def slow_storage(delay: float) -> Iterator[None]:
    """Every flush to disk and every rename takes `delay` seconds longer, before and after it."""
    names = ("fsync", "rename", "replace")
    originals = {name: getattr(os, name) for name in names}

    def slowed(original: Callable) -> Callable:
        def slow(*args, **kwargs):
            time.sleep(delay)
            result = original(*args, **kwargs)
            time.sleep(delay)
            return result

        return slow

    try:
        for name in names:
            setattr(os, name, slowed(originals[name]))
        yield
    finally:
        for name in names:
            setattr(os, name, originals[name])


def compare(run_dir: Path, reference: Path) -> None:
    """AssertionError that names the first difference of two finished runs: every tensor, counter and logged row."""
    mine, other = complete_checkpoints(run_dir)[-1], complete_checkpoints(reference)[-1]
    names = sorted(path.name for path in other.iterdir())
    assert sorted(path.name for path in mine.iterdir()) == names, f"{mine} has other files than {other}"
    for name in names:
        if name.endswith(".pt"):
            difference = _difference(load_weights(mine / name)[0], load_weights(other / name)[0])
            assert not difference, f"{mine / name} differs from {other / name} at {difference}"
    states = [{k: v for k, v in read_state(path).items() if k != "config"} for path in (mine, other)]
    assert states[0] == states[1], f"{mine} and {other} have other states"
    assert _rows(run_dir) == _rows(reference), f"{run_dir} and {reference} logged other rows"


def _difference(a, b, where: str = "") -> str:
    """Place of the first difference of two nested contents; empty when they are bitwise equal."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return "" if a.dtype == b.dtype and torch.equal(a, b) else where or "the top"
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next(filter(None, (_difference(a[k], b[k], f"{where}/{k}") for k in a)), "")
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return next(
            filter(None, (_difference(x, y, f"{where}/{i}") for i, (x, y) in enumerate(zip(a, b)))), ""
        )
    return "" if a == b else where or "the top"


def _rows(run_dir: Path) -> list[dict]:
    """Logged rows without their timings."""
    rows = [json.loads(line) for line in Path(run_dir, "progress.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def _newest_step(run_dir: Path) -> int:
    found = complete_checkpoints(run_dir)
    return read_state(found[-1])["step"] if found else -1


def _output(run_dir: Path) -> str:
    return Path(f"{run_dir}.txt").read_text()[-2000:]
