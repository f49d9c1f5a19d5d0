"""Bits per dimension of a data set under a diffusion model, with their standard error.

python scripts/likelihood.py --model_path RUN_OR_FILE --data_dir DATA --num_images 256
"""

import _root  # noqa: F401

from cm.commands.cli import run_script

if __name__ == "__main__":
    run_script("likelihood", "cm.commands.likelihood:run_likelihood")
