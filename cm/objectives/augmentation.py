"""Geometric augmentation with labels (Karras et al. 2022, App. F.2; the transforms of StyleGAN2-ADA).

The network is told what was done to an image, so that it learns the undistorted distribution from distorted images:
labels of zero mean "not augmented", and sampling passes none.

Shapes: B batch, C channels, H and W image sides. Positions are (x, y) in pixels, y down.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LABELS = 9

# How much likelier than `probability` a transform is: mirroring is always drawn, and mirrors half of the images.
XFLIP_MULTIPLIER = 1e8
SCALE_STD = 0.2  # of log2 of a scale
SHIFT_STD = 0.125  # in units of the image's side

# Orthonormal low-pass filter of the sym6 wavelet: correlation with its even shifts is zero, so that doubling an image
# by it and halving the result by its mirror image gives the image back exactly.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
HALF_TAPS = len(SYM6) // 2


class Draws(Protocol):
    """A source of one number per image, such as `cm.seeding.StepRandom`."""

    def uniform(self) -> Tensor:
        """(B,) in [0, 1)."""

    def normal(self) -> Tensor:
        """(B,) standard normal."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What is done to each image, in this order; all tensors are (B,). Zeros (False) leave an image alone.

    xflip, yflip: bool. scale: log2 of the magnification, in units of 0.2. rotation: counter-clockwise, in radians.
    stretch, stretch_angle: as scale, by s along the direction stretch_angle and by 1 / s across it.
    shift_x, shift_y: in units of an eighth of the side; positive is right and down.
    """

    xflip: Tensor
    yflip: Tensor
    scale: Tensor
    rotation: Tensor
    stretch: Tensor
    stretch_angle: Tensor
    shift_x: Tensor
    shift_y: Tensor

    def labels(self) -> Tensor:
        """(B, 9) fp32, what the network is told; a row of zeros for an unchanged image."""
        columns = [
            self.xflip,
            self.yflip,
            self.scale,
            self.rotation.cos() - 1,
            self.rotation.sin(),
            self.stretch * self.stretch_angle.cos(),
            self.stretch * self.stretch_angle.sin(),
            self.shift_x,
            self.shift_y,
        ]
        return torch.stack([c.float() for c in columns], dim=1)

    def source(self, height: int, width: int) -> Tensor:
        """(B, 2, 3) affine map from a position in the result to one in the flipped image, from the centre of both.

        It is the inverse of scaling, rotating, stretching and shifting, in this order.
        """
        scale = (SCALE_STD * self.scale).exp2()
        stretch = (SCALE_STD * self.stretch).exp2()
        linear = _rotation(self.rotation) / scale[:, None, None]
        linear = linear @ _rotation(-self.stretch_angle)
        linear = linear * torch.stack([1 / stretch, stretch], dim=1)[:, None]
        linear = linear @ _rotation(self.stretch_angle)
        shift = torch.stack([self.shift_x * width, self.shift_y * height], dim=1) * SHIFT_STD
        return torch.cat([linear, -linear @ shift[:, :, None]], dim=2)


def _rotation(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)


def draw_geometry(rnd: Draws, probability: float) -> Geometry:
    """Draw which transforms act on each image, each with this probability, and how strongly.

    The number of draws does not depend on the probability.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"a probability of augmentation must lie in [0, 1], got {probability}")

    def gate(value: Tensor, multiplier: float = 1.0) -> Tensor:
        return torch.where(rnd.uniform() < probability * multiplier, value, torch.zeros_like(value))

    def angle() -> Tensor:
        return (2 * rnd.uniform() - 1) * math.pi

    xflip = gate(rnd.uniform() < 0.5, XFLIP_MULTIPLIER)
    yflip = gate(rnd.uniform() < 0.5)
    scale = gate(rnd.normal())
    rotation = gate(angle())
    stretch = gate(rnd.normal())
    stretch_angle = angle()
    stretch_angle = torch.where(rnd.uniform() < 0.5, stretch_angle, torch.zeros_like(stretch_angle))
    shift_x, shift_y = rnd.normal(), rnd.normal()
    shifted = rnd.uniform() < probability
    return Geometry(
        xflip=xflip,
        yflip=yflip,
        scale=scale,
        rotation=rotation,
        stretch=stretch,
        stretch_angle=stretch_angle,
        shift_x=shift_x * shifted,
        shift_y=shift_y * shifted,
    )


