"""The stream of training batches: the batch of step k is a pure function of (data set, seed, k).

It does not depend on the number of workers or ranks, nor on where the run was resumed.
"""

import itertools
import multiprocessing.connection
import multiprocessing.queues
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import TypeVar

import numpy as np
import torch

from cm.data.dataset import Batch, ImageData
from cm.errors import UserError
from cm.runtime import distributed, job, logger, platform
from cm.runtime.cpu import check_workers
from cm.runtime.distributed import local_rows
from cm.runtime.preemption import shield_worker
from cm.seeding import derive_seed

T = TypeVar("T")

AHEAD = 2  # batches that the loader asks of each worker in advance
CANNOT_DELIVER = 3


class StepBatches(torch.utils.data.Dataset):
    """Item k is this rank's part of the global batch of step k.

    The images are visited in one endless sequence of epochs, each a permutation of its own; step k takes
    positions k*G .. k*G + G-1 of it, so that no image is left out when G does not divide their number.
    """

    def __init__(self, dataset: ImageData, *, global_batch_size: int, rows: range, seed: int, shuffle: bool):
        self.dataset = dataset
        self._global_batch_size = global_batch_size
        self.rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._epoch_orders: dict[int, np.ndarray] = {}

    def indices(self, step: int) -> list[int]:
        """Which images this rank sees in a step."""
        return [self._index(step * self._global_batch_size + row) for row in self.rows]

    def __getitem__(self, step: int) -> Batch | str:
        """The batch, or the text of a UserError: as an exception it would reach the main process with a traceback."""
        seeds = [derive_seed(self._seed, "augment", step, row) for row in self.rows]
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
        check_workers(num_workers)
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
        workers = affordable_workers(self._num_workers, self._batch_bytes())
        loader = torch.utils.data.DataLoader(
            self.batches,
            batch_size=None,  # an item is a batch already
            sampler=_Count(self._start_step),
            num_workers=workers,
            pin_memory=self._pin_memory,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else starting the loader would advance torch's global generator
        )
        reported: set[str] = set()
        for outcome in _delivered(_started(loader)):
            if isinstance(outcome, str):
                raise UserError(outcome)
            images, labels, skipped = outcome
            self.num_skipped += len(skipped)
            for name in set(skipped) - reported:
                logger.warn(f"skipped an unreadable image: {name}")
            reported.update(skipped)
            yield images, {} if labels is None else {"y": labels}

    def _batch_bytes(self) -> int:
        """What a batch of this rank takes on its way from a worker [bytes]."""
        data = self.batches.dataset
        return 4 * len(self.batches.rows) * data.channels * data.image_size**2


def affordable_workers(wanted: int, batch_bytes: int) -> int:
    """As many of the wanted workers as shared memory has room for: each has up to AHEAD batches in it.

    All ranks of a node start at about the same time and share what is free now.
    """
    free = platform.shared_memory()[0] // distributed.current_launch().local_world_size
    workers = wanted if free < 0 else min(wanted, free // (AHEAD * max(batch_bytes, 1)))
    if workers < wanted:
        logger.warn(
            f"{platform.describe_shared_memory()}: --num_workers {wanted} would need "
            f"{wanted * AHEAD * batch_bytes / 2**20:.1f} MiB, {workers} read (docker run --shm-size gives more)"
        )
    return workers


def _start_worker(worker: int) -> None:
    """A worker leaves signals to the training process, and ends when it cannot deliver: nobody would miss its batch."""
    shield_worker(worker)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(CANNOT_DELIVER))


def _started(loader: Iterable[T]) -> Iterator[T]:
    """The loader's iterator, its workers started.

    torch raises from a signal handler when one of them ends, wherever the main thread is then: also in the midst of
    reporting another sign of the same. Without the handler, it sees within five seconds that a batch does not come.
    """
    own = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD")
    before = signal.getsignal(signal.SIGCHLD) if own else None
    iterator = iter(loader)
    if own:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return iterator


def _delivered(batches: Iterator[T]) -> Iterator[T]:
    """The loader's batches; UserError when a worker has ended."""
    try:
        yield from batches
    except Exception as error:
        if lost := job.lost_worker(error):
            raise lost from None
        # One that ends while it hands a batch over leaves a broken connection, half a message, a missing file ...
        if "in DataLoader worker" not in str(error) and _ended(getattr(batches, "_workers", ())):
            raise job.worker_ended(str(error) or type(error).__name__) from None
        raise


def _ended(workers: Sequence[BaseProcess]) -> bool:
    """Whether one of the workers ends within a second."""
    return bool(multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1))


class _Count(torch.utils.data.Sampler):
    """start, start + 1, ... without end."""

    def __init__(self, start: int):
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)
