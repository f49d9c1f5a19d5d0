"""Moving averages of the student's weights, several rates at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cm import parsing
from cm.nn import update_ema


def parse_ema_rates(rates: str | float | Sequence[float]) -> list[float]:
    """Rates from a number, a comma-separated string or a list; each in [0, 1]."""
    values = [rates] if isinstance(rates, int | float) else rates
    text = values if isinstance(values, str) else ",".join(str(rate) for rate in values)
    return list(parsing.parse_ema_rates(text))


class EmaBank:
    """One moving average of `params` per rate: ema <- rate ema + (1 - rate) params.

    warmup: the rate at update k is min(rate, (1 + k) / (10 + k)), so that short runs forget the initial weights.
    """

    def __init__(self, params: list[Tensor], rates: str | float | Sequence[float], *, warmup: bool = False):
        self.rates = parse_ema_rates(rates)
        self.warmup = warmup
        self.copies = [[p.detach().clone() for p in params] for _ in self.rates]

    def update(self, params: list[Tensor], step: int) -> None:
        """Move every average towards params; `step` counts from 0."""
        for rate, copy in zip(self.rates, self.copies, strict=True):
            if self.warmup:
                rate = min(rate, (1 + step) / (10 + step))
            update_ema(copy, params, rate)

    @torch.no_grad()
    def reset(self, params: list[Tensor]) -> None:
        """Restart every average from params."""
        for copy in self.copies:
            torch._foreach_copy_(copy, params)

    @property
    def slowest(self) -> float:
        """The rate closest to 1: the weights that are sampled by default."""
        return max(self.rates)
