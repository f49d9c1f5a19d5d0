"""Distances between two batches of images, as consistency losses use them.

Every distance takes images a and b, (B, C, H, W) in [-1, 1], and returns (B,) in fp32. Continuous-time objectives also
ask what becomes of it in the limit of small differences: `tangent_loss` and `direction`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cm.config.rows import DISTANCES
from cm.errors import UserError
from cm.nn import mean_flat


class Distance:
    """d(a, b) per image, and its second-order behaviour at a = b."""

    tangent_degree = 2  # how often the tangent v is a factor of `tangent_loss`

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(B,) distances of images a and b, (B, C, H, W)."""
        raise NotImplementedError

    def load(self, device: torch.device) -> None:
        """Make networks and tables ready on `device`; all ranks call it together. Most distances have none."""

    def tangent_loss(self, f: Tensor, v: Tensor) -> Tensor:
        """(B,) loss of a tangent v at f: v^T G(f) v, G the Hessian of y -> d(y, f) (Theorem 3 without its 1/2)."""
        return (v * self.direction(f, v)).flatten(1).sum(1)

    def direction(self, f: Tensor, v: Tensor) -> Tensor:
        """G(f) v, shaped like f: the direction of the pseudo-loss sum f g (Song et al. 2023, Theorem 5).

        Forward over reverse. Gradients flow through f and v where they have any.
        """
        slope = torch.func.grad(lambda y: self(y, f).sum())
        return torch.func.jvp(slope, (f,), (v,))[1]


class FunctionDistance(Distance):
    """A distance that is a plain function (a, b) -> (B,), such as a plug-in's."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]):
        self.function = function

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


class L1(Distance):
    """Mean absolute difference of each pair of images. Its curvature is nowhere defined: it has no direction."""

    tangent_degree = 1

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return mean_flat(difference(a, b).abs())

    def tangent_loss(self, f: Tensor, v: Tensor) -> Tensor:
        return mean_flat(v.abs())


class L2(Distance):
    """Mean squared difference of each pair of images. Its tangent loss is the norm of v, not its square."""

    tangent_degree = 1

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return mean_flat(difference(a, b).square())

    def tangent_loss(self, f: Tensor, v: Tensor) -> Tensor:
        return torch.linalg.vector_norm(v.flatten(1), dim=1)

    def direction(self, f: Tensor, v: Tensor) -> Tensor:
        return v


class L2At32(Distance):
    """Mean squared difference after bilinear resizing of both images to 32 x 32, without antialiasing."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        # Resizing is linear: one pass serves both images.
        return mean_flat(resize(difference(a, b), 32).square())


class LInf(Distance):
    """Largest absolute difference of each pair of images. It has no direction, as L1."""

    tangent_degree = 1

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return difference(a, b).abs().flatten(1).amax(1)

    def tangent_loss(self, f: Tensor, v: Tensor) -> Tensor:
        return v.abs().flatten(1).amax(1)


class PseudoHuber(Distance):
    """sqrt(|a - b|^2 + c^2) - c with one Euclidean norm per image (Song & Dhariwal 2023, Eq. 8).

    c: 0 is the norm itself; -1 is 0.00054 sqrt(d) for images of d values, as that paper has it.
    """

    def __init__(self, c: float = -1.0):
        self.c = c

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        difference_rows = difference(a, b).flatten(1)
        if self.c == 0:
            return torch.linalg.vector_norm(difference_rows, dim=1)
        c = self._width(a)
        square = difference_rows.square().sum(1)
        # The same number as sqrt(square + c^2) - c, which loses its digits for close images.
        return square / ((square + c**2).sqrt() + c)

    def direction(self, f: Tensor, v: Tensor) -> Tensor:
        if self.c == 0:
            raise UserError(
                "--huber_c 0: the norm has no curvature, so no continuous-time loss with --stop_grad True"
            )
        return v / self._width(f)

    def _width(self, image: Tensor) -> float:
        return 0.00054 * math.sqrt(image[0].numel()) if self.c < 0 else self.c


def difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b in fp32 at least; ValueError for different shapes."""
    if a.shape != b.shape:
        raise ValueError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
    return at_least_fp32(a) - at_least_fp32(b)


def at_least_fp32(x: Tensor) -> Tensor:
    """Half-precision tensors in fp32; others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def resize(x: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) at size x size, bilinearly without antialiasing."""
    return torch.nn.functional.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


def make_distance(name: str, **options: object) -> Distance:
    """The distance of a row of DISTANCES. options: keywords of what it makes, such as `path` and `size` of LPIPS.

    The networks of LPIPS are loaded when the distance is first called, or by its `load(device)`.
    """
    return DISTANCES.load(name)(**options)
