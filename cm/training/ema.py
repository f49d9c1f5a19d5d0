"""EMA: exponential moving averages of the student's weights, several rates at once."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from cm.config import parsing
from cm.nn import update_ema
from cm.training.sharding import Partition


def parse_ema_rates(rates: str | float | Sequence[float]) -> list[float]:
    """Rates from a number, a comma-separated string or a list; each in [0, 1]."""
    values = [rates] if isinstance(rates, int | float) else rates
    text = values if isinstance(values, str) else ",".join(str(rate) for rate in values)
    return list(parsing.parse_ema_rates(text))


class EmaBank:
    """One moving average of `params` per rate: ema <- rate ema + (1 - rate) params.

    warmup: the rate at update k is min(rate, (1 + k) / (10 + k)), so that short runs forget the initial weights.
    partition: which parameters this rank averages; all by default. device: "cpu" keeps averages of a GPU's parameters
    in host memory; "auto" beside the parameters.
    """

    def __init__(
        self,
        params: list[Tensor],
        rates: str | float | Sequence[float],
        *,
        warmup: bool = False,
        partition: Partition | None = None,
        device: str = "auto",
    ):
        self.rates = parse_ema_rates(rates)
        self.warmup = warmup
        self.partition = partition or Partition(params)
        own = self.partition.own(params)
        kept_on = self.partition.device if device == "auto" else torch.device(device)
        self._copies = [[p.detach().to(kept_on, copy=True) for p in own] for _ in self.rates]
        self._transfer = HostTransfer(own) if kept_on != self.partition.device else None

    @property
    def copies(self) -> list[list[Tensor]]:
        """The averages of this rank's part of the parameters, one list per rate."""
        if self._transfer is not None:
            self._transfer.wait()
        return self._copies

    def update(self, params: list[Tensor], step: int) -> None:
        """Move every average towards params; `step` counts from 0."""
        own = self.partition.own(params)
        rates = self.decays(step)
        if self._transfer is None:
            self._update(own, rates)
        else:
            self._transfer.send(own, lambda arrived: self._update(arrived, rates))

    def decays(self, step: int) -> list[float]:
        """The rate of each average at step `step`."""
        return [min(rate, (1 + step) / (10 + step)) if self.warmup else rate for rate in self.rates]

    def _update(self, own: list[Tensor], rates: list[float]) -> None:
        for rate, copy in zip(rates, self._copies, strict=True):
            update_ema(copy, own, rate)

    @torch.no_grad()
    def reset(self, params: list[Tensor]) -> None:
        """Restart every average from params."""
        for copy in self.copies:
            torch._foreach_copy_(copy, self.partition.own(params))

    @torch.no_grad()
    def load(self, number: int, items: Iterable[tuple[int, Tensor]]) -> None:
        """Set average `number` from (parameter number, tensor) pairs; other ranks' parameters are passed over."""
        own = dict(zip(self.partition.indices, self.copies[number], strict=True))
        for i, tensor in items:
            if i in own:
                own[i].copy_(self.partition.mine(i, tensor))

    def whole(self, number: int) -> list[Tensor] | None:
        """Average `number` of all parameters; sharded, copied to rank 0's host memory, and None elsewhere.

        All ranks must call it.
        """
        found = self.partition.gather(dict(zip(self.partition.indices, self.copies[number], strict=True)))
        return None if found is None else [found[i] for i in sorted(found)]

    @property
    def slowest(self) -> float:
        """The rate closest to 1: the weights that are sampled by default."""
        return max(self.rates)


class HostTransfer:
    """Page-locked host memory through which parameters travel, once a step for all averages.

    Copy and averaging overlap with the next step: the copy is queued behind the optimizer's work, a thread waits for
    it. The next `send` and every reader wait for the thread.
    """

    def __init__(self, params: list[Tensor]):
        pinned = torch.cuda.is_available()
        self._buffers = [torch.empty_like(p, device="cpu", pin_memory=pinned) for p in params]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="averages")
        self._under_way: Future | None = None

    @torch.no_grad()
    def send(self, params: list[Tensor], then: Callable[[list[Tensor]], None]) -> None:
        """Copy parameters to the host, and call then(copies) in the thread when they have arrived."""
        self.wait()
        torch._foreach_copy_(self._buffers, params, non_blocking=True)
        event = torch.cuda.Event() if params and params[0].is_cuda else None
        if event is not None:
            event.record(torch.cuda.current_stream(params[0].device))
        self._under_way = self._worker.submit(self._receive, event, then)

    def _receive(self, event: torch.cuda.Event | None, then: Callable[[list[Tensor]], None]) -> None:
        if event is not None:
            event.synchronize()
        then(self._buffers)

    def wait(self) -> None:
        """Until the averages have moved; raises what went wrong in the thread."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()
