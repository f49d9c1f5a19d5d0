"""Bits per dimension of a data set under a diffusion model, with their standard error.

python scripts/likelihood.py --model_path RUN_OR_FILE --data_dir DATA --num_images 256
"""

import _root  # noqa: F401

from cm.commands.cli import run_script
from cm.config.scripts import LikelihoodConfig


def score(config: LikelihoodConfig) -> None:
    """torch is imported here, after --help has been answered."""
    from cm.commands.likelihood import run_likelihood

    run_likelihood(config)


if __name__ == "__main__":
    run_script(LikelihoodConfig, score)
