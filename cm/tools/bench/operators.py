"""Where a network's time goes by kind of operator, as torch's profiler attributes it."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# What `non_convolution_share` counts as convolution, for the reader of a row
COUNTED = (
    "layers of kernel 1x1 (attention's too) and 3x3, and the FIR filters, which run as grouped convolutions"
)


def time_shares(run: Callable[[], object], device: torch.device, repeats: int = 3) -> dict[str, float]:
    """Shares of the operators' own time in run(): `non_convolution_share`, and `resampling_share` of the FIR filters.

    Of convolutions forward and backward count, with what they do to the layout of their operands.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    run()
    with profile(activities=activities, record_shapes=True) as record:
        for _ in range(repeats):
            run()
    total = convolution = resampling = 0.0
    for event in record.key_averages(group_by_input_shape=True):
        if event.device_type != DeviceType.CPU:  # a kernel, whose time its operator has already
            continue
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        total += time
        if event.key.startswith("aten::") and "conv" in event.key:
            convolution += time
            resampling += time * any(is_filter(shape) for shape in event.input_shapes)
    return {"non_convolution_share": 1 - convolution / total, "resampling_share": resampling / total}


def is_filter(shape: list[int]) -> bool:
    """Whether an operand has the shape of a filter with a kernel per channel: (C, 1, T, T)."""
    return len(shape) == 4 and shape[1] == 1 and shape[2] == shape[3] > 1
