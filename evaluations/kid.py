"""Kernel Inception Distance (Binkowski et al. 2018, arXiv:1801.01401, Section 4)."""

import numpy as np
import torch
from torch import Tensor

SUBSET_SIZE = 1000  # images of a subset


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def mmd_unbiased(x: Tensor, y: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of rows x (m, d) and y (n, d), kernel (x.y/d + 1)^3, float64."""
    x, y = x.double(), y.double()
    m, n = len(x), len(y)
    k_xx, k_yy = _kernel(x, x), _kernel(y, y)
    within = (k_xx.sum() - k_xx.trace()) / (m * (m - 1)) + (k_yy.sum() - k_yy.trace()) / (n * (n - 1))
    return float(within - 2 * _kernel(x, y).mean())


def kernel_distance(
    reference, samples, *, subsets: int = 100, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> tuple[float, float]:
    """(mean, standard deviation) of the unbiased estimate over random subsets of both sets, (N, d) and (M, d).

    A set smaller than `subset_size` gives subsets of its own size. The mean may be slightly negative.
    """
    reference, samples = torch.as_tensor(reference), torch.as_tensor(samples)
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(f"features {tuple(reference.shape)} and {tuple(samples.shape)} cannot be compared")
    size = min(subset_size, len(reference), len(samples))
    if size < 2:
        raise ValueError(f"KID needs at least 2 points in both sets, got {len(reference)} and {len(samples)}")
    values = []
    for i in range(subsets):
        rng = np.random.default_rng([seed, i])
        x = reference[torch.from_numpy(rng.choice(len(reference), size, replace=False))]
        y = samples[torch.from_numpy(rng.choice(len(samples), size, replace=False))]
        values.append(mmd_unbiased(x, y.to(x.device)))
    return float(np.mean(values)), float(np.std(values))
