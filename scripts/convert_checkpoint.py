"""Convert a checkpoint: any kind in, --to KIND out (`cm convert`).

python scripts/convert_checkpoint.py checkpoint_80 cd_cifar10.pt --preset cifar10_cd_lpips
"""

import _root  # noqa: F401

from cm.tools.convert.command import program

if __name__ == "__main__":
    program()
