"""The plan of a whole run: a preset with flags on a cluster, what makes it fit, and how plans meet measurements."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cm.commands.cli import parse_config, read_file
from cm.commands.fit import fitted
from cm.commands.sample import CallCounter, noise_levels, sample_batches, solver_options
from cm.config import presets
from cm.config.derived import AUTO, is_consistency, precision, stop_step, training_mode, with_counts
from cm.config.rows import OBJECTIVES
from cm.config.scripts import (
    SCRIPTS,
    ClassifierConfig,
    CmTrainConfig,
    EdmTrainConfig,
    SampleConfig,
    TrainConfig,
    configuration_class,
    flags_of,
)
from cm.diffusion.denoiser import Denoiser
from cm.errors import UserError, choose
from cm.models.factory import choose_device, create_precond
from cm.models.pretrained import Model
from cm.sampling.noise import get_generator
from cm.tools.planning.devices import Cluster, device_named, parse_cluster
from cm.tools.planning.estimate import Sampling, Step, largest_microbatch, plan_sampling, plan_step
from cm.tools.profiling.report import Report, Row, load_report
from cm.tools.profiling.timing import product_ceiling
from cm.training.memory import available

HOUR = 3600
# A GPU is slow at fewer images at a time than this.
USEFUL = 8
# What saves memory at a price, the cheapest first
LEVERS: tuple[dict[str, Any], ...] = (
    {},
    {"shard": "optimizer"},
    {"use_checkpoint": True},
    {"use_checkpoint": True, "shard": "optimizer"},
    {"use_checkpoint": True, "shard": "optimizer", "ema_device": "cpu"},
    {"use_checkpoint": True, "shard": "fsdp"},
    {"use_checkpoint": True, "shard": "fsdp", "ema_device": "cpu"},
)


@dataclass(frozen=True)
class Way:
    """Flags, the largest microbatch that fits with them (0: none), and the step with it (with 1 where none fits)."""

    flags: str
    microbatch: int
    step: Step


@dataclass(frozen=True)
class Plan:
    """A preset on a cluster. chosen: --microbatch was chosen here, because the whole batch does not fit.

    steps: of training, 0 where only a signal stops it. images: to draw, where that is planned.
    """

    preset: str
    cluster: Cluster
    precision: str
    step: Step | None = None
    chosen: bool = False
    steps: int = 0
    ways: tuple[Way, ...] = ()
    sampling: Sampling | None = None
    images: int = 0

    @property
    def fits(self) -> bool:
        """Whether the GPUs have the memory."""
        return (self.step or self.sampling).fits(self.cluster.device)

    @property
    def hours(self) -> float:
        """Of the run, data, previews and checkpoints apart."""
        if self.step is not None:
            return self.steps * self.step.time.total / HOUR
        batches = math.ceil(self.images / (self.sampling.batch * self.cluster.count))
        return batches * self.sampling.seconds / HOUR

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs."""
        return self.hours * self.cluster.count


@dataclass(frozen=True)
class Measured:
    """What a report of scripts/benchmark.py says. slowdown: measured over modelled time of its first training row."""

    path: str
    report: Report
    cluster: Cluster
    row: str
    slowdown: float

    def comparison(self) -> list[tuple[str, float, float, float, float]]:
        """(row, seconds measured and planned, peak bytes measured and planned) of every training row."""
        found = []
        for row in _training_rows(self.report):
            step = _row_step(row, self.cluster, self.slowdown)
            peak = row.figures["peak_memory_mib"] * 2**20
            found.append((row.name, _seconds(row, self.report), step.time.total, peak, step.peak))
        return found


def this_machine() -> str:
    """What `--gpus` calls the machine of this process: its GPUs, or 1xCPU. UserError for a GPU that is not known."""
    device = choose_device("auto")
    if device.type != "cuda":
        return "1xCPU"
    found = torch.cuda.get_device_properties(device)
    return f"{torch.cuda.device_count()}x{device_named(found.name, found.total_memory)}"


def cluster_of(gpus: str) -> Cluster:
    """What `--gpus` says; of a CPU this machine's, with its free memory and the speed that its products have now."""
    if not gpus.upper().endswith("CPU"):
        return parse_cluster(gpus)
    here = torch.device("cpu")
    cluster = parse_cluster(gpus, product_ceiling(here, torch.float32))
    return replace(cluster, device=replace(cluster.device, memory=available(here)))


def read_measured(path: str, gpus: str) -> tuple[Cluster, Measured]:
    """(the cluster to plan for, the measurement that calibrates it); UserError where they do not fit."""
    report = load_report(path)
    rows = _training_rows(report)
    if not rows:
        raise UserError(f"--measured {path} has no row of scripts/benchmark.py train")
    first = rows[0]
    cluster = parse_cluster(gpus, first.figures["ceiling_flops_per_second"])
    there = Cluster(cluster.device, report.environment.get("processes", 1))
    rate = first.figures["flops_per_second"]
    if not 0.01 < rate / cluster.device.half <= 1.0:
        raise UserError(
            f"--measured {path} has {rate / 1e12:.3g} TFLOP/s on {report.environment.get('device')}, "
            f"which is not what a {cluster.device.name} does"
        )
    modelled = _row_step(first, there, 1.0).time
    measured = _seconds(first, report) - modelled.communication
    slowdown = measured / (modelled.total - modelled.communication)
    return cluster, Measured(path, report, there, first.name, slowdown)


