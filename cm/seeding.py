"""Random numbers of training as functions of (seed, step, row of the global batch), never of rank or time.

`derive_seed` makes a seed from anything it is for; `StepRandom` makes all draws of one training step. Noise for
sampling is in `cm.sampling.noise`.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a fixed function of `parts`, equal on every machine and Python version."""
    plain = tuple(part if isinstance(part, str) else int(index(part)) for part in parts)
    return _seed(hashlib.blake2b(repr(plain).encode(), digest_size=8))


def derive_seeds(*parts: int | str, rows: range) -> Iterator[int]:
    """`derive_seed` of some parts and each of the rows, in a third of its time."""
    plain = [part if isinstance(part, str) else int(index(part)) for part in parts]
    begun = hashlib.blake2b(f"({', '.join(map(repr, plain))}, ".encode(), digest_size=8)
    for row in rows:
        one = begun.copy()
        one.update(b"%d)" % row)
        yield _seed(one)


def _seed(hashed: Any) -> int:
    return int.from_bytes(hashed.digest(), "little") >> 1


class StepRandom:
    """All draws of one training step, as functions of (seed, step, row of the global batch).

    Scalars are drawn for the whole global batch from one stream and sliced to rows [start, stop), so that
    any split over ranks gives the same numbers. Noise images are drawn row by row, the local rows only.
    Each call uses a new stream: the same sequence of calls gives the same numbers. ahead: draws noise in advance.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        start: int,
        stop: int,
        global_batch: int,
        device: torch.device | str = "cpu",
        ahead: "NoiseAhead | None" = None,
    ):
        if not 0 <= start <= stop <= global_batch:
            raise ValueError(f"rows [{start}, {stop}) are not inside a global batch of {global_batch}")
        self.seed, self.step, self.start, self.stop = seed, step, start, stop
        self.global_batch, self.device = global_batch, torch.device(device)
        self.ahead = ahead
        self._calls = 0

    def _scalars(self, kind: str, draw: Callable[[torch.Generator], torch.Tensor]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, kind, self._calls, self.step))
        self._calls += 1
        # Such a small copy is staged at once; a blocking one would wait for all work under way on a GPU.
        return draw(generator)[self.start : self.stop].to(self.device, non_blocking=True)

    def rows(self) -> torch.Tensor:
        """(stop - start,) int64: the rows of the global batch that are drawn here."""
        return torch.arange(self.start, self.stop, device=self.device)

    def row_numbers(self, kind: str) -> torch.Tensor:
        """(stop - start,) int32, uniform: one number of each row for one kind of use."""
        seeds = derive_seeds(self.seed, kind, self.step, rows=range(self.start, self.stop))
        numbers = torch.tensor([seed % 2**32 - 2**31 for seed in seeds], dtype=torch.int32)
        return numbers.to(self.device, non_blocking=True)

    def uniform(self) -> torch.Tensor:
        """(stop - start,) float32 in [0, 1)."""
        return self._scalars("uniform", lambda g: torch.rand(self.global_batch, generator=g))

    def normal(self) -> torch.Tensor:
        """(stop - start,) float32 standard normal."""
        return self._scalars("normal", lambda g: torch.randn(self.global_batch, generator=g))

    def randint(self, low: int, high: int) -> torch.Tensor:
        """(stop - start,) int64 in [low, high)."""
        return self._scalars("randint", lambda g: torch.randint(low, high, (self.global_batch,), generator=g))

    def noise(self, shape: Sequence[int]) -> torch.Tensor:
        """(stop - start, *shape) float32 standard normal; row k belongs to row start + k of the global batch."""
        # Drawn on the CPU, so that the numbers do not depend on the device; pinned, so that the copy can overlap.
        wanted = NoiseOf(self.seed, self._calls, self.step, self.start, self.stop, tuple(shape))
        pinned = self.device.type == "cuda"
        rows = self.ahead.take(wanted, pinned) if self.ahead else wanted.draw(pinned)
        self._calls += 1
        return rows.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class NoiseOf:
    """What one draw of noise images is a function of: the call within a step, and the rows [start, stop) of a shape."""

    seed: int
    call: int
    step: int
    start: int
    stop: int
    shape: tuple[int, ...]

    def draw(self, pinned: bool = False) -> torch.Tensor:
        """(stop - start, *shape) float32 standard normal in host memory."""
        rows = torch.empty(self.stop - self.start, *self.shape, pin_memory=pinned)
        generator = torch.Generator()
        seeds = derive_seeds(self.seed, "noise", self.call, self.step, rows=range(self.start, self.stop))
        for row, seed in zip(rows, seeds, strict=True):
            torch.randn(self.shape, generator=generator.manual_seed(seed), out=row)
        return rows


class NoiseAhead:
    """Draws the noise of the next step in a thread while this one is computed. The numbers are the same.

    Every draw that is taken begins that of the next step; one that nobody takes is forgotten a step later.
    """

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self._begun: dict[NoiseOf, Future[torch.Tensor]] = {}

    def take(self, wanted: NoiseOf, pinned: bool) -> torch.Tensor:
        """The noise, drawn before if it was foreseen, else now."""
        begun = self._begun.pop(wanted, None)
        rows = wanted.draw(pinned) if begun is None else begun.result()
        self._begun = {key: future for key, future in self._begun.items() if key.step >= wanted.step}
        following = replace(wanted, step=wanted.step + 1)
        self._begun[following] = self._thread.submit(following.draw, pinned)
        return rows

    def close(self) -> None:
        """End the thread."""
        self._begun.clear()
        self._thread.shutdown(cancel_futures=True)
