"""Distances between two batches of images, as consistency losses use them.

Every distance takes images a and b, (B, C, H, W) in [-1, 1], and returns (B,) in fp32.
"""

from collections.abc import Callable

from torch import Tensor

from cm.errors import UserError
from cm.nn import mean_flat
from cm.objectives.lpips import Lpips, LpipsOptions, at_least_fp32, resize

Distance = Callable[[Tensor, Tensor], Tensor]


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of each pair of images."""
    return mean_flat(_difference(a, b).abs())


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference of each pair of images."""
    return mean_flat(_difference(a, b).square())


def l2_at_32(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference after bilinear resizing of both images to 32 x 32, without antialiasing."""
    return mean_flat(
        resize(_difference(a, b), 32).square()
    )  # resizing is linear: one pass serves both images


def linf(a: Tensor, b: Tensor) -> Tensor:
    """Largest absolute difference of each pair of images."""
    return _difference(a, b).abs().flatten(1).amax(1)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise ValueError(f"images of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
    return at_least_fp32(a) - at_least_fp32(b)


DISTANCES: dict[str, Callable[[LpipsOptions], Distance]] = {
    "l1": lambda options: l1,
    "l2": lambda options: l2,
    "l2-32": lambda options: l2_at_32,
    "linf": lambda options: linf,
    "lpips": lambda options: Lpips(options, average_pool=True),
    "lpips-max": lambda options: Lpips(options, average_pool=False),
}


def make_distance(
    name: str, *, lpips_path: str = "", lpips_size: int = 224, lpips_precision: str = "fp32"
) -> Distance:
    """The distance that `name` in DISTANCES names; the options are those of `cm.objectives.lpips.LpipsOptions`.

    The networks of LPIPS are loaded when the distance is first called, or by its `load(device)`.
    """
    if name not in DISTANCES:
        raise UserError(f"--loss_norm {name!r} is unknown; choose one of {', '.join(DISTANCES)}")
    return DISTANCES[name](LpipsOptions(lpips_path, lpips_size, lpips_precision))
