"""Power-function averages of the student's weights, kept during training for averages of any length after it."""

from collections.abc import Sequence

from torch import Tensor

from cm.storage.posthoc import decay, exponent, stem
from cm.training.ema import EmaBank
from cm.training.sharding import Partition


class ProfileBank(EmaBank):
    """One average per relative length: after n updates the k-th weights count k^(gamma + 1) - (k - 1)^(gamma + 1).

    ema <- beta ema + (1 - beta) params with beta = (1 - 1/n)^(gamma + 1) (Karras et al. 2024, EDM2, section 3): the
    first update copies, so the initial weights are forgotten. A step that was skipped counts: the weights stood still.
    start: step at which the averages began; progressive distillation begins anew with each stage.
    """

    def __init__(
        self,
        params: list[Tensor],
        profiles: Sequence[float],
        *,
        partition: Partition | None = None,
        device: str = "auto",
        start: int = 0,
    ):
        super().__init__(params, list(profiles), partition=partition, device=device)
        self.start = start
        self._exponents = [exponent(length) for length in self.rates]

    def decays(self, step: int) -> list[float]:
        """beta of each average at the update that follows step `step`, counted from 0."""
        return [decay(step + 1 - self.start, gamma) for gamma in self._exponents]

    def restart(self, params: list[Tensor], step: int) -> None:
        """Forget everything before this step."""
        self.start = step
        self.reset(params)

    def stems(self) -> list[str]:
        """Names of the snapshots' files but for the step, one per average."""
        return [stem(length, self.start) for length in self.rates]