def _training_rows(report: Report) -> list[Row]:
    wanted = ("median_ms", "cpu_ms", "flops_per_second", "ceiling_flops_per_second", "peak_memory_mib")
    return [r for r in report.rows if r.name.startswith("train/") and all(k in r.figures for k in wanted)]


def _seconds(row: Row, report: Report) -> float:
    """Of a step; on a CPU its processor time, as if each thread had a core of its own."""
    if row.figures["ceiling_flops_per_second"] > 1e13:  # no CPU
        return row.figures["median_ms"] / 1e3
    return row.figures["cpu_ms"] / 1e3 / report.environment.get("threads", 1)


def _row_step(row: Row, cluster: Cluster, slowdown: float) -> Step:
    classifier = row.config.get("preset", "").endswith("classifier")
    train = ClassifierConfig if classifier else EdmTrainConfig
    plain = CmTrainConfig if "training_mode" in row.config else train
    cls = configuration_class(plain, row.config)
    known = {k: v for k, v in row.config.items() if k in flags_of(cls)}
    return plan_step(cls(**known), cluster, slowdown=slowdown)


def plan_training(name: str, cluster: Cluster, flags: Sequence[str] = (), slowdown: float = 1.0) -> Plan:
    """The training run of a preset, or of a configuration's file or run, which `--preset auto` makes fit this machine.

    Where the batch does not fit and no flag says --microbatch, one is chosen.
    """
    source = ["--preset", name]
    if _is_file(name):  # without a preset as cm train takes it
        known = {"preset", "script"} & read_file(name).keys() or "--preset" in flags
        source = ["--config", name] if known else ["--config", name, "--preset", AUTO]
    config = parse_config(SCRIPTS[_training_script(name)], [*source, *flags])
    if config.preset == AUTO and "num_channels" not in config.explicit:
        config = fitted(config)
    config = with_counts(config)
    step = plan_step(config, cluster, slowdown=slowdown)
    chosen = not step.fits(cluster.device) and config.microbatch < 1
    if chosen:
        size = power_of_two(largest_microbatch(config, cluster))
        step = plan_step(config, cluster, microbatch=max(size, 1), slowdown=slowdown)
    ways = tuple(_ways(config, cluster, slowdown)) if cluster.device.is_gpu else ()
    return Plan(name, cluster, precision(config), step, chosen, stop_step(config), ways)


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".json", ".yaml", ".yml") or Path(name).exists()


def _training_script(name: str) -> str:
    if name == AUTO:
        return "edm_train"
    if not _is_file(name):
        return presets.get(name).training_script
    content = read_file(name)
    learns = {"training_mode", "teacher_model_path"} & content.keys()
    script = content.get("script") or ("cm_train" if learns else "edm_train")
    return choose({n: n for n in SCRIPTS if n.endswith("_train")}, str(script), f"{name}: script")


def power_of_two(n: int) -> int:
    """The largest one up to n; 0 for 0."""
    return 1 << (n.bit_length() - 1) if n else 0


def _ways(config: TrainConfig, cluster: Cluster, slowdown: float) -> list[Way]:
    """The levers that the configuration has not pulled yet, and the configuration itself."""
    ways, seen = [], []
    for lever in LEVERS:
        new = {name: value for name, value in lever.items() if getattr(config, name) != value}
        alone = "shard" in new and cluster.count == 1
        if new in seen or alone or ("use_checkpoint" in new and needs_whole_graph(config)):
            continue
        seen.append(new)
        changed = replace(config, **lever, microbatch=-1)
        size = largest_microbatch(changed, cluster)
        step = plan_step(changed, cluster, microbatch=max(power_of_two(size), 1), slowdown=slowdown)
        words = " ".join(f"--{name} {value}" for name, value in new.items())
        ways.append(Way(words or "--microbatch alone", size, step))
    return ways


def needs_whole_graph(config: TrainConfig) -> bool:
    """Whether checkpointing is refused: continuous time without --stop_grad."""
    return OBJECTIVES[training_mode(config)].continuous and not getattr(config, "stop_grad", True)


def first_way(plan: Plan) -> Way | None:
    """The cheapest lever with which a useful number of images fits; None if none does."""
    enough = min(plan.step.images, USEFUL)
    return next((way for way in plan.ways if way.microbatch >= enough), None)


def plan_images(
    name: str, cluster: Cluster, images: int, flags: Sequence[str] = (), slowdown: float = 1.0
) -> Plan:
    """Drawing images from a preset's model, with its sampler."""
    config = with_counts(parse_config(SampleConfig, ["--preset", name, *flags]))
    sampling = plan_sampling(config, cluster, evaluations(config), slowdown)
    return Plan(name, cluster, precision(config), sampling=sampling, images=images)


def evaluations(config: SampleConfig) -> int:
    """Network evaluations per image, by running the sampler on one pixel; of rk45 those that this pixel takes."""
    small = replace(config, image_size=1, in_channels=1, class_cond=False, classes="")
    precond = create_precond(small, consistency=is_consistency(small.training_mode))
    denoiser = Denoiser(lambda x, t: torch.zeros_like(x), precond)
    model = Model(small, denoiser, torch.device("cpu"))
    generator = get_generator("indexed", num_samples=1, seed=0)
    counter = CallCounter()
    generator.set_rows(range(1))
    sample_batches(model, generator, noise_levels(small), counter, solver_options(model))(1, None)
    return counter.per_batch
