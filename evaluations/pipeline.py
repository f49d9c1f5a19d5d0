"""From images to features to statistics, over the ranks of a job."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cm.errors import UserError
from cm.runtime import distributed
from cm.runtime.progress import progress
from evaluations.features import FeatureNetwork
from evaluations.fid import FeatureStatistics
from evaluations.npz_io import ImageSet


@dataclass
class Extracted:
    """What is known of a set: statistics of the whole, features of this rank's rows if they were kept (CPU)."""

    statistics: dict[str, FeatureStatistics]
    rows: list[int] = field(default_factory=list)
    pool: Tensor | None = None

    def gaussian(self, kind: str) -> tuple[Tensor, Tensor]:
        """(mean, covariance) of one kind of features."""
        return self.statistics[kind].mean, self.statistics[kind].covariance()


def extract(
    batches: Iterable[tuple[range, np.ndarray | Tensor]],
    network: FeatureNetwork,
    *,
    kinds: Iterable[str],
    keep: bool,
    source: str,
) -> Extracted:
    """Run the network over this rank's (rows, uint8 images (n, H, W, C)); collective.

    kinds: the features whose statistics are wanted. keep: hold the pooled features as well. `source` names the images
    in errors. The statistics are those of all ranks' images together.
    """
    statistics = {kind: FeatureStatistics(network.dims[kind], network.classifier.device) for kind in kinds}
    rows, kept = [], []
    for block, images in batches:
        # A copy: arrays that were read from a file are read-only.
        features = network(images if isinstance(images, Tensor) else torch.from_numpy(images.copy()))
        for kind, stats in statistics.items():
            stats.update(features[kind])
        if keep:
            rows.extend(block)
            kept.append(features["pool"].cpu())
    for stats in statistics.values():
        stats.reduce()
        if not stats.is_finite():
            raise UserError(f"{source}: {network.name} gives features that are NaN or infinite")
    pool = torch.cat(kept) if kept else torch.empty(0, network.dims["pool"])
    return Extracted(statistics, rows, pool if keep else None)


def image_batches(images: ImageSet, batch_size: int, title: str = "") -> Iterator[tuple[range, np.ndarray]]:
    """This rank's share of a set: whole batches, so that a batch holds the same images for any number of ranks.

    With a title, rank 0 shows its progress.
    """
    total = images.shape[0]
    share = distributed.local_rows(-(-total // batch_size))
    rows = range(share.start * batch_size, min(share.stop * batch_size, total))
    with progress(total=len(rows), desc=title, unit="image", enabled=bool(title)) as bar:
        start = rows.start
        for batch in images.batches(rows, batch_size):
            yield range(start, start + len(batch)), batch
            start += len(batch)
            bar.update(len(batch))


def gather_rows(local: Tensor) -> Tensor | None:
    """On rank 0 the rows of all ranks, in rank order; None elsewhere. CPU tensors; collective."""
    if distributed.get_world_size() == 1:
        return local
    counts = distributed.all_gather_object(len(local))
    padded = local.new_zeros(max(counts), *local.shape[1:])
    padded[: len(local)] = local
    if not distributed.is_main():
        dist.gather(padded, dst=0)
        return None
    parts = [torch.empty_like(padded) for _ in counts]
    dist.gather(padded, parts, dst=0)
    return torch.cat([part[:n] for part, n in zip(parts, counts)])
