"""Drawing many samples: over ranks and batches, in order, without ever holding them all.

Sample i is the same whatever the batch size and the number of ranks, if the generator is one of those that know
their samples (`cm.sampling.noise`). Batches go in rounds: in a round every rank draws one block of consecutive samples
and rank 0 takes the blocks in rank order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from cm.data.images import SampleWriter, to_uint8
from cm.errors import UserError
from cm.runtime.progress import progress as progress_bar
from cm.sampling.noise import IndexedGenerator, SampleGenerator

# (number of samples, labels (n,) int64 on the CPU or None) -> images (n, C, H, W) in [-1, 1]
SampleBatch = Callable[[int, Tensor | None], Tensor]


@dataclass(frozen=True)
class Labels:
    """The class of sample i: `classes` in turn, or one of num_classes drawn from (seed, i)."""

    num_classes: int
    seed: int = 0
    classes: Sequence[int] = ()

    def __post_init__(self):
        wrong = [c for c in self.classes if not 0 <= c < self.num_classes]
        if wrong:
            raise UserError(f"classes: {wrong[0]} is not a class of the model (0..{self.num_classes - 1})")

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """(n,) int64 for these samples."""
        if self.classes:
            return torch.tensor([self.classes[i % len(self.classes)] for i in rows])
        generator = IndexedGenerator(self.seed, "label")
        generator.set_rows(rows)
        return generator.randint(0, self.num_classes, (len(rows),))


def blocks(num_samples: int, batch_size: int, world_size: int) -> Iterator[list[range]]:
    """For each round the blocks of samples that the ranks draw, in rank order; the last may be short or empty."""
    if num_samples < 1 or batch_size < 1:
        raise UserError(f"num_samples {num_samples} and batch_size {batch_size} must be positive")
    for first in range(0, num_samples, batch_size * world_size):
        starts = [min(first + rank * batch_size, num_samples) for rank in range(world_size + 1)]
        yield [range(a, b) for a, b in pairwise(starts)]


def local_batches(
    sample_batch: SampleBatch,
    *,
    num_samples: int,
    batch_size: int,
    generator: SampleGenerator,
    labels: Labels | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[range, Tensor]]:
    """(samples, their images (n, H, W, C) uint8 on the CPU) for each round of this rank; without the empty ones.

    The generator's rows are set before each batch, so that `sample_batch` only has to draw from it.
    """
    for block in blocks(num_samples, batch_size, world_size):
        rows = block[rank]
        if rows:
            generator.set_rows(rows)
            images = sample_batch(len(rows), labels(rows) if labels else None)
            yield rows, to_uint8(images).cpu()


def in_order(
    batches: Iterator[tuple[range, Tensor]],
    *,
    num_samples: int,
    batch_size: int,
    image_shape: tuple[int, int, int],
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[range, Tensor]]:
    """On rank 0 the batches of all ranks in the order of samples; on the others nothing, once all is sent.

    A rank sends while it draws its next batch. Rank 0 holds one batch at a time. image_shape is (H, W, C).
    """
    if rank > 0:
        pending = None
        for rows, images in batches:
            if images.shape != (len(rows), *image_shape):
                raise ValueError(f"batch {tuple(images.shape)}, expected {(len(rows), *image_shape)}")
            if pending is not None:
                pending[0].wait()
            pending = dist.isend(images, dst=0), images  # kept alive until it is sent
        if pending is not None:
            pending[0].wait()
        return
    for block in blocks(num_samples, batch_size, world_size):
        yield next(batches)
        for source, rows in enumerate(block[1:], start=1):
            if rows:
                images = torch.empty(len(rows), *image_shape, dtype=torch.uint8)
                dist.recv(images, src=source)
                yield rows, images


def generate(
    sample_batch: SampleBatch,
    *,
    num_samples: int,
    batch_size: int,
    image_shape: tuple[int, int, int],
    generator: SampleGenerator,
    writer: SampleWriter | None = None,
    labels: Labels | None = None,
    keep: int = 0,
    progress: bool = False,
) -> Tensor:
    """Draw exactly `num_samples` images over all ranks of the process group and write them in order.

    sample_batch: draws a batch from `generator`, whose rows have been set. image_shape: (H, W, C) of the uint8 images.
    writer: open on rank 0, None on the others. Returns on rank 0 the first `keep` images as uint8 (for a grid).
    All ranks must call it, with the same arguments but for the writer.
    """
    together = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    ranks = {"rank": rank, "world_size": world_size}
    size = {"num_samples": num_samples, "batch_size": batch_size}
    batches = local_batches(sample_batch, generator=generator, labels=labels, **size, **ranks)
    kept = torch.empty(0, *image_shape, dtype=torch.uint8)
    with progress_bar(total=num_samples, desc="samples", unit="image", enabled=progress) as bar:
        for rows, images in in_order(batches, image_shape=image_shape, **size, **ranks):
            if writer is not None:
                writer.write(images, labels(rows) if labels else None)
            if len(kept) < keep:
                kept = torch.cat([kept, images[: keep - len(kept)]])
            bar.update(len(rows))
    return kept
