"""Train an EDM teacher, a denoiser of all noise levels.

python scripts/edm_train.py --preset digits_edm --data_dir DATA
"""

import _root  # noqa: F401

from cm.commands.cli import run_script

if __name__ == "__main__":
    run_script("edm_train", "cm.commands.train:run_train")
