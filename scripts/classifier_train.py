"""Train a classifier of noisy images, which guides image_sample by --classifier_path.

python scripts/classifier_train.py --preset digits_classifier --data_dir DATA
"""

import _root  # noqa: F401

from cm.commands.cli import run_script
from cm.config.scripts import ClassifierConfig


def train(config: ClassifierConfig) -> None:
    """torch is imported here, after --help has been answered."""
    from cm.commands.train import run_train

    run_train(config)


if __name__ == "__main__":
    run_script(ClassifierConfig, train)
