"""Train an EDM teacher, a denoiser of all noise levels.

python scripts/edm_train.py --preset digits_edm --data_dir DATA
"""

import _root  # noqa: F401

from cm.commands.cli import run_script
from cm.config.scripts import EdmTrainConfig


def train(config: EdmTrainConfig) -> None:
    """torch is imported here, after --help has been answered."""
    from cm.commands.train import run_train

    run_train(config)


if __name__ == "__main__":
    run_script(EdmTrainConfig, train)
