"""Where time goes, as torch's profiler sees it: by kernel, and by kind of operator."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cm.tools.profiling.timing import synchronize

# What `non_convolution_share` counts as convolution, for the reader of a row
COUNTED = (
    "layers of kernel 1x1 (attention's too) and 3x3, and the FIR filters, which run as grouped convolutions"
)


def _record(run: Callable[[], object], device: torch.device, calls: int) -> profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as record:
        for _ in range(calls):
            run()
        synchronize(device)
    return record


def _own_time(event: Any, device: torch.device) -> float:
    return event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total


def top_kernels(
    run: Callable[[], object], device: torch.device, *, steps: int = 3, count: int = 20
) -> list[dict[str, Any]]:
    """The kernels of `steps` calls by their own time: name, calls, ms per step and share; on a CPU the operators."""
    cuda = device.type == "cuda"
    found = {}
    for event in _record(run, device, steps).key_averages():
        if cuda and event.device_type != DeviceType.CUDA:  # an operator: its kernels are listed by themselves
            continue
        found[event.key] = (_own_time(event, device) / 1e3 / steps, event.count / steps)
    total = sum(ms for ms, _ in found.values())
    ranked = sorted(found, key=lambda name: -found[name][0])[:count]
    return [
        {
            "name": name,
            "calls": found[name][1],
            "ms": round(found[name][0], 4),
            "share": round(found[name][0] / total, 4) if total else 0.0,
        }
        for name in ranked
    ]


def time_shares(run: Callable[[], object], device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Shares of the operators' own time in run(): `non_convolution_share`, and `resampling_share` of the FIR filters.

    Of convolutions forward and backward count, with what they do to the layout of their operands.
    """
    run()
    record = _record(run, device, repeats)
    total = convolution = resampling = 0.0
    for event in record.key_averages(group_by_input_shape=True):
        if event.device_type != DeviceType.CPU:  # a kernel, whose time its operator has already
            continue
        time = _own_time(event, device)
        total += time
        if event.key.startswith("aten::") and "conv" in event.key:
            convolution += time
            resampling += time * any(is_filter(shape) for shape in event.input_shapes)
    return {"non_convolution_share": 1 - convolution / total, "resampling_share": resampling / total}


def is_filter(shape: list[int]) -> bool:
    """Whether an operand has the shape of a filter with a kernel per channel: (C, 1, T, T)."""
    return len(shape) == 4 and shape[1] == 1 and shape[2] == shape[3] > 1
