"""The stream of training batches: the batch of step k is a pure function of (data set, seed, k).

It does not depend on the number of workers or ranks, nor on where the run was resumed.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from cm.data.dataset import Batch, ImageData
from cm.errors import UserError
from cm.runtime import logger
from cm.runtime.distributed import local_rows
from cm.runtime.preemption import shield_worker
from cm.seeding import derive_seed


class StepBatches(torch.utils.data.Dataset):
    """Item k is this rank's part of the global batch of step k.

    The images are visited in one endless sequence of epochs, each a permutation of its own; step k takes
    positions k*G .. k*G + G-1 of it, so that no image is left out when G does not divide their number.
    """

    def __init__(self, dataset: ImageData, *, global_batch_size: int, rows: range, seed: int, shuffle: bool):
        self.dataset = dataset
        self._global_batch_size = global_batch_size
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._epoch_orders: dict[int, np.ndarray] = {}

    def indices(self, step: int) -> list[int]:
        """Which images this rank sees in a step."""
        return [self._index(step * self._global_batch_size + row) for row in self._rows]

    def __getitem__(self, step: int) -> Batch | str:
        """The batch, or the text of a UserError: as an exception it would reach the main process with a traceback."""
        seeds = [derive_seed(self._seed, "augment", step, row) for row in self._rows]
        try:
            return self.dataset.batch(self.indices(step), seeds)
        except UserError as error:
            return str(error)

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.dataset))
        return int(self._order(epoch)[offset]) if self._shuffle else offset

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._epoch_orders:
            seed = derive_seed(self._seed, "order", epoch)
            # RandomState's streams are frozen for ever; those of numpy's Generator may change between versions.
            order = np.random.RandomState([seed >> 32, seed & 0xFFFFFFFF]).permutation(len(self.dataset))
            # A batch touches two epochs at most, and so does the next one.
            recent = list(self._epoch_orders.items())[-1:]
            self._epoch_orders = dict([*recent, (epoch, order)])
        return self._epoch_orders[epoch]


class TrainStream:
    """Endless batches from `start_step` on: (images (b, C, H, W) float32 in [-1, 1], {"y": (b,) int64} or {}).

    Args:
        dataset: from `open_dataset`.
        global_batch_size: images of all ranks together in one step; at most the size of the data set.
        rank, world_size: this rank yields `local_rows` of each global batch.
        num_workers: processes that read ahead (0 reads in this one); the batches do not depend on it.
        start_step: the first step to yield, for a resumed run.
        pin_memory: page-locked batches, for asynchronous copies to a GPU.
        shuffle: False visits the images in their listed order.
    """

    def __init__(
        self,
        dataset: ImageData,
        *,
        global_batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        start_step: int = 0,
        pin_memory: bool = False,
        shuffle: bool = True,
    ):
        if global_batch_size < 1:
            raise UserError(f"the batch size must be positive, not {global_batch_size}")
        where = dataset.source.path or "data set"
        if len(dataset) < global_batch_size:
            raise UserError(f"{where}: {len(dataset)} images are fewer than the batch of {global_batch_size}")
        if num_workers < 0:
            raise UserError(f"--num_workers must be 0 or more, not {num_workers}")
        self.batches = StepBatches(
            dataset,
            global_batch_size=global_batch_size,
            rows=local_rows(global_batch_size, rank, world_size),
            seed=seed,
            shuffle=shuffle,
        )
        self.num_skipped = 0
        self._start_step = start_step
        self._num_workers = num_workers
        self._pin_memory = pin_memory and torch.cuda.is_available()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        loader = torch.utils.data.DataLoader(
            self.batches,
            batch_size=None,  # an item is a batch already
            sampler=_Count(self._start_step),
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            worker_init_fn=shield_worker,
            generator=torch.Generator(),  # else starting the loader would advance torch's global generator
        )
        reported: set[str] = set()
        for outcome in loader:
            if isinstance(outcome, str):
                raise UserError(outcome)
            images, labels, skipped = outcome
            self.num_skipped += len(skipped)
            for name in set(skipped) - reported:
                logger.warn(f"skipped an unreadable image: {name}")
            reported.update(skipped)
            yield images, {} if labels is None else {"y": labels}


class _Count(torch.utils.data.Sampler):
    """start, start + 1, ... without end."""

    def __init__(self, start: int):
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)
