"""Numbers that are not finite, noticed while samples are drawn: they must not become pictures or scores."""

from collections.abc import Sequence

from torch import Tensor

from cm.diffusion.denoiser import DenoiseFn
from cm.errors import UserError


class FiniteWatch:
    """Notes on the device, without waiting for it, which evaluations of a denoiser were finite; `check` asks."""

    def __init__(self):
        self._seen: list[tuple[Tensor, Tensor]] = []

    def wrap(self, denoise: DenoiseFn) -> DenoiseFn:
        """The same function, watched."""

        def watched(x: Tensor, sigma: Tensor, *lower: Tensor) -> Tensor:
            output = denoise(x, sigma, *lower)
            self._seen.append((sigma, output.isfinite().flatten(1).all(1)))
            return output

        return watched

    def check(self, images: Tensor, names: Sequence[object]) -> Tensor:
        """The images (N, ...), drawn since the last check; UserError that names the first that is not finite.

        names: what each image of the batch is called.
        """
        seen, self._seen = self._seen, []
        for sigma, finite in seen:
            if (bad := (~finite).nonzero().flatten().tolist()) and len(finite) == len(names):
                level = float(sigma.expand(len(finite))[bad[0]])
                raise UserError(f"{names[bad[0]]}: the model's output at noise level {level:g} is not finite")
        if bad := (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
            raise UserError(f"{names[bad[0]]}: its values are not finite")
        return images
