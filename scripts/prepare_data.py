"""Prepare a training set: any images -> one folder of resized uint8 arrays and a manifest (`cm prepare`).

python scripts/prepare_data.py SOURCE OUT --image_size 64
"""

import _root  # noqa: F401

from cm.commands.prepare import program

if __name__ == "__main__":
    program()
