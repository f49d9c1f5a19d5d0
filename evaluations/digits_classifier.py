"""The small classifier under its first name, for published command lines: see evaluations.small_classifier."""

from cm.runtime import job
from evaluations.small_classifier import (
    FEATURE_DIM,
    SmallClassifier,
    load_classifier,
    main,
    to_network_range,
    train_classifier,
)

__all__ = [
    "FEATURE_DIM",
    "SmallClassifier",
    "load_classifier",
    "main",
    "to_network_range",
    "train_classifier",
]

if __name__ == "__main__":
    job.run_main(main)
