"""Running means of losses, overall and by true noise level, kept on the device until they are read."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

BUCKETS = 4


class LossMeter:
    """Weighted means of per-sample losses since the last read.

    Bucket q splits [ln sigma_min, ln sigma_max] into four equal parts by the noise level of the student's input; q0
    holds the lowest levels. A read costs one transfer from the device, an update none.
    """

    def __init__(self, sigma_min: float, sigma_max: float):
        self.low = math.log(sigma_min)
        self.width = math.log(sigma_max) - self.low
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, losses: dict[str, Tensor], t: Tensor, weight: Tensor) -> None:
        """Add per-sample losses (B,) at noise levels t (B,), each multiplied by its importance weight."""
        position = (t.float().clamp_min(1e-12).log() - self.low) / self.width
        bucket = (position * BUCKETS).long().clamp(0, BUCKETS - 1)
        one_hot = torch.nn.functional.one_hot(bucket, BUCKETS).double()
        for key, values in losses.items():
            weighted = (values.detach() * weight).double()
            # Row 0: sums per bucket; row 1: counts per bucket.
            table = torch.stack([weighted @ one_hot, one_hot.sum(0)])
            self._sums[key] = self._sums[key] + table if key in self._sums else table

    def read(self) -> dict[str, float]:
        """{key: mean, key_q0..3: mean of the bucket} over all ranks, then start anew. All ranks must call it."""
        if not self._sums:
            return {}
        keys = sorted(self._sums)
        table = torch.stack([self._sums[key] for key in keys])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(table)
        self._sums.clear()
        means = {}
        for key, (sums, counts) in zip(keys, table.tolist(), strict=True):
            means[key] = sum(sums) / sum(counts)
            means.update({f"{key}_q{q}": s / n for q, (s, n) in enumerate(zip(sums, counts)) if n})
        return means
