"""Make a training set once: decode, crop and resize every image, and write a store with a manifest."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

import cm
from cm.config.parsing import printable
from cm.data.archives import Items, Pixels, open_items
from cm.data.decode import Decoder, readable
from cm.data.store import StoreWriter
from cm.data.transforms import TRANSFORMS
from cm.errors import UserError
from cm.runtime.cpu import check_workers
from cm.runtime.preemption import follow_parent
from cm.runtime.progress import progress as progress_bar

LARGEST_SIDE = 16384  # pixels: of larger ones a buffer would not fit in memory
_CHUNK = 16
_MAX_NAMES = 100


@dataclass(frozen=True)
class Conversion:
    """What is done to each image: decode, then a named transform to one size."""

    decoder: Decoder
    transform: str
    image_size: int

    def __call__(self, name: str, content: Pixels) -> np.ndarray | UserError:
        """(R, R, C) uint8, or why not."""
        try:
            if isinstance(content, UserError):
                return content
            image = self.decoder(content, name)
            with readable(name):
                pixels = TRANSFORMS[self.transform][0](image, self.image_size)
            return pixels[:, :, None] if pixels.ndim == 2 else pixels
        except UserError as error:
            return error


def prepare(
    source: str,
    out: str,
    *,
    image_size: int,
    labels: str = "auto",
    in_channels: int = 0,
    transform: str = "adm-center-crop",
    composite: str = "drop",
    exif_transpose: bool = False,
    limit: int = 0,
    skip_unreadable: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    split: str = "all",
    num_workers: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Write the images of `source` (see `open_items`) to the store `out`; returns its manifest.

    Args:
        image_size: side of the stored images in pixels.
        in_channels: 1 or 3; 0 takes what the source has (encoded archives: 3).
        transform: a name in `TRANSFORMS`; the manifest keeps it.
        split: of the built-in digits: all, train or test.
        num_workers: processes that decode and resize (0: this one). The result does not depend on it.
        overwrite: replace an earlier store at `out`, once the new one is complete.
    """
    if not 1 <= image_size <= LARGEST_SIDE:
        raise UserError(f"--image_size must be from 1 to {LARGEST_SIDE}, not {image_size}")
    if min(limit, num_workers, seed) < 0:
        raise UserError("--limit, --num_workers and --seed must be 0 or more")
    check_workers(num_workers)
    if in_channels not in (0, 1, 3):
        raise UserError(f"--in_channels must be 0 (from the data), 1 or 3, not {in_channels}")
    if transform not in TRANSFORMS:
        raise UserError(f"--transform {transform}: choose one of {', '.join(TRANSFORMS)}")
    items = open_items(source, labels=labels, limit=limit, seed=seed, split=split)
    decoder = Decoder(
        in_channels or items.channels, composite, exif_transpose, refuse_colour=in_channels == 0
    )
    conversion = Conversion(decoder, transform, image_size)
    with StoreWriter(out, resolution=image_size, channels=decoder.channels, overwrite=overwrite) as writer:
        numbers, names, skipped = _write_images(
            writer, items, conversion, skip_unreadable, num_workers, progress
        )
        if not numbers:
            raise UserError(f"{source}: holds no readable images")
        table = items.labels(numbers, names)
        return writer.finish(
            table.indices,
            table.classes,
            transform=transform,
            filter=TRANSFORMS[transform][1],
            composite=composite or "drop",
            exif_transpose=exif_transpose,
            source=items.description,
            skipped=len(skipped),
            skipped_names=[printable(name) for name in skipped[:_MAX_NAMES]],
            passed_over=items.passed_over(),
            written_by=f"consistency-models {cm.__version__}",
        )


def _write_images(
    writer: StoreWriter,
    items: Items,
    conversion: Conversion,
    skip_unreadable: bool,
    num_workers: int,
    progress: bool,
) -> tuple[list[int], list[str], list[str]]:
    """Numbers and names of the images that were kept, and names of those that were not."""
    numbers: list[int] = []
    names: list[str] = []
    skipped: list[str] = []
    converted = _convert_all(items.images, conversion, num_workers)
    bar = progress_bar(converted, total=items.total or None, desc="prepare", unit="image", enabled=progress)
    with closing(converted), bar:
        for number, (name, result) in enumerate(bar):
            if isinstance(result, UserError):
                if not skip_unreadable:
                    raise result
                skipped.append(os.path.basename(name))
                continue
            writer.add(result)
            numbers.append(number)
            names.append(name)
    return numbers, names, skipped


def _convert_all(
    images: Iterable[tuple[str, Pixels]], conversion: Conversion, num_workers: int
) -> Iterator[tuple[str, np.ndarray | UserError]]:
    """Converted images in their order; a few chunks per process are under way, never the whole archive."""
    if num_workers == 0:
        for name, content in images:
            yield name, conversion(name, content)
        return
    images = iter(images)
    pool = ProcessPoolExecutor(num_workers, initializer=follow_parent)
    try:
        pending = deque()
        while chunk := list(islice(images, _CHUNK)):
            pending.append(pool.submit(_convert_chunk, conversion, chunk))
            if len(pending) >= 4 * num_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most likely for memory: give --num_workers fewer, or 0"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _convert_chunk(
    conversion: Conversion, chunk: Sequence[tuple[str, Pixels]]
) -> list[tuple[str, np.ndarray | UserError]]:
    return [(name, conversion(name, content)) for name, content in chunk]
