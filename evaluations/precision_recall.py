"""Improved precision and recall of generative models (Kynkäänniemi et al. 2019, arXiv:1904.06991, Eq. 1-3).

Distances come from float32 matrix products, block by block; every decision that lies within the rounding error of
those products is taken again from float64 differences. The result is that of a float64 computation at float32 cost.
"""

import torch
from torch import Tensor

from evaluations.inception_v3 import exact_float32

_BLOCK_ELEMENTS = 1 << 23  # elements of one block of distances (32 MB)
_SPARE = 3  # candidates beyond the k-th neighbour, so that rounding can hardly hide the true one
_UNIT_ROUNDOFF = 2.0**-24


def precision_recall(reference, samples, k: int = 3) -> tuple[float, float]:
    """(precision, recall) of `samples` (M, d) against `reference` (N, d); arrays or tensors, on their device.

    Precision is the share of samples inside some reference point's ball, whose radius is the distance to its k-th
    nearest other reference point; recall is the same with the roles exchanged.
    """
    reference, samples = torch.as_tensor(reference), torch.as_tensor(samples)
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(f"features {tuple(reference.shape)} and {tuple(samples.shape)} cannot be compared")
    if min(len(reference), len(samples)) <= k or k < 1:
        raise ValueError(
            f"k = {k} needs more than {k} points in both sets, got {len(reference)} and {len(samples)}"
        )
    centre = reference.double().mean(0)  # smaller norms, smaller rounding error
    ref, sam = _Points(reference, centre), _Points(samples.to(reference.device), centre)
    with exact_float32():
        ref_radii, sam_radii = ref.radii_sq(k), sam.radii_sq(k)
        return _shares(ref, sam, ref_radii, sam_radii)


class _Points:
    """A set of points: as given (`exact`), centred in float32 (`x`), with their squared norms."""

    def __init__(self, points: Tensor, centre: Tensor):
        self.exact = points
        self.x = torch.cat([(part - centre).float() for part in points.split(4096)])
        self.sq = torch.cat([part.double().square().sum(1) for part in self.x.split(4096)])

    def __len__(self) -> int:
        return len(self.x)

    def rounding(self, other: "_Points") -> Tensor:
        """Bound (n,) on the error of |u|^2 - 2 u.v + |v|^2 in float32, for each u here and any v in `other`."""
        norms, largest = self.sq.sqrt(), other.sq.max().sqrt()
        return _UNIT_ROUNDOFF * (2 * self.x.shape[1] * norms * largest + 16 * (norms + largest) ** 2)

    def radii_sq(self, k: int) -> Tensor:
        """Squared distance (n,) float64 of every point to its k-th nearest other point."""
        wanted = min(k + _SPARE, len(self) - 1)
        error, sq = self.rounding(self), self.sq.float()
        radii = torch.empty_like(self.sq)
        step = _block_rows(len(self))
        for start in range(0, len(self), step):
            rows = torch.arange(start, min(start + step, len(self)), device=self.x.device)
            block = torch.addmm(sq, self.x[rows], self.x.T, alpha=-2)  # lacks the row's own |u|^2: same order
            block[rows - start, rows] = torch.inf
            near, index = block.topk(wanted, dim=1, largest=False)
            exact = torch.stack(
                [_distance_sq(self.exact[rows], self.exact[index[:, j]]) for j in range(wanted)], 1
            )
            radii[rows] = exact.kthvalue(k, dim=1).values
            # A point that is no candidate is at least as far as the last candidate, up to rounding.
            missed = (near[:, -1].double() + self.sq[rows] - error[rows] < radii[rows]) & (radii[rows] > 0)
            for row in rows[missed & (wanted < len(self) - 1)].tolist():
                distance = torch.cat(
                    [_distance_sq(self.exact[row][None], part) for part in self.exact.split(4096)]
                )
                distance[row] = torch.inf
                radii[row] = distance.kthvalue(k).values
        return radii


def _shares(ref: _Points, sam: _Points, ref_radii: Tensor, sam_radii: Tensor) -> tuple[float, float]:
    """Shares of `sam` inside balls of `ref` and of `ref` inside balls of `sam`, from one product of the two."""
    ref_ball = (
        ref.sq - ref_radii
    ).float()  # a point s is inside the ball of r when this - 2 s.r + |s|^2 <= 0
    sam_ball = (sam.sq - sam_radii).float()
    sam_gap = torch.empty(len(sam), device=sam.x.device)
    ref_gap = torch.full((len(ref),), torch.inf, device=ref.x.device)
    step = _block_rows(len(ref))
    for start in range(0, len(sam), step):
        rows = slice(start, start + step)
        product = (sam.x[rows] @ ref.x.T).mul_(-2)
        sam_gap[rows] = (product + ref_ball).amin(1)
        ref_gap = torch.minimum(ref_gap, product.add_(sam_ball[rows, None]).amin(0))
    precision = _share_inside(sam, ref, ref_radii, sam_gap + sam.sq)
    recall = _share_inside(ref, sam, sam_radii, ref_gap + ref.sq)
    return precision, recall


def _share_inside(points: _Points, balls: _Points, radii: Tensor, gap: Tensor) -> float:
    """Share of `points` in some ball; `gap` (n,) is the float32 minimum over balls of distance^2 - radius^2."""
    error = points.rounding(balls) + _UNIT_ROUNDOFF * 4 * radii.max()
    inside = gap <= 0
    ball = (balls.sq - radii).float()
    unsure = torch.nonzero(gap.abs() <= error).flatten()
    for rows in unsure.split(_block_rows(len(balls))):
        gaps = torch.addmm(ball, points.x[rows], balls.x.T, alpha=-2) + points.sq[rows, None]
        for row, candidates in zip(rows.tolist(), gaps <= error[rows, None]):
            inside[row] = _inside_any(
                points.exact[row], balls.exact, radii, torch.nonzero(candidates).flatten()
            )
    return float(inside.double().mean())


def _inside_any(point: Tensor, centres: Tensor, radii: Tensor, candidates: Tensor) -> bool:
    """Whether the point is in one of the candidate balls, in float64; stops at the first chunk with a hit."""
    return any(
        bool((_distance_sq(point[None], centres[part]) <= radii[part]).any())
        for part in candidates.split(256)
    )


def _block_rows(columns: int) -> int:
    return max(32, _BLOCK_ELEMENTS // columns)


def _distance_sq(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b.double()).square().sum(1)
