"""The parts of the GPU report, in order of worth: each yields rows as it measures them.

A part is sized for a GPU of minutes; `tiny` shrinks everything to seconds on a CPU, to try the report itself.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from cm.config.registry import resolve
from cm.models.factory import choose_device
from cm.tools.bench.data import bench_data
from cm.tools.bench.gpu.learning import learn
from cm.tools.bench.gpu.norms import bench_norms
from cm.tools.bench.runs import Options, description, train_cases, train_config, training
from cm.tools.bench.sample import bench_sample, noise_rows
from cm.tools.bench.train import bench_train, compare_with_original
from cm.tools.profiling.kernels import top_kernels
from cm.tools.profiling.report import Row, device_facts
from cm.tools.profiling.timing import product_ceiling

ROOT = Path(__file__).resolve().parents[4]
OPTIONAL = ("pytest", "PIL", "piq", "blobfile", "mpi4py", "torchvision", "sklearn", "scipy", "diffusers")
CD, LSUN, EDM = "imagenet64_cd_lpips", "bedroom256_cd_lpips", "imagenet64_edm"
HAS_LPIPS = all(find_spec(name) for name in ("piq", "torchvision"))
BF16 = ("--precision", "bf16", "--use_fp16", "False")  # which the released presets ask for
# The network of a trial of the report
TINY = ("--batch_size", "2", "--image_size", "8", "--channel_mult", "1", "--attention_resolutions", "8")
TINY_LPIPS = (*TINY, "--lpips_size", "16")


@dataclass(frozen=True)
class Setup:
    """What the command line of the report says. seconds: the time limit of the part that runs."""

    device: str = "auto"
    tiny: bool = False
    original: str = ""  # a checkout of the original repository
    data: str = ""  # prepared images for the learning run
    seconds: float = 60.0

    def options(self, case: str, preset: str, batch: int, *flags: str) -> Options:
        """A measurement of a preset with a batch; tiny: of the objective `case` of the preset "tiny"."""
        if self.tiny:
            small = TINY_LPIPS if case.endswith("lpips") else TINY
            return Options("tiny", self.device, (case,), 1, 1, (*small, *flags))
        return Options(preset, self.device, (), 3, 7, ("--batch_size", str(batch), *flags))


@dataclass(frozen=True)
class Part:
    """seconds: its limit in a report of 8 minutes. needs: packages, without which it is left out.

    gpu_only: why it is left out on a CPU, if it is.
    """

    title: str
    seconds: float
    run: Callable[[Setup], Iterable[Row]]
    needs: tuple[str, ...] = ()
    gpu_only: str = ""


def _environment(setup: Setup) -> Iterator[Row]:
    missing = [name for name in OPTIONAL if find_spec(name) is None]
    yield Row("environment", {}, device_facts(choose_device(setup.device)) | {"not installed": missing})


def _tests(marks: str) -> Callable[[Setup], Iterator[Row]]:
    """pytest -m MARKS; figures: its last line, and the names of what failed."""

    def run(setup: Setup) -> Iterator[Row]:
        """A row after every test, so that one which does not end takes none of the others with it."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-v",
            "-m",
            marks,
            "-p",
            "no:cacheprovider",
            "-rfE",
            *gpu_tests(),
        ]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
        lines, begin = [], time.monotonic()
        for line in process.stdout:
            lines.append(line.rstrip())
            name, _, outcome = line.partition(" ")
            if "::" in name and (word := outcome.split(" ")[0]) in ("PASSED", "FAILED", "ERROR"):
                seconds, begin = time.monotonic() - begin, time.monotonic()
                yield Row(name.partition("::")[2], {}, {"median_ms": 1e3 * seconds, "outcome": word})
        code = process.wait()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        figures = {"exit_code": code, "summary": lines[-1] if lines else "", "failed": failed}
        yield Row(f"pytest -m '{marks}'", {}, figures)
        if code not in (0, 5):  # 5: none was selected
            raise RuntimeError("\n".join([f"pytest ended with {code}", *lines[-40:]]))

    return run


