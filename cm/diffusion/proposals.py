"""Laws of ln(sigma) for pairs and tangents: normal or Student's t, whole or cut to a range, by their inverse."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

CELLS, NODES, NEWTON_STEPS = 1024, 16, 5


@dataclass(frozen=True)
class Proposal:
    """ln(sigma) with density proportional to that of a location-scale law on [low, high].

    df: degrees of freedom of Student's t; infinite: normal. All methods take and give float64.
    """

    mean: float
    std: float
    low: float = -math.inf
    high: float = math.inf
    df: float = math.inf

    def __post_init__(self):
        if not self.std > 0 or not self.df > 0 or not self.low < self.high:
            raise ValueError(f"{self} is no law")

    def inverse(self, u: Tensor) -> Tensor:
        """ln(sigma) at which the distribution function is u (B,) in [0, 1), on u's device."""
        u = u.double()
        if not self.cut:
            return self.mean + self.std * torch.special.ndtri(u.clamp(2**-26, 1 - 2**-26))
        edges, below = (table.to(u.device, non_blocking=True) for table in _tables(self))
        cell = (torch.searchsorted(below, u, right=True) - 1).clamp(0, CELLS - 1)
        left, right = edges[cell], edges[cell + 1]
        x, start = (left + right) / 2, below[cell]
        for _ in range(NEWTON_STEPS):
            x = x - (start + _mass(self, left, x) / _total(self) - u) / self.density(x).clamp_min(1e-300)
            x = torch.minimum(torch.maximum(x, left), right)
        return x

    @property
    def cut(self) -> bool:
        """Whether a range bounds it; a Student's t must be bounded."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def density(self, x: Tensor) -> Tensor:
        """Density of ln(sigma) inside the range."""
        return self._shape(x) / _total(self)

    def distribution(self, x: Tensor) -> Tensor:
        """Distribution function inside the range."""
        edges, below = _tables(self)
        cell = (torch.searchsorted(edges, x) - 1).clamp(0, CELLS - 1)
        return below[cell] + _mass(self, edges[cell], x) / _total(self)

    def _shape(self, x: Tensor) -> Tensor:
        z = ((x - self.mean) / self.std).square()
        if math.isinf(self.df):
            return (-z / 2).exp()
        return (-(self.df + 1) / 2 * torch.log1p(z / self.df)).exp()


@lru_cache(maxsize=1)
def _rule() -> tuple[Tensor, Tensor]:
    """Nodes and weights of the quadrature on [-1, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def _mass(law: Proposal, a: Tensor, b: Tensor) -> Tensor:
    """Integral of the unnormalised density from a to b, in one cell, by Gauss and Legendre."""
    nodes, weights = (v.to(a.device, non_blocking=True) for v in _rule())
    half = (b - a)[..., None] / 2
    return (law._shape(a[..., None] + half * (1 + nodes)) * weights * half).sum(-1)


@lru_cache(maxsize=16)
def _cells(law: Proposal) -> tuple[Tensor, Tensor]:
    """Edges of cells that are narrow where the density is, and the integral over each."""
    ends = torch.tensor([(end - law.mean) / law.std for end in (law.low, law.high)], dtype=torch.float64)
    low, high = torch.asinh(ends).tolist()
    edges = law.mean + law.std * torch.sinh(torch.linspace(low, high, CELLS + 1, dtype=torch.float64))
    edges[0], edges[-1] = law.low, law.high
    return edges, _mass(law, edges[:-1], edges[1:])


@lru_cache(maxsize=16)
def _total(law: Proposal) -> float:
    return _cells(law)[1].sum().item()


@lru_cache(maxsize=16)
def _tables(law: Proposal) -> tuple[Tensor, Tensor]:
    """Edges of the cells, and the distribution function at each."""
    edges, mass = _cells(law)
    return edges, torch.cat([mass.new_zeros(1), mass.cumsum(0) / mass.sum()])
