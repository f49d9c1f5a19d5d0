"""Diffusion SDEs dz = f(z, t) dt + g(t) dw as objects (Song et al. 2021, arXiv:2011.13456).

All have affine drift, so that z(t) = alpha(t) x0 + std(t) noise. With level(t) = std / alpha the scaled state z / alpha
is x0 + level * noise, the state of `cm.diffusion.denoiser.Denoiser`; that links every SDE here to every denoiser.
Times t are scalar float64 tensors, states z (B, ...).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cm.config.choices import SDES
from cm.diffusion.grid import karras_sigmas
from cm.diffusion.noise_schedules import VPSchedule


class Transition(NamedTuple):
    """z(t) given an earlier z(r) is N(scale z(r), variance)."""

    scale: Tensor
    variance: Tensor


class SDE(ABC):
    """A forward SDE on times [end, start]: data near `end`, the prior at `start`."""

    start: float = 1.0
    end: float = 1e-3

    @abstractmethod
    def drift(self, z: Tensor, t: Tensor) -> Tensor:
        """f(z, t), like z."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the data at time t."""

    @abstractmethod
    def std(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at time t."""

    @abstractmethod
    def time(self, level: Tensor) -> Tensor:
        """The time at which std / alpha is `level`."""

    def level(self, t: Tensor) -> Tensor:
        """std / alpha: the noise level of the state divided by alpha."""
        return self.std(t) / self.alpha(t)

    def score(self, denoised: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(z) = (alpha E[x0 | z] - z) / std^2, from the denoised image (Tweedie's formula)."""
        return (self.alpha(t) * denoised - z) / self.std(t) ** 2

    def reverse_drift(self, z: Tensor, t: Tensor, score: Tensor) -> Tensor:
        """Drift f - g^2 score of the reverse-time SDE (Eq. 6); its diffusion is g(t)."""
        return self.drift(z, t) - self.diffusion(t) ** 2 * score

    def flow(self, z: Tensor, t: Tensor, score: Tensor) -> Tensor:
        """dz/dt = f - g^2 score / 2 of the probability-flow ODE (Eq. 13)."""
        return self.drift(z, t) - 0.5 * self.diffusion(t) ** 2 * score

    def transition(self, r: Tensor, t: Tensor) -> Transition:
        """The forward kernel from time r to a later time t."""
        scale = self.alpha(t) / self.alpha(r)
        return Transition(scale, self.std(t) ** 2 - (scale * self.std(r)) ** 2)

    def levels(self, n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
        """Noise levels of n equidistant times within [end, start] and [sigma_min, sigma_max], decreasing, float64."""
        low, high = (self.time(torch.tensor(s, dtype=torch.float64)).item() for s in (sigma_min, sigma_max))
        return self.level(torch.linspace(min(self.start, high), max(self.end, low), n, dtype=torch.float64))


@dataclass(frozen=True)
class VESDE(SDE):
    """Variance exploding: std = sigma_min (sigma_max / sigma_min)^t, no drift (App. C)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    end: float = 1e-5

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def drift(self, z: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.std(t) * math.sqrt(2 * self._log_ratio)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def std(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self._log_ratio * t)

    def time(self, level: Tensor) -> Tensor:
        return (level / self.sigma_min).log() / self._log_ratio


@dataclass(frozen=True)
class VPSDE(SDE):
    """Variance preserving: f = -beta z / 2, g = sqrt(beta), beta(t) = beta_min + beta_d t (App. C)."""

    schedule: VPSchedule = field(default_factory=VPSchedule)

    def beta(self, t: Tensor) -> Tensor:
        """Rate at which the data fade."""
        return self.schedule.beta_min + self.schedule.beta_d * t

    def integral(self, t: Tensor) -> Tensor:
        """Integral of beta from 0 to t."""
        return self.schedule.beta_min * t + self.schedule.beta_d * t**2 / 2

    def drift(self, z: Tensor, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t) * z

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.integral(t))

    def std(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self.integral(t))).sqrt()

    def time(self, level: Tensor) -> Tensor:
        return self.schedule.time(level)


@dataclass(frozen=True)
class SubVPSDE(VPSDE):
    """Sub-VP: the drift of VP with g = sqrt(beta (1 - exp(-2 integral))), so that std = 1 - alpha^2 (Eq. 30)."""

    def diffusion(self, t: Tensor) -> Tensor:
        return (self.beta(t) * -torch.expm1(-2 * self.integral(t))).sqrt()

    def std(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.integral(t))

    def time(self, level: Tensor) -> Tensor:
        # (1 - alpha^2) / alpha = level has the root alpha = 2 / (level + sqrt(level^2 + 4)); VP's level at that alpha:
        alpha = 2 / (level + (level**2 + 4).sqrt())
        return self.schedule.time(((1 - alpha) * (1 + alpha)).sqrt() / alpha)


@dataclass(frozen=True)
class EDMSDE(SDE):
    """EDM's choice (Karras et al. 2022; Song et al. 2023, Sec. 2): f = 0, g = sqrt(2 t), std = t."""

    start: float = 80.0
    end: float = 0.002

    def drift(self, z: Tensor, t: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def diffusion(self, t: Tensor) -> Tensor:
        return (2 * t).sqrt()

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def std(self, t: Tensor) -> Tensor:
        return t

    def time(self, level: Tensor) -> Tensor:
        return level

    def levels(self, n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
        """Karras's grid: equidistant times would spend nearly all steps on pure noise."""
        return karras_sigmas(n, sigma_min, sigma_max, rho)


def ve_sde(sigma_min: float, sigma_max: float) -> SDE:
    """Row ve."""
    return VESDE(sigma_min, sigma_max)


def vp_sde(sigma_min: float, sigma_max: float) -> SDE:
    """Row vp, whose range is its own."""
    return VPSDE()


def subvp_sde(sigma_min: float, sigma_max: float) -> SDE:
    """Row subvp, whose range is its own."""
    return SubVPSDE()


def edm_sde(sigma_min: float, sigma_max: float) -> SDE:
    """Row edm."""
    return EDMSDE(sigma_max, sigma_min)


def create_sde(name: str, sigma_min: float = 0.002, sigma_max: float = 80.0) -> SDE:
    """SDE by name: ve, vp, subvp or edm; the range is that of ve and edm."""
    return SDES.load(name)(sigma_min, sigma_max)
