"""Train a consistency model: by distillation (CD), in isolation (CT), or distil progressively (PD).

python scripts/cm_train.py --preset digits_cd --data_dir DATA --teacher_model_path RUN_OF_EDM_TRAIN
"""

import _root  # noqa: F401

from cm.commands.cli import run_script
from cm.config.scripts import CmTrainConfig


def train(config: CmTrainConfig) -> None:
    """torch is imported here, after --help has been answered."""
    from cm.commands.train import run_train

    run_train(config)


if __name__ == "__main__":
    run_script(CmTrainConfig, train)