def gpu_tests() -> list[str]:
    """The files that have tests for a GPU: to collect all of them would take longer than to run these."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [path for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]
    return [str(path.relative_to(ROOT)) for path in found]


def _ceiling(setup: Setup) -> Iterator[Row]:
    device = choose_device(setup.device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rate = product_ceiling(device, dtype, size=256 if setup.tiny else 0)
        yield Row(f"ceiling/{str(dtype).removeprefix('torch.')}", {}, {"ceiling_flops_per_second": rate})


def _steps(name: str) -> Callable[[Setup], Iterator[Row]]:
    """The training steps of `STEPS`, under names of their own."""

    def run(setup: Setup) -> Iterator[Row]:
        for label, options in STEPS[name].items():
            for row in bench_train(options(setup)):
                yield replace(row, name=f"{name}/{label}")

    return run


def _cd(*flags: str, preset: str = CD, batch: int = 64) -> Callable[[Setup], Options]:
    """A CD step; in l2 where the packages of LPIPS are missing, which the environment says."""
    if HAS_LPIPS:
        return lambda setup: setup.options("cd_lpips", preset, batch, *flags)
    return lambda setup: setup.options("cd", preset.replace("lpips", "l2"), batch, *flags)


def _preset(case: str, preset: str, batch: int, *flags: str) -> Callable[[Setup], Options]:
    return lambda setup: setup.options(case, preset, batch, *flags)


# Training steps that are measured: part -> name of the row -> how
STEPS: dict[str, dict[str, Callable[[Setup], Options]]] = {
    "cd": {
        "bf16": _cd(*BF16),
        "bf16, default format": _cd(*BF16, "--channels_last", "False"),
        "fp16": _cd("--precision", "fp16"),
        **({"bf16, LPIPS in bf16": _cd(*BF16, "--lpips_precision", "bf16")} if HAS_LPIPS else {}),
    },
    "cd_compiled": {"bf16, compiled": _cd(*BF16, "--compile", "True")},
    "edm": {"bf16": _preset("edm", EDM, 128, *BF16)},
    "networks": {
        "CD, NCSN++": _preset("cd", "cifar10_cd_l2", 128),
        "sCT, DDPM++": _preset("sct", "cifar10_sct", 128),
    },
    "lsun": {"bf16": _cd(*BF16, "--use_checkpoint", "True", preset=LSUN, batch=8)},
}


def sampling_options(setup: Setup, batch: int) -> Options:
    """One-step sampling of ImageNet-64."""
    options = setup.options("onestep", CD, batch, *BF16)
    return replace(options, cases=("onestep" if setup.tiny else CD,))


def original_options(setup: Setup) -> Options:
    """The step that is compared with the original's."""
    precision = "fp32" if setup.tiny else "fp16"  # which a CPU emulates
    options = setup.options("cd", CD.replace("lpips", "l2"), 64, "--precision", precision)
    return replace(options, repeats=min(options.repeats, 3))


def _sampling(setup: Setup) -> Iterator[Row]:
    for batch in (64, 256):
        for row in bench_sample(sampling_options(setup, batch)):
            yield replace(row, name=f"one step/batch {batch}")


def _original(setup: Setup) -> Iterator[Row]:
    """The original's step: as its checkout has it where a path is given, and its arithmetic written anew."""
    yield from compare_with_original(original_options(setup), setup.original)


def _inception(setup: Setup) -> Iterator[Row]:
    # The evaluations stand above this package.
    bench_inception = resolve("evaluations.bench:bench_inception")
    options = Options("tiny", setup.device, repeats=1 if setup.tiny else 5)
    yield from bench_inception(options, choose_device(setup.device), batch=1 if setup.tiny else 0)


def _norms(setup: Setup) -> Iterator[Row]:
    yield from bench_norms(choose_device(setup.device), batch=2 if setup.tiny else 64, tiny=setup.tiny)


def _data(setup: Setup) -> Iterator[Row]:
    options = Options("tiny", setup.device, (), 1, 2 if setup.tiny else 5)
    yield from bench_data(replace(options, cases=("store64",)), count=16 if setup.tiny else 64)


def _profile(setup: Setup) -> Iterator[Row]:
    """The kernels of the CD step that take most of its time."""
    options = _cd(*BF16)(setup)
    config = train_config(options, train_cases(options)[0])
    with training(config) as trainer:
        for _ in range(options.warmup):
            trainer.run_step(*next(trainer.data))
        kernels = top_kernels(lambda: trainer.run_step(*next(trainer.data)), trainer.device)
    yield Row("kernels of a CD step", description(config), {"kernels": kernels})


PARTS: dict[str, Part] = {
    "environment": Part("Environment", 20, _environment),
    "tests": Part("Tests on a GPU, the quick ones", 60, _tests("gpu and not slow"), ("pytest",)),
    "ceiling": Part("Matrix ceiling", 20, _ceiling),
    "cd": Part(
        "CD step, ImageNet-64, batch 64, LPIPS",
        100,
        _steps("cd"),
    ),
    "sample": Part("One-step sampling", 40, _sampling),
    "norms": Part("Group norm and SiLU by form, forward and backward, bf16", 40, _norms),
    "cd_compiled": Part(
        "CD step, compiled",
        150,
        _steps("cd_compiled"),
        gpu_only="compiling takes minutes on a CPU",
    ),
    "edm": Part("EDM step, ImageNet-64", 40, _steps("edm")),
    "networks": Part("CIFAR-10: NCSN++ and the step with a forward-mode derivative", 60, _steps("networks")),
    "lsun": Part("LSUN-256, batch 8", 60, _steps("lsun")),
    "original": Part("The original's step", 60, _original),
    "inception": Part("Inception", 30, _inception),
    "profile": Part("Profile", 60, _profile),
    "learning": Part("Learning", 120, lambda s: learn(s.device, s.data, seconds=s.seconds, tiny=s.tiny)),
    "data": Part("Reading images", 20, _data, ("PIL",)),
    "tests_slow": Part("Tests on a GPU, the others", 300, _tests("gpu and slow"), ("pytest",)),
    "noise": Part("Noise", 20, lambda s: noise_rows(Options("tiny", s.device, (), 1, 1 if s.tiny else 3))),
}
