"""Training steps of the real loop: time, time by phase, peak memory, share of the arithmetic ceiling."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cm.config.choices import PRECISIONS
from cm.config.derived import precision
from cm.objectives.base import Roles
from cm.runtime.distributed import get_world_size
from cm.tools.bench.peers import PlainLoop, checkout_step, peer_loops
from cm.tools.bench.runs import Options, TrainConfig, description, train_cases, train_config, training
from cm.tools.planning.step import step_flops
from cm.tools.profiling.report import Row
from cm.tools.profiling.timing import (
    PhaseClock,
    Timing,
    beside_peers,
    interleaved,
    peak_memory,
    product_ceiling,
)
from cm.training.trainer import Trainer

# Cases of --preset tiny whose whole step is compared with that of other loops; sizes and batch are flags
COMPARED = ("edm", "cd", "ct")


def bench_train(options: Options) -> list[Row]:
    """A row per objective of --preset tiny, or one for another preset; in one process with peers of edm, cd and ct."""
    rows = []
    for case in train_cases(options):
        rows.append(train_row(case, options, peers=case in COMPARED and get_world_size() == 1))
    return rows


def train_row(case: str, options: Options, *, peers: bool = False) -> Row:
    """The row of one objective; with peers, their steps are timed in turns with ours."""
    config = train_config(options, case)
    with training(config) as trainer:
        return Row(f"train/{case}", description(config), train_figures(trainer, config, options, peers=peers))


def compare_with_original(options: Options, checkout: str = "") -> Iterator[Row]:
    """Our step beside the original's arithmetic, and beside the step of a checkout of it where a path is given."""
    (case,) = train_cases(options)
    row = train_row(case, options, peers=True)
    yield row
    if checkout:
        config = train_config(options, case)
        theirs = Timing(checkout_step(checkout, config, options)["seconds"])
        ratio = row.figures["median_ms"] / (1e3 * theirs.median)
        yield Row(
            f"checkout/{case}",
            description(config),
            {"median_ms": 1e3 * theirs.median, "ours_over_theirs": ratio, "repeats": len(theirs.seconds)},
        )


def train_figures(
    trainer: Trainer, config: TrainConfig, options: Options, *, peers: bool = False
) -> dict[str, Any]:
    """Figures of a training loop; with several ranks also what their communication costs."""

    def step() -> None:
        trainer.run_step(*next(trainer.data))

    device, world = trainer.device, get_world_size()
    loops, left_out = peer_loops(trainer, config) if peers else ({}, {})
    runs = {"cm": step, **{name: partial(_peer_step, loop, trainer) for name, loop in loops.items()}}
    timings = interleaved(runs, device, warmup=options.warmup, repeats=options.repeats)
    timing = timings["cm"]
    loops.clear()
    peak = peak_memory(step, device)
    images = trainer.batch.total
    work = step_flops(config)
    rate = sum(work.values()) * images / world / timing.undisturbed(device)
    ceiling = product_ceiling(device, PRECISIONS.load(precision(config)))
    phases = phase_times(trainer, config, options.repeats)
    figures = {
        **(beside_peers(timings) if len(timings) > 1 else timing.summary()),
        **({"left_out": left_out} if left_out else {}),
        "images_per_second": images / timing.median,
        "phases_ms": phases,
        "ceiling_by_phase": share_by_phase(work, phases, images / world, ceiling),
        "overhead_share": overhead_share(phases),
        "peak_memory_mib": peak / 2**20,
        **state_memory(trainer),
        "flops_per_second": rate,
        "ceiling_flops_per_second": ceiling,
        "share_of_ceiling": rate / ceiling,
    }
    return figures | (communication(trainer, timing, options.repeats) if world > 1 else {})


def _peer_step(loop: PlainLoop, trainer: Trainer) -> None:
    loop.step(*next(trainer.data))


def share_by_phase(
    work: dict[str, float], phases_ms: dict[str, float], images: float, ceiling: float
) -> dict[str, float]:
    """Arithmetic of each phase [FLOP per image] over what the ceiling allows in its time."""
    return {
        name: round(flops * images / (phases_ms[name] / 1e3) / ceiling, 4)
        for name, flops in work.items()
        if phases_ms.get(name)
    }


def state_memory(trainer: Trainer) -> dict[str, Any]:
    """MiB that this rank keeps from step to step on the device that trains, and by kind (on any device)."""
    held = trainer.state.held()
    on_device = sum(
        t.nbytes for tensors in held.values() for t in tensors if t.device.type == trainer.device.type
    )
    return {
        "state_memory_mib": on_device / 2**20,
        "state_memory_by_kind_mib": {k: sum(t.nbytes for t in held[k]) / 2**20 for k in held},
    }


