"""Plans as text and as JSON."""

from dataclasses import asdict
from typing import Any

import torch

from cm.tools.planning.devices import GIB, MEMORY_SHARE, OVERLAP, PRODUCT_SHARE
from cm.tools.planning.run import USEFUL, Measured, Plan, first_way
from cm.tools.profiling.report import markdown

ASSUMED = (
    f"Speed is ASSUMED, not measured: {PRODUCT_SHARE:.0%} of the data sheet's arithmetic, {MEMORY_SHARE:.0%} of its "
    f"memory bandwidth, {OVERLAP:.0%} of the communication hidden. --measured FILE.json, a report of "
    "scripts/benchmark.py train, replaces that."
)

ASSUMED_CPU = (
    "Speed of the CPU: large matrix products, just measured: {:.3g} GFLOP/s with {} thread(s). That other operations "
    "keep to this is ASSUMED; --measured FILE.json, a report of cm benchmark train, replaces that."
)

MIB = 2**20


def document(plans: list[Plan], measured: Measured | None, price: float) -> dict[str, Any]:
    """All numbers: bytes, seconds, hours."""
    return {
        "speed": "assumed" if measured is None else f"measured: {measured.path}, {measured.row}",
        "slowdown": 1.0 if measured is None else measured.slowdown,
        "plans": [_record(plan, price) for plan in plans],
        "check": [] if measured is None else measured.comparison(),
    }


def _record(plan: Plan, price: float) -> dict[str, Any]:
    way = first_way(plan) if plan.step and not plan.fits else None
    record = asdict(plan) | {
        "gpus": plan.cluster.name,
        "fits": plan.fits,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "cost": plan.gpu_hours * price,
        "memory_total": (plan.step or plan.sampling).memory.total,
        "first_lever": way and way.flags,
    }
    record["cluster"]["device"]["memory"] = min(plan.cluster.device.memory, 2**60)  # JSON has no infinity
    return record


def text(plans: list[Plan], measured: Measured | None, price: float) -> str:
    """What the command prints."""
    blocks = [_summary(plans, price)]
    blocks += [_details(plan) for plan in plans if plan.step]
    if measured is None:
        device = plans[0].cluster.device
        threads = torch.get_num_threads()
        blocks.append(ASSUMED if device.is_gpu else ASSUMED_CPU.format(device.fp32 / 1e9, threads))
    else:
        blocks += [
            f"Speed measured: {measured.path}, {measured.row} ({measured.report.environment.get('device')}); "
            f"{measured.slowdown:.2f} times the model's time.",
            _check(measured),
        ]
    return "\n\n".join(block for block in blocks if block)


def _summary(plans: list[Plan], price: float) -> str:
    heads = ["preset", "GPUs", "precision", "images per GPU", "at a time"]
    heads += ["GiB per GPU", "s per step", "hours", "GPU-hours"]
    return "\n".join(
        markdown([*heads, *(["cost"] if price else [])], [_summary_row(plan, price) for plan in plans])
    )


def _summary_row(plan: Plan, price: float) -> list[str]:
    memory = f"{(plan.step or plan.sampling).memory.total / GIB:.1f}" + (
        "" if plan.fits else " (does not fit)"
    )
    if plan.step is not None:
        sizes = [f"{plan.step.images}", f"{plan.step.microbatch}" + (" (chosen)" if plan.chosen else "")]
        seconds = plan.step.time.total
    else:
        sizes = [f"{plan.sampling.batch}", f"NFE {plan.sampling.evaluations}"]
        seconds = plan.sampling.seconds
    endless = plan.step is not None and not plan.steps
    hours = ["until stopped", ""] if endless else [f"{plan.hours:.4g}", f"{plan.gpu_hours:.4g}"]
    cost = [f"{plan.gpu_hours * price:.4g}"] if price else []
    return [plan.preset, plan.cluster.name, plan.precision, *sizes, memory, f"{seconds:.3g}", *hours, *cost]


def _details(plan: Plan) -> str:
    memory, time = asdict(plan.step.memory), asdict(plan.step.time)
    lines = [
        f"{plan.preset}: memory per GPU [GiB]: " + _parts(memory, 1 / GIB),
        f"  time of a step [s]: {_parts(time, 1.0)}; {plan.step.flops / 1e12:.4g} TFLOP per GPU",
    ]
    if plan.chosen:
        lines.append(
            f"  --microbatch {plan.step.microbatch} was chosen: {plan.step.images} images at a time do not fit"
            if plan.fits
            else "  not even one image at a time fits"
        )
    if plan.ways:
        way = first_way(plan)
        enough = min(plan.step.images, USEFUL)
        lines.append(f"  first lever for {enough} images at a time or more: {way.flags if way else 'none'}")
        rows = [
            [w.flags, str(w.microbatch), f"{w.step.memory.total / GIB:.1f}", f"{w.step.time.total:.3g}"]
            for w in plan.ways
        ]
        heads = ["levers", "largest microbatch", "GiB at its power of two", "s per step"]
        lines += markdown(heads, rows)
    return "\n".join(lines)


def _parts(values: dict[str, float], unit: float) -> str:
    return ", ".join(f"{name} {value * unit:.3g}" for name, value in values.items() if value)


def _check(measured: Measured) -> str:
    rows = [
        [name, *_against(seconds, planned, ".3f"), *_against(peak / MIB, planned_peak / MIB, ".1f")]
        for name, seconds, planned, peak, planned_peak in measured.comparison()
    ]
    return "\n".join(
        markdown(["row", "s measured", "s planned", "error", "MiB measured", "MiB planned", "error"], rows)
    )


def _against(measured: float, planned: float, form: str) -> list[str]:
    return [f"{measured:{form}}", f"{planned:{form}}", f"{planned / measured - 1:+.1%}"]
