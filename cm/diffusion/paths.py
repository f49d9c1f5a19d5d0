"""Paths from images to noise, and what networks on them predict: one adapter instead of one loss per convention.

A path is z_t = alpha(t) x0 + beta(t) n with unit noise n. All paths here are the same points in other units: the noise
level sigma = beta / alpha and x = z / alpha are the state x0 + sigma n of this library, and a DDIM step lands on the
same point on each. So every prediction about the flow from (z, t) to the level of r is a linear function of one clean
image x^ by which that step would go,

    Phi(z, t, r) = alpha_r x^ + beta_r / beta_t (z - alpha_t x^),

which is the denoiser D for r = t and the consistency function f for r = 0.

| prediction | is | found in |
|---|---|---|
| clean | x^ itself: D, f, g of G = (r/t) x + (1 - r/t) g | EDM, CM, CTM, VP's DDIM |
| noise | n^ = (z - alpha_t x^) / beta_t | DDPM |
| velocity | alpha'_t x^ + beta'_t n^, at r = t dz/dt | flow matching, v-prediction |
| trigflow | velocity / sigma_data on the trigonometric path | sCM |
| endpoint | Phi(z, t, r) | flow maps |
| average_velocity | u = (z - Phi) / (t - r), at r = t the velocity | MeanFlow |
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cm.nn import append_dims


class Path:
    """alpha(t), beta(t), their derivatives, and the time of a noise level; all of tensors (B,).

    straight: alpha and beta are linear in t, so that a DDIM step has one velocity from its start to its end.
    """

    straight = False

    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the clean image."""
        raise NotImplementedError

    def beta(self, t: Tensor) -> Tensor:
        """Factor of the unit noise."""
        raise NotImplementedError

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha', beta')."""
        raise NotImplementedError

    def time(self, sigma: Tensor) -> Tensor:
        """t at which beta / alpha = sigma."""
        raise NotImplementedError

    def level(self, t: Tensor) -> Tensor:
        """sigma = beta / alpha."""
        return self.beta(t) / self.alpha(t)


@dataclass(frozen=True)
class EdmPath(Path):
    """z = x0 + t n (Karras et al. 2022)."""

    straight = True

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def beta(self, t: Tensor) -> Tensor:
        return t

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def time(self, sigma: Tensor) -> Tensor:
        return sigma


@dataclass(frozen=True)
class LinearPath(Path):
    """z = (1 - t) x0 + t n (Lipman et al. 2023, Liu et al. 2023)."""

    straight = True

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def beta(self, t: Tensor) -> Tensor:
        return t

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time(self, sigma: Tensor) -> Tensor:
        return sigma / (1 + sigma)


@dataclass(frozen=True)
class CosinePath(Path):
    """z = cos(speed t) x0 + sin(speed t) scale n: TrigFlow (speed 1, scale sigma_data) and VP's cosine (pi/2, 1)."""

    speed: float = 1.0
    scale: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self.speed * t)

    def beta(self, t: Tensor) -> Tensor:
        return self.scale * torch.sin(self.speed * t)

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -self.speed * torch.sin(self.speed * t), self.speed * self.scale * torch.cos(self.speed * t)

    def time(self, sigma: Tensor) -> Tensor:
        return torch.atan(sigma / self.scale) / self.speed


EDM, LINEAR, VP_COSINE = EdmPath(), LinearPath(), CosinePath(math.pi / 2)


def trigonometric(sigma_data: float = 0.5) -> CosinePath:
    """TrigFlow's path."""
    return CosinePath(1.0, sigma_data)


def change_path(z: Tensor, t: Tensor, source: Path, target: Path) -> tuple[Tensor, Tensor]:
    """(z, t) of the same point on another path; z (B, C, ...), t (B,) with alpha(t) > 0."""
    moved = target.time(source.level(t))
    return z * append_dims(target.alpha(moved) / source.alpha(t), z.ndim), moved


@dataclass(frozen=True)
class Prediction:
    """A kind of prediction as value = a x^ + b z, with a and b (B,) of (path, t, r)."""

    coefficients: Callable[[Path, Tensor, Tensor], tuple[Tensor, Tensor]]

    def of_clean(self, clean: Tensor, z: Tensor, t: Tensor, r: Tensor, path: Path) -> Tensor:
        """The value that belongs to x^ (B, C, ...) at (z, t), for the step to r."""
        a, b = (append_dims(c, z.ndim) for c in self.coefficients(path, t, r))
        return a * clean + b * z

    def to_clean(self, value: Tensor, z: Tensor, t: Tensor, r: Tensor, path: Path) -> Tensor:
        """x^ that belongs to a value; not defined where the value says nothing of it (endpoint at r = t)."""
        a, b = (append_dims(c, z.ndim) for c in self.coefficients(path, t, r))
        return (value - b * z) / a


def _clean(path: Path, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(t), torch.zeros_like(t)


def _noise(path: Path, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return -path.alpha(t) / path.beta(t), 1 / path.beta(t)


def _velocity(path: Path, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    alpha_slope, beta_slope = path.slopes(t)
    speed = beta_slope / path.beta(t)
    return alpha_slope - speed * path.alpha(t), speed


def _trigflow(path: CosinePath, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    a, b = _velocity(path, t, r)
    return a / path.scale, b / path.scale


def _endpoint(path: Path, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    ratio = path.beta(r) / path.beta(t)
    return path.alpha(r) - ratio * path.alpha(t), ratio


def _average_velocity(path: Path, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    if path.straight:  # so that no digits are lost where r is close to t
        return _velocity(path, t, r)
    a, b = _endpoint(path, t, r)
    gap = t - r
    pairs = zip((-a / gap, (1 - b) / gap), _velocity(path, t, r))
    of_clean, of_z = (torch.where(gap == 0, at_once, mean) for mean, at_once in pairs)
    return of_clean, of_z


PREDICTIONS: dict[str, Prediction] = {
    "clean": Prediction(_clean),
    "noise": Prediction(_noise),
    "velocity": Prediction(_velocity),
    "trigflow": Prediction(_trigflow),
    "endpoint": Prediction(_endpoint),
    "average_velocity": Prediction(_average_velocity),
}


def convert(
    value: Tensor,
    z: Tensor,
    t: Tensor,
    r: Tensor,
    source: tuple[Path, str],
    target: tuple[Path, str],
) -> Tensor:
    """A prediction of one network as that of another: (path, kind) to (path, kind), z, t and r on the source's path.

    value and z: (B, C, ...); t > 0 and r (B,). float64 keeps it exact to 1e-12 in both directions.
    """
    (path, kind), (other, wanted) = source, target
    clean = PREDICTIONS[kind].to_clean(value, z, t, r, path)
    moved, time = change_path(z, t, path, other)
    return PREDICTIONS[wanted].of_clean(clean, moved, time, other.time(path.level(r)), other)