def phase_times(trainer: Trainer, config: TrainConfig, steps: int) -> dict[str, float]:
    """Median milliseconds per step of each phase. `other` is what remains: conversions, meters, the loop itself."""
    clock = PhaseClock(trainer.device)
    state, objective = trainer.state, trainer.objective
    undo = [(trainer, "roles", trainer.roles)]
    trainer.roles = timed_roles(trainer.roles, clock)
    wrapped = [
        (trainer, "update_ema", "ema"),
        (trainer, "update_target_ema", "target ema"),
        (objective, "draw", "draw"),
        (objective, "distance", "distance"),
        (state.student, "backward", "backward"),
        (state.student, "optimize", "optimizer"),
    ]
    for owner, attribute, phase in wrapped:
        if hasattr(owner, attribute):
            original = getattr(owner, attribute)
            undo.append((owner, attribute, original))
            object.__setattr__(owner, attribute, TimedCall(original, phase, clock))  # some are frozen
    rows = []
    try:
        for _ in range(steps):
            with clock.phase("step"):
                with clock.phase("data wait"):
                    batch = next(trainer.data)
                trainer.run_step(*batch)
            times = clock.read()
            rows.append({**times, "other": 2 * times["step"] - sum(times.values())})
    finally:
        for owner, attribute, original in undo:
            object.__setattr__(owner, attribute, original)
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    log = interleaved({"log": trainer.log_step}, trainer.device, warmup=0, repeats=1)["log"]
    medians["log"] = log.median / max(config.log_interval, 1)
    return {name: round(1e3 * value, 4) for name, value in medians.items()}


class TimedNetwork(nn.Module):
    """A network whose calls are timed as a phase."""

    def __init__(self, net: nn.Module, phase: str, clock: PhaseClock):
        super().__init__()
        self.net = net
        self.timed = clock.wrap(phase, net)

    def forward(self, *inputs: Tensor, **cond: Tensor) -> Tensor:
        return self.timed(*inputs, **cond)


class TimedCall:
    """A function, or an object that is called and has more to it, whose calls are timed as a phase."""

    def __init__(self, original: Callable, phase: str, clock: PhaseClock):
        self.original, self.timed = original, clock.wrap(phase, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.timed(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def timed_roles(roles: Roles, clock: PhaseClock) -> Roles:
    """The roles with their networks on the clock."""
    denoisers = {name: getattr(roles, name) for name in ("student", "target", "teacher")}
    return replace(
        roles,
        **{n: d and replace(d, net=TimedNetwork(d.net, n, clock)) for n, d in denoisers.items()},
    )


def overhead_share(phases_ms: dict[str, float]) -> float:
    """Part of the step that is neither a network's nor a distance's forward or backward."""
    arithmetic = ("student", "target", "teacher", "distance", "backward")
    own = sum(time for name, time in phases_ms.items() if name not in ("step", *arithmetic))
    return own / (own + sum(phases_ms.get(name, 0.0) for name in arithmetic))


def communication(trainer: Trainer, step: Timing, repeats: int) -> dict[str, Any]:
    """Bytes that a rank sends per step, the time of the bare all-reduce, and the part of it that the step shows."""
    sizes: dict[torch.dtype, int] = {}  # in the order of the parameters, which is the same on all ranks
    for p in trainer.model.parameters():
        sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
    flat = [torch.zeros(size, dtype=dtype, device=trainer.device) for dtype, size in sizes.items()]

    def without() -> None:
        with trainer._no_sync():
            trainer.run_step(*next(trainer.data))

    def exchange() -> None:
        for values in flat:
            torch.distributed.all_reduce(values)

    runs = {"silent": without, "all-reduce": exchange}
    sharded = trainer.state.ema.partition.parts > 1
    if sharded:
        runs["new weights"] = trainer.state.ema.partition.broadcast
    timings = interleaved(runs, trainer.device, warmup=1, repeats=repeats)
    world = get_world_size()
    exposed = max(step.median - timings["silent"].median, 0.0)
    bare = timings["all-reduce"].median
    return {
        "communication": {
            "bytes_per_rank": 2 * (world - 1) * sum(values.nbytes for values in flat) // world,
            "all_reduce_ms": 1e3 * bare,
            "exposed_ms": 1e3 * exposed,
            "overlap": max(0.0, 1 - exposed / bare),
            **({"new_weights_ms": 1e3 * timings["new weights"].median} if sharded else {}),
        }
    }
