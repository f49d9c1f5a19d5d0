"""A mixture of Gaussians with its probability flow, solved numerically, and its exact one-dimensional quantities."""

import numpy as np
import torch
from torch import Tensor

from tests.helpers.analytic import Mixture


class SolvedMixture(Mixture):
    """Points (B, D); `cdf` and `consistency` are for D = 1."""

    def flow(self, x: Tensor, sigma: float, end: float) -> Tensor:
        """The probability-flow ODE from sigma to end, by an eighth-order solver."""
        from scipy.integrate import solve_ivp

        def slope(t, flat):
            state = torch.from_numpy(flat.reshape(x.shape))
            return ((state - self.denoise(state, t)) / t).numpy().ravel()

        solution = solve_ivp(slope, (sigma, end), x.numpy().ravel(), method="DOP853", rtol=1e-11, atol=1e-12)
        return torch.from_numpy(solution.y[:, -1].reshape(x.shape))

    def cdf(self, x: np.ndarray, sigma: float) -> np.ndarray:
        """Distribution function of the data at noise level sigma; x is (B,)."""
        from scipy.stats import norm

        scale = (self.std**2 + sigma**2) ** 0.5
        return norm.cdf((x[:, None] - self.centres.numpy().ravel()) / scale).mean(1)

    def consistency(self, x: Tensor, sigma: float, end: float) -> Tensor:
        """The exact consistency function: in one dimension the flow keeps quantiles."""
        scale = (self.std**2 + end**2) ** 0.5
        centres = self.centres.numpy().ravel()
        grid = np.linspace(centres.min() - 8 * scale, centres.max() + 8 * scale, 20001)
        values = np.interp(self.cdf(x.numpy().ravel(), sigma), self.cdf(grid, end), grid)
        return torch.from_numpy(values).reshape(x.shape)
