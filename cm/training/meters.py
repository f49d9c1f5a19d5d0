"""What the log shows of a run: means of losses by noise level, speed, memory, and the size of the network."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cm.runtime import distributed
from cm.runtime.platform import peak_memory

BUCKETS = 4
# Logged values that two equal runs do not share
MEASURED = ("images_per_sec", "data_wait", "peak_memory_mib")


class LossMeter:
    """Means since the last read: weighted ones of per-sample losses, plain ones of single values.

    Bucket q splits [ln sigma_min, ln sigma_max] into four equal parts by the noise level of the student's input; q0
    holds the lowest levels. A read costs one transfer from the device, an update none.
    """

    def __init__(self, sigma_min: float, sigma_max: float):
        self.low = math.log(sigma_min)
        self.width = math.log(sigma_max) - self.low
        # Per key: row 0 sums, row 1 counts; a column per bucket, or one for single values.
        self._tables: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, losses: dict[str, Tensor], t: Tensor, weight: Tensor) -> None:
        """Add per-sample losses (B,) at noise levels t (B,), each multiplied by its importance weight."""
        position = (t.float().clamp_min(1e-12).log() - self.low) / self.width
        bucket = (position * BUCKETS).long().clamp(0, BUCKETS - 1)
        one_hot = torch.nn.functional.one_hot(bucket, BUCKETS).double()
        for key, values in losses.items():
            weighted = (values.detach() * weight).double()
            self._add(key, torch.stack([weighted @ one_hot, one_hot.sum(0)]))

    @torch.no_grad()
    def add(self, key: str, value: Tensor) -> None:
        """Add a single value, a 0-dim tensor that is the same on all ranks."""
        value = value.detach().double()
        self._add(key, torch.stack([value, torch.ones_like(value)])[:, None])

    def _add(self, key: str, table: Tensor) -> None:
        self._tables[key] = self._tables[key] + table if key in self._tables else table

    def read(self) -> dict[str, float]:
        """{key: mean, key_q0..3: mean of the bucket} over all ranks, then start anew. All ranks must call it."""
        means = {}
        for key, (sums, counts) in self.state().items():
            means[key] = sum(sums) / sum(counts)
            if len(sums) == BUCKETS:
                means.update({f"{key}_q{q}": s / n for q, (s, n) in enumerate(zip(sums, counts)) if n})
        self._tables.clear()
        return means

    def state(self) -> dict[str, list[list[float]]]:
        """{key: [sums, counts]} over all ranks of what has not been read yet. All ranks must call it."""
        if not self._tables:
            return {}
        keys = sorted(self._tables)
        flat = distributed.all_reduce_sum(torch.cat([self._tables[key].flatten() for key in keys])).tolist()
        tables = {}
        for key in keys:
            half = self._tables[key].shape[1]
            tables[key] = [flat[:half], flat[half : 2 * half]]
            del flat[: 2 * half]
        return tables

    def load_state(self, tables: dict[str, list[list[float]]], device: torch.device) -> None:
        """Go on from a `state`, whatever the number of ranks then and now."""
        share = 1.0 if distributed.is_main() else 0.0
        self._tables = {
            key: torch.tensor(table, dtype=torch.float64, device=device) * share
            for key, table in tables.items()
        }


class RunClock:
    """Steps and times of one start of a run: where it began, what it has saved, how fast it goes."""

    def __init__(self, step: int, saved_step: int):
        self.first_step = step
        self.saved_step = saved_step  # -1: none
        self._lap_step, self._lap_time, self._waited = step, time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time within the body was spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def lap(self, step: int) -> tuple[float, float]:
        """(steps per second, share of the time spent waiting for data) since the last call."""
        now = time.perf_counter()
        seconds = max(now - self._lap_time, 1e-9)
        found = (step - self._lap_step) / seconds, self._waited / seconds
        self._lap_step, self._lap_time, self._waited = step, now, 0.0
        return found


def peak_memory_mib(device: torch.device) -> float:
    """The most memory this process has used so far: on its GPU as torch's allocator counts, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_memory() / 2**20


def module_summary(module: nn.Module) -> str:
    """Class and parameters of a network, in all and by its outermost blocks: one line each."""

    def count(part: nn.Module) -> int:
        return sum(p.numel() for p in part.parameters())

    blocks = {name: count(child) for name, child in module.named_children()}
    blocks["(own)"] = sum(p.numel() for p in module.parameters(recurse=False))
    rows = [(type(module).__name__, count(module)), *((f"  {n}", c) for n, c in blocks.items() if c)]
    widths = max(len(name) for name, _ in rows), len(f"{rows[0][1]:,}")
    return "\n".join(f"{name:<{widths[0]}}  {c:>{widths[1]},} parameters" for name, c in rows)
