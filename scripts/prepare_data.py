"""Prepare a training set: any images -> one folder of resized uint8 arrays and a manifest.

Sources: a folder or .zip of images, an .npz, ILSVRC2012_img_train.tar (or any tar of images), an LSUN lmdb folder,
cifar-10-python.tar.gz, cifar-10-binary.tar.gz, and `digits` or `digits_rgb` (scikit-learn's handwritten digits).
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cm.parsing import str2bool


class _Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The flags of this script."""
    p = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", help="what to read, local or remote (gs://, az://)")
    p.add_argument("out", help="folder to write")
    p.add_argument(
        "--image_size", type=int, default=64, help="side of the stored images [pixels] (default 64)"
    )
    p.add_argument(
        "--labels", default="auto", help="classes from: auto, folder, prefix, json, none (default auto)"
    )
    p.add_argument("--in_channels", type=int, default=0, help="1 or 3; 0: from the data (default 0)")
    p.add_argument(
        "--transform", default="adm-center-crop", help="adm-center-crop (default) or box-center-crop (LSUN)"
    )
    p.add_argument(
        "--composite", default="drop", help="transparent pixels: drop alpha (default), or over white, black"
    )
    p.add_argument(
        "--exif_transpose", type=str2bool, default=False, help="turn images upright by EXIF (default False)"
    )
    p.add_argument("--limit", type=int, default=0, help="prepare this many images only; 0: all (default 0)")
    p.add_argument(
        "--skip_unreadable", type=str2bool, default=False, help="leave out damaged images (default False)"
    )
    p.add_argument(
        "--overwrite", type=str2bool, default=False, help="replace an earlier prepared set (default False)"
    )
    p.add_argument("--seed", type=int, default=0, help="of the ink colours of digits_rgb (default 0)")
    p.add_argument(
        "--num_workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    return p


def main(flags: argparse.Namespace) -> None:
    """Prepare and print what was made."""
    from cm.data.prepare import prepare

    manifest = prepare(**vars(flags), progress=True)
    shown = (
        "count",
        "num_classes",
        "classes",
        "resolution",
        "channels",
        "transform",
        "source",
        "skipped",
        "sha256",
    )
    print(f"{flags.out}: {json.dumps({key: manifest[key] for key in shown})}")


if __name__ == "__main__":
    parsed = parser().parse_args()
    from cm.dist_util import run_main

    run_main(lambda: main(parsed))