def augment(images: Tensor, rnd: Draws, probability: float) -> tuple[Tensor, Tensor]:
    """Transform images (B, C, H, W) at random: (images, labels (B, 9)).

    Everything random comes from `rnd`; a row depends on its own draws only. Unchanged images come back bit by bit.
    """
    geometry = draw_geometry(rnd, probability)
    return transform(images, geometry), geometry.labels()


def transform(images: Tensor, geometry: Geometry) -> Tensor:
    """Flip, scale, rotate, stretch and shift images (B, C, H, W). Outside of an image is its mirror image."""
    if images.ndim != 4 or min(images.shape[2:]) < 2 or len(images) != len(geometry.xflip):
        raise ValueError(f"images of shape {tuple(images.shape)} for {len(geometry.xflip)} geometries")
    images = torch.where(_per_image(geometry.xflip), images.flip(3), images)
    images = torch.where(_per_image(geometry.yflip), images.flip(2), images)
    parts = (geometry.scale, geometry.rotation, geometry.stretch, geometry.shift_x, geometry.shift_y)
    moved = torch.stack(parts).ne(0).any(0)
    return torch.where(_per_image(moved), _resample(images, geometry), images)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _resample(images: Tensor, geometry: Geometry) -> Tensor:
    """Double the images, read them at the transformed positions, and halve the result.

    Pixel i lies at 2 i of the doubled image.
    """
    height, width = images.shape[2:]
    doubled = _double(_double(_mirror_period(_mirror_period(images, 2), 3), 2), 3)
    centre = images.new_tensor([(width - 1) / 2, (height - 1) / 2])
    # Positions of the doubled result, with the margin that the halving filter reads
    rows, columns = (
        torch.arange(1 - HALF_TAPS, 2 * side + HALF_TAPS - 1, device=images.device) / 2
        for side in (height, width)
    )
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1) - centre  # (2H + 10, 2W + 10, 2)
    source = geometry.source(height, width).to(images)
    positions = torch.einsum("bij,yxj->byxi", source[:, :, :2], grid) + source[:, None, None, :, 2] + centre
    return _halve(_halve(_read_periodic(doubled, 2 * positions), 2), 3)


def _mirror_period(images: Tensor, dim: int) -> Tensor:
    """One period of the image mirrored at its outer pixels' centres for ever: n -> 2 (n - 1)."""
    inner = images.narrow(dim, 1, images.shape[dim] - 2)
    return torch.cat([images, inner.flip(dim)], dim)


def _read_periodic(images: Tensor, positions: Tensor) -> Tensor:
    """Values of periodic images at (x, y) positions (B, H', W', 2) in pixels, by bilinear interpolation."""
    period = positions.new_tensor([images.shape[3], images.shape[2]])
    closed = F.pad(images, (0, 1, 0, 1), mode="circular")  # the last pixel is the first one again
    # The remainder of a tiny negative number may round up to the period itself, which is a valid position.
    grid = 2 * positions.remainder(period) / period - 1
    return F.grid_sample(closed, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _double(images: Tensor, dim: int) -> Tensor:
    """Twice as many pixels of periodic images along `dim`: zeros in between, then the wavelet's filter, mirrored."""
    spread = torch.stack([images, torch.zeros_like(images)], dim + 1).flatten(dim, dim + 1)
    before, after = HALF_TAPS, HALF_TAPS - 1
    pad = (before, after, 0, 0) if dim == 3 else (0, 0, before, after)
    return F.conv2d(
        F.pad(spread, pad, mode="circular"), _filter(images, dim).flip(dim), groups=images.shape[1]
    )


def _halve(images: Tensor, dim: int) -> Tensor:
    """The adjoint of `_double`: the filter at every other pixel, without padding."""
    stride = (1, 2) if dim == 3 else (2, 1)
    return F.conv2d(images, _filter(images, dim), stride=stride, groups=images.shape[1])


def _filter(images: Tensor, dim: int) -> Tensor:
    shape = (1, 1, 1, -1) if dim == 3 else (1, 1, -1, 1)
    return images.new_tensor(SYM6).reshape(shape).repeat(images.shape[1], 1, 1, 1)
