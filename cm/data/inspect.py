"""Look at a data set before training on it: `python -m cm.data.inspect PATH [--labels MODE] [--json]`.

Reads every image. Exit code 1 when some cannot be read, 2 when the data set itself cannot.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from typing import Any

import numpy as np

from cm.config.parsing import expanded, printable
from cm.data import store
from cm.data.decode import Decoder, read_header
from cm.data.labels import Labels
from cm.data.sources import Source, StoreSource, open_source
from cm.errors import UserError

_SHOWN = 20


def inspect_data(path: str, labels: str = "auto") -> dict[str, Any]:
    """What a data set holds, as plain values that JSON can write.

    min_size and max_size are (width, height) of the images with the fewest and the most pixels; duplicates counts
    images whose content has come before; unreadable lists names, damaged lists files of a store with another hash.
    """
    source = open_source(path)
    table = source.labels(labels)
    sizes: list[tuple[int, int]] = []
    kinds: Counter[bool] = Counter()
    unreadable: list[str] = []
    digests: set[bytes] = set()
    decode = Decoder(channels=3)
    for index in range(len(source)):
        try:
            data = source.read(index)
            header = read_header(data, source.name(index))
            decode(data, source.name(index))
        except UserError as error:
            unreadable.append(printable(str(error)))
            continue
        sizes.append((header.width, header.height))
        kinds[header.grey] += 1
        digests.add(hashlib.sha256(data.tobytes() if isinstance(data, np.ndarray) else data).digest())
    by_pixels = sorted(sizes, key=lambda size: size[0] * size[1])
    return {
        "path": path,
        "count": len(source),
        "channels": 1 if kinds[True] and not kinds[False] else 3,
        "grey": kinds[True],
        "colour": kinds[False],
        "min_size": list(by_pixels[0]) if sizes else None,
        "max_size": list(by_pixels[-1]) if sizes else None,
        "num_classes": table.num_classes,
        "label_origin": table.origin,
        "classes": _class_counts(table),
        "duplicates": len(sizes) - len(digests),
        "passed_over": source.passed_over,
        "unreadable": unreadable,
        "damaged": _damaged(source),
    }


def _class_counts(table: Labels) -> dict[str, int]:
    if table.indices is None:
        return {}
    counts = np.bincount(table.indices, minlength=table.num_classes)
    return {name: int(count) for name, count in zip(table.classes, counts)}


def _damaged(source: Source) -> list[str]:
    return store.damaged_files(source.path, source.manifest) if isinstance(source, StoreSource) else []


def as_text(found: dict[str, Any]) -> str:
    """The report for a reader; long lists are cut."""
    lines = [
        f"{printable(found['path'])}: {found['count']} images, {found['grey']} grey and {found['colour']} in colour "
        f"(channels {found['channels']})",
        f"smallest {found['min_size']}, largest {found['max_size']} [width, height]; {found['duplicates']} duplicates; "
        f"{found['passed_over']} under hidden or system names passed over",
        f"{found['num_classes']} classes (from: {found['label_origin']})",
    ]
    lines += _cut(
        [f"  {number:4} {name}: {count}" for number, (name, count) in enumerate(found["classes"].items())]
    )
    for kind in ("unreadable", "damaged"):
        lines += [f"{len(found[kind])} {kind}"] if found[kind] else []
        lines += _cut([f"  {name}" for name in found[kind]])
    return "\n".join(lines)


def _cut(lines: list[str]) -> list[str]:
    return (
        lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"  ... and {len(lines) - _SHOWN} more (--json)"]
    )


def main() -> None:
    """Entry point of `python -m cm.data.inspect`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=expanded, help="folder, .zip, .npz or prepared store")
    parser.add_argument("--labels", default="auto", help="auto, folder, prefix, json or none (default auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    flags = parser.parse_args()
    found = inspect_data(flags.path, flags.labels)
    print(json.dumps(found) if flags.json else as_text(found))
    if found["unreadable"] or found["damaged"]:
        sys.exit(1)


if __name__ == "__main__":
    from cm.runtime.job import run_main

    run_main(main)
