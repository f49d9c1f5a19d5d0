"""What a user waits for before anything happens: --help, imports, the first training step."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cm.runtime.platform import children_seconds
from cm.tools.bench.runs import Options, train_config, write_images
from cm.tools.profiling.report import Row
from cm.tools.profiling.timing import Timing

ROOT = Path(__file__).resolve().parents[3]
FACADE = "import cm.script_util, cm.karras_diffusion, cm.train_util, cm.unet, cm.image_datasets, cm.logger"
SCRIPTS = sorted(p.stem for p in (ROOT / "scripts").glob("[a-z]*.py"))
# case -> (arguments of the interpreter, the case that it builds on)
PROGRAMS: dict[str, tuple[tuple[str, ...], str]] = {
    "python": (("-c", "pass"), ""),
    "torch": (("-c", "import torch"), "python"),
    "cm": (("-c", f"import torch; {FACADE}"), "torch"),
    **{f"help_{name}": ((f"scripts/{name}.py", "--help"), "python") for name in SCRIPTS},
}
# A whole run of one step of the smallest network: from the command to the end, its checkpoint included.
ONE_STEP = ("--preset", "tiny", "--total_training_steps", "1", "--preview_count", "0", "--num_workers", "0")


def bench_startup(options: Options) -> list[Row]:
    """A row per program, in turns; `beyond_ms` is the time beyond that of the program it builds on.

    Bytecode is cached, as it is from a program's second start on: the first call of each does not count.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = write_images(folder, train_config(Options(device="cpu"), "edm"))
        script = ("scripts/edm_train.py", *ONE_STEP, "--device", "cpu", "--data_dir", data)
        programs = {**PROGRAMS, "first_step": ((*script, "--out_dir"), "cm")}
        chosen = options.chosen(programs)
        wanted = {*chosen, *(programs[name][1] for name in chosen)}
        programs = {name: program for name, program in programs.items() if name in wanted}
        timings = {name: Timing() for name in programs}
        for k in range(-1, options.repeats):
            for name, (arguments, _) in programs.items():
                fresh = (f"{folder}/run{k}",) if name == "first_step" else ()
                run(timings[name] if k >= 0 else Timing(), *arguments, *fresh)
    return [startup_row(name, timings, *program) for name, program in programs.items()]


def startup_row(name: str, timings: dict[str, Timing], arguments: tuple[str, ...], base: str) -> Row:
    """Figures of a program beside those of its base; processor time is that of the program."""
    figures: dict[str, float] = dict(timings[name].summary())
    if base in timings:
        for key, kind in (("beyond_ms", "seconds"), ("beyond_cpu_ms", "cpu_seconds")):
            pairs = zip(getattr(timings[name], kind), getattr(timings[base], kind), strict=True)
            figures[key] = 1e3 * statistics.median(a - b for a, b in pairs)
    config = {"arguments": " ".join(arguments), "beyond": base}
    return Row(f"startup/{name}", config, figures)


def run(timing: Timing, *arguments: str) -> None:
    """One interpreter from start to end."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    wall, before = time.perf_counter(), children_seconds()
    subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL
    )
    timing.seconds.append(time.perf_counter() - wall)
    timing.cpu_seconds.append(children_seconds() - before)
