"""EDM's geometric augmentation restated in float64 from its formulas (Karras et al. 2022, App. F.2): slow, by index.

Pixel i of an image lies at 2 i of the doubled one. Doubling: U[k] = sum_m x[m] h[k + 5 - 2 m]; halving: y[i] =
sum_j V[2 i + j - 5] h[j]; h is the sym6 low-pass filter. Between them V[q] is U, by bilinear interpolation, at the
place that the inverse of the transform gives. Outside of an image is its mirror image, which does not repeat the outer
pixels.
"""

import math

import numpy as np

H = np.array(
    [
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
    ]
)


def inverse(steps: list[tuple]) -> np.ndarray:
    """3x3 map from places in the result to places in the image, from the centre, y down.

    steps: in the order in which they act: ("scale", x, y), ("rotate", angle), ("shift", x, y) [pixels]. Each inverse is
    multiplied from the right.
    """
    total = np.eye(3)
    for kind, *values in steps:
        m = np.eye(3)
        if kind == "scale":
            m[0, 0], m[1, 1] = 1 / values[0], 1 / values[1]
        elif kind == "rotate":
            c, s = math.cos(values[0]), math.sin(values[0])
            m[:2, :2] = [[c, -s], [s, c]]
        else:
            m[:2, 2] = -np.array(values)
        total = total @ m
    return total


def mirror(index: np.ndarray, n: int) -> np.ndarray:
    """Indices into n pixels that are mirrored at their outer ones."""
    index = np.abs(index) % (2 * (n - 1))
    return np.where(index < n, index, 2 * (n - 1) - index)


def doubled(rows: np.ndarray, low: int, high: int) -> np.ndarray:
    """U[low], ..., U[high - 1] of every row (..., n)."""
    k = np.arange(low, high)[:, None]
    m = np.arange((low - 7) // 2, (high + 7) // 2)[None]
    taps = k + 5 - 2 * m
    weights = np.where((taps >= 0) & (taps < 12), H[taps.clip(0, 11)], 0.0)
    return rows[..., mirror(m[0], rows.shape[-1])] @ weights.T


def resample(image: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """An image (C, H, W) seen through the inverse of a transform."""
    height, width = image.shape[1:]
    x, y = np.meshgrid(np.arange(-5, 2 * width + 5), np.arange(-5, 2 * height + 5))
    centre = np.array([width - 1, height - 1])
    places = np.stack([x, y], -1) - centre  # in half pixels
    shift = 2 * transform[:2, 2]
    places = places @ transform[:2, :2].T + shift + centre
    low = np.floor(places.min((0, 1))).astype(int) - 1
    high = np.ceil(places.max((0, 1))).astype(int) + 2
    wide = doubled(image, low[0], high[0])
    big = doubled(wide.swapaxes(1, 2), low[1], high[1]).swapaxes(1, 2)
    first = np.floor(places).astype(int)
    fx, fy = np.moveaxis(places - first, -1, 0)
    ix, iy = np.moveaxis(first - low, -1, 0)
    seen = (
        big[:, iy, ix] * (1 - fx) * (1 - fy)
        + big[:, iy, ix + 1] * fx * (1 - fy)
        + big[:, iy + 1, ix] * (1 - fx) * fy
        + big[:, iy + 1, ix + 1] * fx * fy
    )
    narrow = sum(seen[:, :, j : j + 2 * width : 2] * H[j] for j in range(12))
    return sum(narrow[:, j : j + 2 * height : 2] * H[j] for j in range(12))
