"""Train a consistency model: by distillation (CD), in isolation (CT), or distil progressively (PD).

python scripts/cm_train.py --preset digits_cd --data_dir DATA --teacher_model_path RUN_OF_EDM_TRAIN
"""

import _root  # noqa: F401

from cm.commands.cli import run_script

if __name__ == "__main__":
    run_script("cm_train", "cm.commands.train:run_train")
