"""Which kernels take the time of a step, as torch's profiler sees them."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def top_kernels(
    run: Callable[[], object], device: torch.device, *, steps: int = 3, count: int = 20
) -> list[dict[str, Any]]:
    """The kernels of `steps` calls by their own time: name, calls, ms per step and share; on a CPU the operators."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as record:
        for _ in range(steps):
            run()
        if cuda:
            torch.cuda.synchronize(device)
    found = {}
    for event in record.key_averages():
        if cuda and event.device_type != DeviceType.CUDA:  # an operator: its kernels are listed by themselves
            continue
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        found[event.key] = (time / 1e3 / steps, event.count / steps)
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
