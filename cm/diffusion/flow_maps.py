"""Flow maps: networks of two times, which go from a noise level to any lower one in one step.

Phi(z, t, r) is the point at r of the trajectory of the probability-flow ODE through (z, t). Every form of it is a
linear function of one clean image x^(z, t, r), by which a DDIM step lands there (`cm.diffusion.paths`): a `FlowMap`
gives x^ in x = x0 + sigma noise, and `average_velocity` the velocity u = (z - Phi) / (t - r) on any path.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cm.diffusion.denoiser import Denoiser
from cm.diffusion.paths import EDM, LINEAR, PREDICTIONS, Path, change_path
from cm.diffusion.precond import FlowPrecond
from cm.nn import append_dims


@dataclass(frozen=True)
class FlowMap(Denoiser):
    """x^(x; sigma, lower): the clean image by which a step from sigma ends at lower <= sigma.

    It is the denoiser at lower = sigma and a consistency function at lower = 0. at_once: which of both it is where the
    caller gives no lower level.
    """

    at_once: bool = False

    def denoiser(self) -> "FlowMap":
        """The denoiser in it: D(x; sigma) = x^(x; sigma, sigma)."""
        return replace(self, at_once=True)

    def __call__(self, x: Tensor, sigma: Tensor, lower: Tensor | None = None, **cond: Tensor) -> Tensor:
        """x^ in x's dtype and shape; sigma and lower: (B,) or scalar tensors."""
        return self.raw(x, sigma, lower, **cond)[1]

    def raw(
        self, x: Tensor, sigma: Tensor, lower: Tensor | None = None, **cond: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(raw network output, x^)."""
        x, c = self._scaled(x, sigma)
        sigma = sigma.to(x).expand(len(x))
        if lower is None:
            lower = sigma if self.at_once else torch.zeros_like(sigma)
        second = self.precond.second(sigma, lower.to(x).expand(len(x)))
        output = self.net(append_dims(c.c_in, x.ndim) * x, c.c_noise, second=second, **cond).to(x.dtype)
        return output, self._denoised(x, c, output)


def jump(clean: Tensor, x: Tensor, sigma: Tensor, lower: Tensor) -> Tensor:
    """Phi in x = x0 + sigma noise by x^: DDIM's step, G of CTM (Kim et al. 2024, Eq. 9)."""
    return clean + lower / sigma * (x - clean)


def average_velocity(
    model: FlowMap, z: Tensor, t: Tensor, r: Tensor, path: Path = LINEAR, **cond: Any
) -> Tensor:
    """u(z, t, r) on a path, like z; at r = t the velocity dz/dt. z: (B, C, ...); t > 0 and r <= t: (B,)."""
    if path == LINEAR and isinstance(model.precond, FlowPrecond):
        # The network itself: no digits are lost near t = 1, whose sigma is infinite.
        return model.net(z, t, second=t - r, **cond).to(z.dtype)[:, : z.shape[1]]
    x, sigma = change_path(z, t, path, EDM)
    clean = model(x, sigma, path.level(r), **cond)
    return PREDICTIONS["average_velocity"].of_clean(clean, z, t, r, path)


def velocity(model: Denoiser, z: Tensor, t: Tensor, path: Path = LINEAR, **cond: Any) -> Tensor:
    """dz/dt at (z, t) of a denoiser or of the denoiser in a flow map, like z; t > 0 (B,)."""
    if isinstance(model, FlowMap):
        return average_velocity(model, z, t, t, path, **cond)
    x, sigma = change_path(z, t, path, EDM)
    return PREDICTIONS["velocity"].of_clean(model(x, sigma, **cond), z, t, t, path)
