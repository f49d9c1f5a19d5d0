"""Metrics of generated images: FID, sFID, Inception Score, precision, recall, KID."""
