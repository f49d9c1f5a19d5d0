"""Fréchet distance between Gaussians fitted to features (FID, Heusel et al. 2017, arXiv:1706.08500, Eq. 6).

Everything is float64. Statistics are streamed: features are never kept, and ranks add up their parts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cm.errors import UserError
from cm.runtime import distributed

_ROWS = 4096  # rows converted to float64 at a time
_NEARLY_SINGULAR = 1e-10  # smallest pivot against the largest variance


class FeatureStatistics:
    """Streaming mean and covariance of feature rows (N, d), part by part (Chan, Golub, LeVeque 1979)."""

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0.0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.m2 = torch.zeros(
            dim, dim, dtype=torch.float64, device=device
        )  # sum of outer products of deviations

    def update(self, features: Tensor, counts: Tensor | None = None) -> None:
        """Add rows (n, d). `counts` (n,) counts each row that many times, as a bootstrap replicate needs."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features are {tuple(features.shape)}, expected (n, {len(self.mean)})")
        for start in range(0, len(features), _ROWS):
            x = features[start : start + _ROWS].to(self.mean)
            weight = None if counts is None else counts[start : start + _ROWS].to(self.mean)[:, None]
            n = float(len(x)) if weight is None else float(weight.sum())
            if n == 0:
                continue
            mean = (x if weight is None else x * weight).sum(0) / n
            centred = x - mean
            weighted = centred if weight is None else centred * weight
            self._add(n, mean, weighted.T @ centred)

    def _add(self, n: float, mean: Tensor, m2: Tensor) -> None:
        total = self.count + n
        delta = mean - self.mean
        self.m2 += m2
        self.m2.addr_(delta, delta, alpha=self.count * n / total)
        self.mean += delta * (n / total)
        self.count = total

    def reduce(self) -> None:
        """Replace every rank's part by the whole; collective, a no-op in a single process."""
        if distributed.get_world_size() == 1:
            return
        sums = distributed.all_reduce_sum(
            torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])])
        )
        total = float(sums[-1])
        mean = sums[:-1] / max(total, 1.0)
        delta = self.mean - mean
        self.m2.addr_(delta, delta, alpha=self.count)
        distributed.all_reduce_sum(self.m2)
        self.mean, self.count = mean, total

    def covariance(self) -> Tensor:
        """Unbiased covariance (divides by n - 1), as numpy.cov."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count:g}")
        return self.m2 / (self.count - 1)

    def is_finite(self) -> bool:
        """False when any feature so far was NaN or infinite."""
        return bool(torch.isfinite(self.m2).all() and torch.isfinite(self.mean).all())


class FrechetReference:
    """One side of the distance with its matrix root kept, for many distances to the same reference."""

    def __init__(self, mu, sigma, device: torch.device | str | None = None):
        self.mu, self.sigma = _gaussian(mu, sigma, device)
        self.root = _matrix_root(self.sigma)

    def distance(self, mu, sigma) -> float:
        """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr (S1 S2)^(1/2).

        S1 S2 and the symmetric root^T S2 root have the same non-zero eigenvalues, so the trace is a sum of square
        roots of eigenvalues of a symmetric matrix: no square root of a non-symmetric product, no imaginary part.
        """
        mu, sigma = _gaussian(mu, sigma, self.mu.device)
        if mu.shape != self.mu.shape:
            raise ValueError(
                f"statistics of different dimension: {tuple(self.mu.shape)} and {tuple(mu.shape)}"
            )
        product = self.root.T @ sigma @ self.root
        cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
        shift = (self.mu - mu).square().sum()
        found = float(shift + self.sigma.trace() + sigma.trace() - 2 * cross)
        if not math.isfinite(found):
            raise UserError("the Fréchet distance is no finite number: the statistics are too large")
        return max(found, 0.0)


def _matrix_root(sigma: Tensor) -> Tensor:
    """R with sigma = R R^T: Cholesky's factor, or from the eigenvectors where sigma is singular or nearly so.

    Of a singular matrix only the range is kept: its null space, known up to rounding, would add noise.
    """
    factor, failed = torch.linalg.cholesky_ex(sigma)
    if not failed and factor.diagonal().min() ** 2 > _NEARLY_SINGULAR * sigma.diagonal().max():
        return factor
    values, vectors = torch.linalg.eigh(sigma)
    keep = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, keep] * values[keep].sqrt()


def _gaussian(mu, sigma, device=None) -> tuple[Tensor, Tensor]:
    mu = torch.atleast_1d(torch.as_tensor(mu, dtype=torch.float64, device=device))
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=device)
    sigma = sigma.reshape(1, 1) if sigma.ndim == 0 else sigma
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"mean {tuple(mu.shape)} and covariance {tuple(sigma.shape)} do not fit together")
    if not (torch.isfinite(mu).all() and torch.isfinite(sigma).all()):
        raise ValueError("the statistics contain NaN or infinite values")
    return mu, sigma


def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    """Squared Fréchet distance between N(mu1, sigma1) and N(mu2, sigma2); arrays or tensors, (d,) and (d, d)."""
    return FrechetReference(mu1, sigma1).distance(mu2, sigma2)


@dataclass(frozen=True)
class Interval:
    """Uncertainty of a distance from resampling the images."""

    std: float
    low: float
    high: float
    replicates: int


def bootstrap_distance(
    features: Tensor,
    rows: Sequence[int],
    total: int,
    reference: FrechetReference,
    value: float,
    *,
    replicates: int,
    seed: int = 0,
) -> Interval:
    """Standard error and 95 % interval of the distance `value`, drawing the `total` images again with replacement.

    `features` are this rank's `rows` of the set; collective over ranks, same result for any number of them. The
    interval is value +- 1.96 std: it says how much another set of as many samples would differ, not how far the
    distance of infinitely many samples is (replicates repeat images and read too high, so their mean is not used).
    """
    if replicates < 2:
        raise ValueError(f"a bootstrap needs at least 2 replicates, got {replicates}")
    values = []
    for b in range(replicates):
        drawn = np.random.default_rng([seed, b]).integers(0, total, total)
        counts = torch.from_numpy(np.bincount(drawn, minlength=total)[np.asarray(rows, np.int64)])
        stats = FeatureStatistics(features.shape[1], reference.mu.device)
        stats.update(features, counts)
        stats.reduce()
        values.append(reference.distance(stats.mean, stats.covariance()))
    std = float(np.std(values, ddof=1))
    return Interval(std, max(value - 1.96 * std, 0.0), value + 1.96 * std, replicates)
