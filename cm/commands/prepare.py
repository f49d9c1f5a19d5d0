"""Prepare a training set: any images -> one folder of resized uint8 arrays and a manifest.

Sources: a folder or .zip of images, an .npz, IDX files (MNIST, Fashion-MNIST ...), ILSVRC2012_img_train.tar (or any
tar of images), an LSUN lmdb folder, cifar-10-python.tar.gz, cifar-10-binary.tar.gz, `digits` or `digits_rgb`
(scikit-learn's handwritten digits), and with the extra `datasets` torchvision:NAME, hf:OWNER/NAME, hf:FOLDER and
FILE.parquet.
"""

import argparse
import json
import shlex
from typing import NoReturn

from cm.config import plugins
from cm.config.parsing import expanded, str2bool
from cm.runtime.cpu import usable_cores

# flag -> (default, help); the type is the default's
FLAGS = {
    "image_size": (
        0,
        "side of the stored images [pixels]; 0: their own where all have one up to 256, else 64",
    ),
    "labels": ("auto", "classes from: auto, folder, prefix, json, none"),
    "in_channels": (0, "1 or 3; 0: from the data"),
    "transform": ("adm-center-crop", "adm-center-crop or box-center-crop (LSUN)"),
    "composite": ("drop", "transparent pixels: drop alpha, or over white, black"),
    "exif_transpose": (False, "turn images upright by EXIF"),
    "limit": (0, "prepare this many images only; 0: all"),
    "skip_unreadable": (False, "leave out damaged images"),
    "overwrite": (False, "replace an earlier prepared set"),
    "split": ("all", "of digits and digits_rgb: all, train (the first 1500) or test (the other 297)"),
    "seed": (0, "of the ink colours of digits_rgb"),
    "num_workers": (usable_cores(), "processes"),
    "plugin": ("", "modules of your own that add data sources: files or importable names, as a list"),
}
DEFAULT_SIDE, LARGEST_SIDE = 64, 256
SHOWN = (
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


class Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=expanded, help="what to read, local or remote (gs://, az://)")
    parser.add_argument("out", type=expanded, help="folder to write")
    for name, (default, text) in FLAGS.items():
        kind = str2bool if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default {default})")
    return parser.parse_args()


def main(flags: argparse.Namespace) -> None:
    """Prepare and print what was made."""
    from cm.data.prepare import prepare

    plugins.load(flags.__dict__.pop("plugin"))
    if not flags.image_size:
        flags.image_size = natural_side(flags.source)
        print(f"--image_size {flags.image_size}", flush=True)
    manifest = prepare(**vars(flags), progress=True)
    print(f"{flags.out}: {json.dumps({key: manifest[key] for key in SHOWN})}")
    print(f"next: cm train {shlex.quote(flags.out)} --out_dir runs/teacher", flush=True)


def natural_side(source: str) -> int:
    """The side of the images of a source, where they are square, all alike and small; else 64."""
    from cm.data.archives import is_cifar
    from cm.data.facts import common_side
    from cm.data.sources import open_source
    from cm.storage import filesystem

    if source in ("digits", "digits_rgb"):
        return 8
    archive = source.lower().endswith((".tar", ".tar.gz", ".tgz"))
    if archive or filesystem.exists(f"{source.rstrip('/')}/data.mdb"):
        return 32 if archive and is_cifar(source) else DEFAULT_SIDE
    side = common_side(open_source(source))
    return side if 0 < side <= LARGEST_SIDE else DEFAULT_SIDE


def program() -> None:
    """The whole program: --help and mistakes in flags need no torch."""
    parsed = parse_flags()
    from cm.runtime.job import run_main

    run_main(lambda: main(parsed))
