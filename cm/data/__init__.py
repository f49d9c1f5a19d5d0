"""Data sets: sources of (image, label) pairs, and the stream of training batches."""

from cm.data.dataset import ImageData, open_dataset

__all__ = ["ImageData", "open_dataset"]
