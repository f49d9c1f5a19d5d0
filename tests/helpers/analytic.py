"""Closed-form data for tests: its ideal denoiser and consistency function; a preconditioning for closed forms."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cm.diffusion.grid import karras_sigmas
from cm.diffusion.precond import Coefficients
from cm.sampling.noise import DummyGenerator


def ones(sigma: Tensor, r: Tensor | None = None) -> Tensor:
    """The weighting lambda = 1."""
    return torch.ones_like(sigma)


def free(sigma: Tensor) -> Coefficients:
    """The preconditioning of a network that is the whole function: it sees x and sigma."""
    return Coefficients(torch.zeros_like(sigma), torch.ones_like(sigma), torch.ones_like(sigma), sigma)


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std^2) in every coordinate; noise levels down to eps."""

    mean: float = 0.3
    std: float = 0.5
    eps: float = 0.002

    def sample(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Clean data, float64."""
        return self.mean + self.std * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x] = (s^2 x + sigma^2 m) / (s^2 + sigma^2)."""
        v = _like(sigma, x) ** 2
        return (self.std**2 * x + v * self.mean) / (self.std**2 + v)

    def flow(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Exact solution of the probability-flow ODE from (x, t) at r."""
        ratio = (self.std**2 + _like(r, x) ** 2) / (self.std**2 + _like(t, x) ** 2)
        return self.mean + (x - self.mean) * ratio.sqrt()

    def consistency(self, x: Tensor, t: Tensor) -> Tensor:
        """Exact consistency function: the flow to eps."""
        return self.flow(x, t, torch.tensor(self.eps))


@dataclass(frozen=True)
class Mixture:
    """Equal mixture of isotropic Gaussians in the plane; x has shape (B, 2)."""

    centres: Tensor
    std: float = 0.1

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x]: posterior means of the components, weighted by their responsibilities."""
        v = _like(sigma, x) ** 2
        centres = self.centres.to(x)
        distance = ((x[:, None] - centres) ** 2).sum(-1)
        responsibility = torch.softmax(-distance / (2 * (self.std**2 + v)), dim=1)
        means = (self.std**2 * x[:, None] + v[:, None] * centres) / (self.std**2 + v[:, None])
        return (responsibility[..., None] * means).sum(1)


def order_of_convergence(sample, data=None) -> tuple[float, float]:
    """(slope of log error against log step over three step sizes, error at 128 steps) of a sampler from 10 to 0.1."""
    data = data or Gaussian()
    x = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10
    exact = data.flow(x, 10.0, 0.1)
    counts = (64, 128, 256)
    errors = [
        (sample(data.denoise, x, karras_sigmas(n + 1, 0.1, 10.0), DummyGenerator()) - exact).abs().mean()
        for n in counts
    ]
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0], errors[1].item()
