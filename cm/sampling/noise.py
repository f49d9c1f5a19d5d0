"""Random numbers that depend on what they are for, never on rank, batch size or time.

Training: `StepRandom` makes the draws of one step. Sampling: a generator is any object with
`randn(*size)`, `randint(low, high, size)` and `randn_like(tensor)`; `get_generator` makes one by name.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from cm.config.choices import GENERATORS
from cm.errors import UserError
from cm.sampling.mersenne import SkippingStream
from cm.seeding import derive_seed


class DummyGenerator:
    """The global random stream of torch: different numbers in every run and on every rank."""

    def randn(self, *size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        """Standard normal tensor."""
        return torch.randn(*size, dtype=dtype, device=device)

    def randint(
        self, low: int, high: int, size: Sequence[int], dtype: torch.dtype = torch.int64, device="cpu"
    ) -> torch.Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, tuple(size), dtype=dtype, device=device)

    def randn_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Standard normal tensor with the shape, type and device of `tensor`."""
        return torch.randn_like(tensor)

    def set_rows(self, indices: Sequence[int]) -> None:
        """Nothing to choose: the stream knows no samples."""

    def set_done_samples(self, done_samples: int) -> None:
        """Nothing to advance."""


class _ByIndex:
    """What the generators below share: which samples of the whole run the rows of a batch are.

    `set_rows` says it outright. Otherwise row j is sample done + rank + world_size * j, as in the original.
    """

    def __init__(self, seed: int, rank: int | None, world_size: int | None):
        together = dist.is_available() and dist.is_initialized()
        self.seed = seed
        self.rank = rank if rank is not None else dist.get_rank() if together else 0
        self.world_size = world_size if world_size is not None else dist.get_world_size() if together else 1
        self.done_samples = 0
        self._rows: list[int] | None = None

    def set_rows(self, indices: Sequence[int]) -> None:
        """The rows of the next draws are these samples, and what they draw begins anew."""
        self.set_done_samples(min(indices, default=0))
        self._rows = [int(i) for i in indices]

    def set_done_samples(self, done_samples: int) -> None:
        """The next batch begins at sample `done_samples`."""
        self.done_samples = done_samples
        self._rows = None

    def rows(self, batch: int) -> list[int]:
        """Sample indices of the `batch` rows of a draw."""
        if self._rows is None:
            first = self.done_samples + self.rank
            return list(range(first, first + self.world_size * batch, self.world_size))
        if batch != len(self._rows):
            raise ValueError(f"a draw of {batch} rows, but {len(self._rows)} rows are set")
        return self._rows

    def randn_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Standard normal tensor with the shape, type and device of `tensor`."""
        return self.randn(*tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def get_seed(self) -> int:
        """The seed given at construction."""
        return self.seed


class DeterministicGenerator(_ByIndex):
    """The original's "determ": a call means a draw for all `num_samples` samples, of which this batch takes its rows.

    Its numbers are kept exactly, its faults with them: they change with `num_samples`, and rows past the last sample
    repeat it. Rows that nobody needs are passed over on the CPU, in single precision, at a cost that does not depend
    on `num_samples`; elsewhere they are drawn.
    """

    def __init__(
        self, num_samples: int, seed: int = 0, *, rank: int | None = None, world_size: int | None = None
    ):
        super().__init__(seed, rank, world_size)
        if num_samples < 1:
            raise UserError(f"generator determ needs num_samples >= 1, got {num_samples}")
        self.num_samples = num_samples
        self._streams: dict[torch.device, torch.Generator] = {}
        self._stream_seed = seed
        self._cpu_stream = SkippingStream(seed)

    def get_generator(self, device: torch.device | str) -> torch.Generator:
        """The one stream of `device`."""
        device = torch.device(device)
        if device.type == "cpu":
            return self._cpu_stream.generator
        if device not in self._streams:
            self._streams[device] = torch.Generator(device).manual_seed(self._stream_seed)
        return self._streams[device]

    def get_global_size_and_indices(self, size: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
        """Shape of the draw for all samples, and the rows of it that belong to this batch."""
        indices = [min(i, self.num_samples - 1) for i in self.rows(size[0])]
        return (self.num_samples, *size[1:]), indices

    def randn(self, *size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        """Standard normal tensor of shape `size`."""
        shape, indices = self.get_global_size_and_indices(size)
        # torch makes normal numbers in blocks of 16, each from 16 numbers of the stream.
        blocks = math.prod(shape) % 16 == 0 and math.prod(shape) > 0
        if torch.device(device).type == "cpu" and dtype == torch.float32 and blocks:
            return self._rows_of_randn(shape, indices)
        stream = self.get_generator(device)
        return torch.randn(shape, generator=stream, dtype=dtype, device=device)[indices]

    def _rows_of_randn(self, shape: Sequence[int], indices: list[int]) -> torch.Tensor:
        """randn(shape)[indices] with only the blocks drawn that hold these rows."""
        row, first, last = math.prod(shape[1:]), min(indices, default=0), max(indices, default=-1)
        start, stop = first * row // 16 * 16, -(-(last + 1) * row // 16) * 16
        self._cpu_stream.skip(start)
        numbers = torch.randn(stop - start, generator=self._cpu_stream.generator)
        self._cpu_stream.skip(math.prod(shape) - stop)
        span = numbers[first * row - start : (last + 1) * row - start].view(-1, *shape[1:])
        return span[[i - first for i in indices]]

    def randint(
        self, low: int, high: int, size: Sequence[int], dtype: torch.dtype = torch.int64, device="cpu"
    ) -> torch.Tensor:
        """Integers in [low, high) of shape `size`."""
        shape, indices = self.get_global_size_and_indices(size)
        stream = self.get_generator(device)
        return torch.randint(low, high, shape, generator=stream, dtype=dtype, device=device)[indices]

    def set_done_samples(self, done_samples: int) -> None:
        """The next batch begins at sample `done_samples`. The stream starts anew from the seed."""
        super().set_done_samples(done_samples)
        self.set_seed(self.seed)

    def set_seed(self, seed: int) -> None:
        """Start the stream anew from `seed`."""
        self._stream_seed = seed
        self._streams.clear()
        self._cpu_stream = SkippingStream(seed)


class DeterministicIndividualGenerator(_ByIndex):
    """The original's "determ-indiv": one stream per sample, seeded index + num_samples * seed."""

    def __init__(
        self, num_samples: int, seed: int = 0, *, rank: int | None = None, world_size: int | None = None
    ):
        super().__init__(seed, rank, world_size)
        if num_samples < 1:
            raise UserError(f"generator determ-indiv needs num_samples >= 1, got {num_samples}")
        self.num_samples = num_samples
        self._streams: dict[tuple[torch.device, int], torch.Generator] = {}

    def get_generator(self, device: torch.device | str, sample: int) -> torch.Generator:
        """The stream of this sample, made when it is first used."""
        key = torch.device(device), sample
        if key not in self._streams:
            self._streams[key] = torch.Generator(key[0]).manual_seed(sample + self.num_samples * self.seed)
        return self._streams[key]

    def get_size_and_indices(self, size: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
        """Shape of one sample, and the sample indices of the batch."""
        return (1, *size[1:]), [min(i, self.num_samples - 1) for i in self.rows(size[0])]

    def randn(self, *size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        """Standard normal tensor of shape `size`."""
        shape, indices = self.get_size_and_indices(size)
        streams = [self.get_generator(device, i) for i in indices]
        return torch.cat([torch.randn(shape, generator=g, dtype=dtype, device=device) for g in streams])

    def randint(
        self, low: int, high: int, size: Sequence[int], dtype: torch.dtype = torch.int64, device="cpu"
    ) -> torch.Tensor:
        """Integers in [low, high) of shape `size`."""
        shape, indices = self.get_size_and_indices(size)
        streams = [self.get_generator(device, i) for i in indices]
        return torch.cat(
            [torch.randint(low, high, shape, generator=g, dtype=dtype, device=device) for g in streams]
        )

    def set_rows(self, indices: Sequence[int]) -> None:
        """The rows of the next draws are these samples; their streams begin anew."""
        super().set_rows(indices)
        self._streams.clear()

    def set_done_samples(self, done_samples: int) -> None:
        """The next batch begins at sample `done_samples`; streams of earlier samples are dropped."""
        super().set_done_samples(done_samples)
        self._streams = {key: g for key, g in self._streams.items() if key[1] >= done_samples}

    def set_seed(self, seed: int) -> None:
        """Start all streams anew from `seed`."""
        self.seed = seed
        self._streams.clear()


class IndexedGenerator(_ByIndex):
    """ "indexed": what sample i draws is a function of (seed, purpose, i, number of the draw) only.

    Draws are counted from where the rows are set. Numbers are made on the CPU in float32 and then moved and
    converted, so they do not depend on the device either. A call costs O(batch).
    """

    def __init__(
        self,
        seed: int = 0,
        purpose: str = "sample",
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        super().__init__(seed, rank, world_size)
        self.purpose = purpose
        self._draws = 0

    def set_done_samples(self, done_samples: int) -> None:
        """The next batch begins at sample `done_samples`; draws are counted from 0 again."""
        super().set_done_samples(done_samples)
        self._draws = 0

    def skip(self) -> None:
        """Pass over one draw at no cost."""
        self._draws += 1

    def _seeds(self, batch: int) -> list[int]:
        """One seed per row for the next draw."""
        rows = self.rows(batch)
        base = derive_seed(self.seed, self.purpose, self._draws)
        self._draws += 1
        # torch's CPU generator uses 32 bits of its seed only: hashing the index would give two of 50,000 samples
        # the same noise in one run out of four. An odd multiplier keeps the seeds of a draw distinct below 2**32.
        return [(base + row * 0x9E3779B1) % 2**32 for row in rows]

    def randn(self, *size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        """Standard normal tensor of shape `size`; size[0] must equal the number of rows."""
        batch = torch.empty(size, pin_memory=torch.device(device).type == "cuda")
        generator = torch.Generator()
        for row, seed in zip(batch, self._seeds(size[0])):
            torch.randn(row.shape, generator=generator.manual_seed(seed), out=row)
        return batch.to(device=device, dtype=dtype, non_blocking=True)

    def randint(
        self, low: int, high: int, size: Sequence[int], dtype: torch.dtype = torch.int64, device="cpu"
    ) -> torch.Tensor:
        """Integers in [low, high) of shape `size`; size[0] must equal the number of rows."""
        batch = torch.empty(tuple(size), dtype=torch.int64)
        generator = torch.Generator()
        for row, seed in zip(batch, self._seeds(size[0])):
            torch.randint(low, high, row.shape, generator=generator.manual_seed(seed), out=row)
        return batch.to(device=device, dtype=dtype)


def skip_draw(generator, like: torch.Tensor) -> None:
    """Let a generator pass over one `randn_like(like)` whose values nobody needs, for free where it can."""
    if isinstance(generator, IndexedGenerator):
        generator.skip()
    else:
        generator.randn_like(like)


SampleGenerator = (
    DummyGenerator | DeterministicGenerator | DeterministicIndividualGenerator | IndexedGenerator
)


def dummy(num_samples: int, seed: int) -> DummyGenerator:
    """Row dummy: knows neither samples nor seed."""
    return DummyGenerator()


def indexed(num_samples: int, seed: int) -> IndexedGenerator:
    """Row indexed: no sample depends on how many there are."""
    return IndexedGenerator(seed)


def get_generator(generator: str, num_samples: int = 0, seed: int = 0) -> SampleGenerator:
    """Noise source by name: dummy, determ, determ-indiv or indexed. Rank and world come from torch.distributed."""
    return GENERATORS.load(generator)(num_samples, seed)
