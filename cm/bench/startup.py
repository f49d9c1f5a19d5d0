"""What a user waits for before anything happens: --help, imports, the first training step."""

import subprocess
import sys
from pathlib import Path

import torch

from cm.bench.measure import interleaved
from cm.bench.report import Row
from cm.bench.runs import Options

ROOT = Path(__file__).resolve().parents[2]
FACADE = "import cm.script_util, cm.karras_diffusion, cm.train_util, cm.unet, cm.image_datasets, cm.logger"
# case -> arguments of the interpreter
PROGRAMS = {
    "python": ("-c", "pass"),
    "help": ("scripts/image_sample.py", "--help"),
    "torch": ("-c", "import torch"),
    "cm": ("-c", f"import torch; {FACADE}"),
}


def bench_startup(options: Options) -> list[Row]:
    """A row per program; `beyond_ms` is the time beyond that of the program it builds on."""
    runs = {name: lambda arguments=arguments: run(*arguments) for name, arguments in PROGRAMS.items()}
    timings = interleaved(runs, torch.device("cpu"), warmup=1, repeats=options.repeats)
    base = {"help": "python", "torch": "python", "cm": "torch"}
    rows = []
    for name, timing in timings.items():
        figures = timing.summary()
        if name in base:
            pairs = zip(timing.seconds, timings[base[name]].seconds, strict=True)
            figures["beyond_ms"] = 1e3 * sorted(a - b for a, b in pairs)[options.repeats // 2]
        rows.append(Row(f"startup/{name}", {"arguments": " ".join(PROGRAMS[name])}, figures))
    return rows


def run(*arguments: str) -> None:
    """One interpreter from start to end."""
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
