"""Train a classifier of noisy images, which guides image_sample by --guide.

python scripts/classifier_train.py --preset digits_classifier --data_dir DATA
"""

import _root  # noqa: F401

from cm.commands.cli import run_script

if __name__ == "__main__":
    run_script("classifier_train", "cm.commands.train:run_train")
