"""Consistency models in PyTorch: EDM teachers, distillation, consistency training, sampling, editing."""

__version__ = "0.1.0"
