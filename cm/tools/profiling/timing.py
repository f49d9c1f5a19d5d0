"""Clocks: repeated and interleaved timing, time by phase, peak memory, and the ceiling of matrix products."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Timing:
    """Repeated calls: seconds on the wall, and of this process's processors, which a busy machine hardly changes."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median wall time of the calls [s]."""
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float:
        """Median processor time of the calls [s]."""
        return statistics.median(self.cpu_seconds)

    def fastest(self, device: torch.device) -> float:
        """Shortest time of a call [s]; on the CPU as if each thread had a core of its own."""
        return min(self.seconds) if device.type == "cuda" else min(self.cpu_seconds) / torch.get_num_threads()

    def undisturbed(self, device: torch.device) -> float:
        """Median time of a call [s]; on the CPU as if each thread had a core of its own."""
        return self.median if device.type == "cuda" else self.cpu_median / torch.get_num_threads()

    def summary(self) -> dict[str, float]:
        """Median and quartiles in milliseconds, and the number of calls."""
        # Twice, because one value has no quantiles.
        low, _, high = statistics.quantiles(self.seconds * 2, n=4, method="inclusive")
        return {
            "median_ms": round(1e3 * self.median, 4),
            "q25_ms": round(1e3 * low, 4),
            "q75_ms": round(1e3 * high, 4),
            "cpu_ms": round(1e3 * self.cpu_median, 4),
            "repeats": len(self.seconds),
        }


def interleaved(
    runs: Mapping[str, Callable[[], object]], device: torch.device, *, warmup: int = 2, repeats: int = 7
) -> dict[str, Timing]:
    """Time functions in turns, forwards and backwards, so that what else the machine does falls on all alike."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    timings = {name: Timing() for name in runs}
    for k in range(repeats):
        for name in list(runs)[:: -1 if k % 2 else 1]:
            with timed(timings[name], device):
                runs[name]()
    return timings


def beside_peers(timings: Mapping[str, Timing]) -> dict[str, Any]:
    """Our times (`cm`) and those of its peers; ratios to the fastest one, below 1 in our favour.

    ratio_by_turn: quartiles of the ratios of calls that followed one another; slow changes of the machine spare them.
    """
    ours, peers = timings["cm"], {name: t for name, t in timings.items() if name != "cm"}
    best = min(peers, key=lambda name: peers[name].median)
    turns = [a / b for a, b in zip(ours.seconds, peers[best].seconds, strict=True)]
    return {
        **ours.summary(),
        "best_peer": best,
        "ratio_to_best_peer": ours.median / peers[best].median,
        "cpu_ratio_to_best_peer": ours.cpu_median / min(t.cpu_median for t in peers.values()),
        "ratio_by_turn": [round(q, 4) for q in statistics.quantiles(turns * 2, n=4, method="inclusive")],
        "peers": {name: t.summary() for name, t in peers.items()},
    }


@contextmanager
def timed(timing: Timing, device: torch.device) -> Iterator[None]:
    """Add the body as one call, the device's work included."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    synchronize(device)
    timing.seconds.append(time.perf_counter() - wall)
    timing.cpu_seconds.append(time.process_time() - cpu)


class PhaseClock:
    """Time by phase: functions that are wrapped add their time to the phase's. A phase within a phase counts twice.

    On CUDA events are recorded on the current stream, so that the clock waits for nothing until it is read.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._spans: dict[str, list[tuple]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the body's time."""
        start = self._now()
        yield
        self._spans.setdefault(name, []).append((start, self._now()))

    def wrap(self, name: str, function: Callable) -> Callable:
        """The same function, timed."""

        @wraps(function)
        def clocked(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return clocked

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Total seconds of each phase since the last read."""
        synchronize(self.device)
        cuda = self.device.type == "cuda"
        totals = {
            name: sum(a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in spans)
            for name, spans in self._spans.items()
        }
        self._spans.clear()
        return totals


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors at the peak of run(), beyond what there was before; as torch's allocator counts them."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    changes = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        total += change.nbytes()
        peak = max(peak, total)
    return peak


@cache
def product_ceiling(device: torch.device, dtype: torch.dtype, size: int = 0, repeats: int = 15) -> float:
    """FLOP/s of the fastest large matrix product: as torch.mm, and as a 1x1 convolution, which other kernels serve.

    Measured once in a process.
    """
    # A CPU without half-precision products takes a second for each large one.
    size = size or (8192 if device.type == "cuda" else 1024 if dtype == torch.float32 else 512)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    kernel = b.t()[..., None, None].contiguous()
    # The same product; 16 images, because with one thread torch leaves smaller batches to another kernel.
    images = a.view(16, 1, size // 16, size).permute(0, 3, 1, 2)
    with torch.no_grad():
        runs = {"mm": lambda: a @ b, "conv": lambda: torch.nn.functional.conv2d(images, kernel)}
        timings = interleaved(runs, device, repeats=repeats)
    return 2 * size**3 / min(t.fastest(device) for t in timings.values())
