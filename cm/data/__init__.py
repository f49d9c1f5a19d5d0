"""Data sets: sources of (image, label) pairs, and the stream of training batches."""
