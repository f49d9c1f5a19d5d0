"""Small image sets and a small classifier for the tests of the evaluator."""

from pathlib import Path

import numpy as np

from cm.storage.weights import save_weights
from evaluations.small_classifier import train_classifier


def stripes(count: int, seed: int = 0, size: int = 8, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (count, size, size, channels) of a bright column whose place is the label 0..3."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    images = rng.integers(0, 60, (count, size, size, channels))
    images[np.arange(count), :, labels * 2] += 180
    return images.astype(np.uint8), labels


def write_npz(path: Path, count: int, seed: int = 0, compressed: bool = False, **kwargs) -> Path:
    """An npz of `stripes` with labels."""
    images, labels = stripes(count, seed, **kwargs)
    (np.savez_compressed if compressed else np.savez)(path, arr_0=images, arr_1=labels)
    return path


def write_classifier(path: Path, seed: int = 0, **kwargs) -> Path:
    """A classifier of `stripes`."""
    net, meta = train_classifier(*stripes(256, seed=100, **kwargs), seed=seed, epochs=12)
    save_weights(path, net.state_dict(), meta)
    return path
