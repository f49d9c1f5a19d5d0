"""The metrics: one function each, from what was measured of the samples to a value. Their rows are METRICS.

A new metric is a function here, or in a plug-in with `cm.register.metric`, and its row.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from evaluations.features import FeatureNetwork
from evaluations.fid import FrechetReference, bootstrap_distance
from evaluations.inception_score import inception_score
from evaluations.kid import SUBSET_SIZE, kernel_distance
from evaluations.npz_io import ImageSet
from evaluations.pipeline import Extracted
from evaluations.precision_recall import precision_recall

# A value, or a value with an interval: {"std": ...} and perhaps {"low": ..., "high": ...}
Value = float | tuple[float, dict[str, float]]


class Settings(Protocol):
    """What metrics read of `evaluations.evaluator.Options`."""

    bootstrap: int
    seed: int
    protocol: Any


@dataclass
class Measured:
    """All that is known of one set of samples.

    extracted: running sums of features over all ranks. frechet: the reference's Gaussians by kind of features. pool:
    pooled features of all samples (N, D), and reference: those of the reference's images; both on rank 0, on the
    network's device, where a metric is not collective.
    """

    samples: ImageSet
    extracted: Extracted
    frechet: dict[str, FrechetReference]
    network: FeatureNetwork
    options: Settings
    pool: Tensor | None = None
    reference: Tensor | None = None

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        """Both at once: they share the distances."""
        return precision_recall(self.reference, self.pool, self.options.protocol.k)


def fid(measured: Measured) -> Value:
    """Frechet distance of pooled features (Heusel et al. 2017), with a bootstrap interval if it is asked for."""
    value = measured.frechet["pool"].distance(*measured.extracted.gaussian("pool"))
    if not measured.options.bootstrap:
        return value
    interval = bootstrap_distance(
        measured.extracted.pool,
        measured.extracted.rows,
        measured.samples.shape[0],
        measured.frechet["pool"],
        value,
        replicates=measured.options.bootstrap,
        seed=measured.options.seed,
    )
    return value, asdict(interval)


def sfid(measured: Measured) -> Value:
    """Frechet distance of spatial features (Nash et al. 2021)."""
    return measured.frechet["spatial"].distance(*measured.extracted.gaussian("spatial"))


def inception(measured: Measured) -> Value:
    """Inception Score (Salimans et al. 2016) in splits of the protocol's size."""
    return inception_score(measured.pool, measured.network.classifier, measured.options.protocol.split_size)


def precision(measured: Measured) -> Value:
    """Share of samples within the reference's manifold (Kynkaanniemi et al. 2019)."""
    return measured.precision_recall[0]


def recall(measured: Measured) -> Value:
    """Share of reference images within the samples' manifold (Kynkaanniemi et al. 2019)."""
    return measured.precision_recall[1]


def kid(measured: Measured) -> Value:
    """Kernel distance with the standard deviation over subsets (Binkowski et al. 2018)."""
    sets = measured.reference, measured.pool
    value, std = kernel_distance(*sets, seed=measured.options.seed)
    varies = max(map(len, sets)) > SUBSET_SIZE  # else every subset is the whole set
    return value, {"std": std} if varies else None


def accuracy(measured: Measured) -> Value:
    """Share of samples that the feature network's classifier reads as the class they were drawn for."""
    read = (measured.pool @ measured.network.classifier.T).argmax(1).cpu().numpy()
    return float(np.mean(read == measured.samples.labels))
