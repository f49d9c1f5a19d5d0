"""Data whose denoiser, flow and consistency function are known in closed form."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std^2) in every coordinate; `mean` broadcasts against x."""

    mean: Tensor | float
    std: float

    def _sigma(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        return torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x] = (std^2 x + sigma^2 mean) / (std^2 + sigma^2)."""
        variance = self._sigma(x, sigma) ** 2
        return (self.std**2 * x + variance * self.mean) / (self.std**2 + variance)

    def flow(self, x: Tensor, sigma: float, end: float) -> Tensor:
        """The probability-flow ODE from sigma to end: x - mean scales with the marginal standard deviation."""
        scale = ((self.std**2 + end**2) / (self.std**2 + self._sigma(x, sigma) ** 2)) ** 0.5
        return self.mean + (x - self.mean) * scale


@dataclass(frozen=True)
class Mixture:
    """Data with equal chances of each row of `centers` (K, D), plus N(0, std^2) in every coordinate; x is (B, D)."""

    centers: Tensor
    std: float

    def denoise(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x0 | x]: the centers' own estimates, weighted by how likely each explains x."""
        variance = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1) ** 2
        total = self.std**2 + variance
        distance = ((x[:, None] - self.centers) ** 2).sum(-1)
        weight = torch.softmax(-distance / (2 * total), dim=1)
        return (self.std**2 * x + variance * (weight @ self.centers)) / total

    def flow(self, x: Tensor, sigma: float, end: float) -> Tensor:
        """The probability-flow ODE from sigma to end, by an eighth-order solver."""
        from scipy.integrate import solve_ivp

        def slope(t, flat):
            state = torch.from_numpy(flat.reshape(x.shape))
            return ((state - self.denoise(state, t)) / t).numpy().ravel()

        solution = solve_ivp(slope, (sigma, end), x.numpy().ravel(), method="DOP853", rtol=1e-11, atol=1e-12)
        return torch.from_numpy(solution.y[:, -1].reshape(x.shape))

    def cdf(self, x: np.ndarray, sigma: float) -> np.ndarray:
        """Distribution function at noise level sigma, for D = 1; x is (B,)."""
        from scipy.stats import norm

        scale = (self.std**2 + sigma**2) ** 0.5
        return norm.cdf((x[:, None] - self.centers.numpy().ravel()) / scale).mean(1)

    def consistency(self, x: Tensor, sigma: float, end: float) -> Tensor:
        """The exact consistency function for D = 1: in one dimension the flow keeps quantiles."""
        scale = (self.std**2 + end**2) ** 0.5
        centers = self.centers.numpy().ravel()
        grid = np.linspace(centers.min() - 8 * scale, centers.max() + 8 * scale, 20001)
        values = np.interp(self.cdf(x.numpy().ravel(), sigma), self.cdf(grid, end), grid)
        return torch.from_numpy(values).reshape(x.shape)
