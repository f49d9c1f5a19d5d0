"""The original's evaluator object under its names, on top of the evaluator's parts.

Images are quantised to uint8 before they are measured, as the samples on disk are, so that its FID equals the
evaluator's. Everything runs on the images' device.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cm.data.images import to_uint8
from cm.runtime import distributed
from evaluations.fid import FeatureStatistics, frechet_distance
from evaluations.inception_score import inception_score
from evaluations.inception_v3 import POOL_DIM
from evaluations.inception_weights import load_inception
from evaluations.npz_io import Reference, open_reference
from evaluations.pipeline import gather_rows


class FIDStatistics:
    """Mean and covariance of pooled features, and the resolution of the images (None: unknown)."""

    def __init__(self, mu: np.ndarray, sigma: np.ndarray, resolution: int | None):
        self.mu, self.sigma, self.resolution = mu, sigma, resolution

    def frechet_distance(self, other: "FIDStatistics", eps: float = 1e-6) -> float:
        """FID to another set. `eps` is accepted and not needed: singular covariances are exact here."""
        if None not in (self.resolution, other.resolution) and self.resolution != other.resolution:
            raise ValueError(f"statistics of {self.resolution}-px and {other.resolution}-px images")
        return frechet_distance(self.mu, self.sigma, other.mu, other.sigma)


class FIDAndIS:
    """FID and Inception Score of batches of images (B, 3, H, W) in [-1, 1].

    softmax_batch_size: images per pass of the network. path: file or URL of the Inception weights; empty: user cache.
    CLIP is not part of this package: `get_clip_score` compares features that the caller brings.
    """

    def __init__(self, softmax_batch_size: int = 512, clip_score_batch_size: int = 512, path: str = ""):
        self.softmax_batch_size = softmax_batch_size
        self.clip_score_batch_size = clip_score_batch_size
        self.inception, self.weights_sha256 = load_inception(path)
        self._references: dict[str, Reference] = {}

    def get_statistics(self, activations, resolution: int) -> FIDStatistics:
        """Statistics of pooled features (N, 2048)."""
        activations = torch.as_tensor(activations)
        stats = FeatureStatistics(activations.shape[1], activations.device)
        stats.update(activations)
        return _as_numpy(stats, resolution)

    def get_preds(self, batch: Tensor, captions=None) -> tuple[Tensor, Tensor]:
        """(pooled (B, 2048), spatial (B, 2023)) features of images in [-1, 1]; captions are refused (no CLIP)."""
        if captions is not None:
            raise ValueError("captions need CLIP, which is not part of this package")
        self.inception.to(batch.device)
        pixels = to_uint8(batch).permute(0, 3, 1, 2).float()
        parts = [self.inception(part) for part in pixels.split(self.softmax_batch_size)]
        pool, spatial = zip(*parts)
        return torch.cat(pool), torch.cat(spatial)

    def get_inception_score(self, activations, split_size: int = 5000) -> float:
        """Inception Score of pooled features (N, 2048), without the output layer's bias."""
        return inception_score(activations, self.inception.output.weight, split_size)

    def get_clip_score(self, activations, text_features) -> float:
        """Mean cosine similarity of image features (N, d) and text features (N, d)."""
        images, texts = torch.as_tensor(activations), torch.as_tensor(text_features)
        if images.shape != texts.shape:
            raise ValueError(f"image features {tuple(images.shape)} and text features {tuple(texts.shape)}")
        size = self.clip_score_batch_size
        parts = [
            F.cosine_similarity(a.double(), b.double()) for a, b in zip(images.split(size), texts.split(size))
        ]
        return float(torch.cat(parts).mean())

    def get_activations(
        self, data: Iterable, num_samples: int, global_batch_size: int, pr_samples: int = 50000
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """(pooled (N, 2048), spatial (N, 2023), pooled of the first `pr_samples`) of N = num_samples images, on rank 0.

        `data` yields this rank's images of each global batch, or (images, conditions). Collective; None elsewhere.
        """
        features = [self.get_preds(images) for images in _share(data, num_samples, global_batch_size)]
        pool, spatial = (gather_rows(torch.cat(parts).cpu()) for parts in zip(*features))
        if pool is None:
            return None
        return pool[:num_samples], spatial[:num_samples], pool[: min(pr_samples, num_samples)]

    def get_virtual_batch(
        self, data: Iterable, num_samples: int, global_batch_size: int, resolution: int
    ) -> FIDStatistics:
        """Statistics of `num_samples` images of `data` (as for `get_activations`), streamed. Collective."""
        stats = None
        for images in _share(data, num_samples, global_batch_size):
            pool, _ = self.get_preds(images)
            stats = stats or FeatureStatistics(POOL_DIM, pool.device)
            stats.update(pool)
        stats = stats or FeatureStatistics(POOL_DIM)
        stats.reduce()
        return _as_numpy(stats, resolution)

    def set_ref_batch(self, ref_batch: str) -> None:
        """Read a reference npz (`mu, sigma`, or images) and keep it for `get_ref_batch`."""
        self._references[ref_batch] = open_reference(ref_batch)

    def get_ref_batch(self, ref_batch: str) -> FIDStatistics:
        """Statistics of a reference npz; computed from its images when it holds no statistics."""
        if ref_batch not in self._references:
            self.set_ref_batch(ref_batch)
        reference = self._references[ref_batch]
        resolution = reference.images.shape[1] if reference.images else None
        if "pool" in reference.statistics:
            return FIDStatistics(*reference.statistics["pool"], resolution)
        device = self.inception.output.weight.device
        stats = FeatureStatistics(POOL_DIM, device)
        for batch in reference.images.batches(range(reference.images.shape[0]), self.softmax_batch_size):
            pixels = torch.from_numpy(np.array(batch)).to(device).permute(0, 3, 1, 2).float()
            stats.update(self.inception(pixels.expand(-1, 3, -1, -1))[0])
        return _as_numpy(stats, resolution)


def _share(data: Iterable, num_samples: int, global_batch_size: int) -> Iterator[Tensor]:
    """This rank's images of each global batch; the last batch is cut so that all ranks together have num_samples."""
    remaining = num_samples
    for item in data:
        if remaining <= 0:
            return
        images = item[0] if isinstance(item, (tuple, list)) else item
        rows = distributed.local_rows(min(global_batch_size, remaining))
        if len(images) < len(rows):
            raise ValueError(f"a batch of {len(images)} images, {len(rows)} are this rank's share")
        yield images[: len(rows)]
        remaining -= global_batch_size
    if remaining > 0:
        raise ValueError(f"the data end {remaining} images before num_samples = {num_samples}")


def _as_numpy(stats: FeatureStatistics, resolution: int | None) -> FIDStatistics:
    return FIDStatistics(stats.mean.cpu().numpy(), stats.covariance().cpu().numpy(), resolution)
