"""Training and progressive distillation in z = alpha x + sigma e, written as Algorithms 1 and 2 of their paper.

Salimans & Ho 2022. The library computes the same in x + level e; here is what it must equal.
"""

import torch
from torch import Tensor

from cm.diffusion.alpha_sigma import AlphaSigma
from cm.diffusion.denoiser import Denoiser
from cm.nn import append_dims, mean_flat
from cm.objectives.base import Draw, Roles
from cm.objectives.distances import Distance
from cm.objectives.parts import Weight


def predict_x(denoiser: Denoiser, z: Tensor, level: Tensor, schedule: AlphaSigma, **cond: Tensor) -> Tensor:
    """x^(z_t), the clean image predicted from z = alpha x + sigma e."""
    return denoiser(z / append_dims(schedule.alpha(level), z.ndim), level, **cond)


def ddim_step(z: Tensor, x: Tensor, level: Tensor, lower: Tensor, schedule: AlphaSigma) -> Tensor:
    """z_s = alpha_s x + (sigma_s / sigma_t) (z_t - alpha_t x), from `level` to `lower` (Salimans & Ho 2022, Eq. 8)."""
    alpha_t, sigma_t, alpha_s, sigma_s = _coefficients(schedule, z.ndim, level, lower)
    return alpha_s * x + sigma_s / sigma_t * (z - alpha_t * x)


def ddim_target(z: Tensor, z_end: Tensor, level: Tensor, lower: Tensor, schedule: AlphaSigma) -> Tensor:
    """The x for which one DDIM step from z at `level` lands on z_end at `lower` (Salimans & Ho 2022, Algorithm 2).

    x~ = (z'' - (sigma'' / sigma_t) z_t) / (alpha'' - (sigma'' / sigma_t) alpha_t).
    """
    alpha_t, sigma_t, alpha_s, sigma_s = _coefficients(schedule, z.ndim, level, lower)
    ratio = sigma_s / sigma_t
    return (z_end - ratio * z) / (alpha_s - ratio * alpha_t)


def _coefficients(schedule: AlphaSigma, ndim: int, *levels: Tensor) -> list[Tensor]:
    """alpha and sigma of each level, shaped to multiply images."""
    pairs = [(schedule.alpha(level), schedule.alpha(level) * level) for level in levels]
    return [append_dims(value, ndim) for pair in pairs for value in pair]


def diffusion_losses(
    student: Denoiser, x0: Tensor, draw: Draw, schedule: AlphaSigma, weight: Weight, **cond: Tensor
) -> dict[str, Tensor]:
    """w(lambda) mean (x - x^(z_t))^2 per sample, lambda = ln(alpha^2 / sigma^2) (Salimans & Ho 2022, Algorithm 1).

    weight: of the level exp(-lambda / 2); SNR, SNR + 1, max(SNR, 1) and 1 are entries of `cm.diffusion.weightings`.
    Returns loss and xs_mse, each (B,).
    """
    alpha, sigma = _coefficients(schedule, x0.ndim, draw.t)
    prediction = predict_x(student, alpha * x0 + sigma * draw.noise, draw.t, schedule, **cond)
    xs_mse = mean_flat((x0 - prediction) ** 2)
    return {"loss": weight(draw.t) * xs_mse, "xs_mse": xs_mse}


def progressive_losses(
    roles: Roles,
    x0: Tensor,
    draw: Draw,
    t_mid: Tensor,
    schedule: AlphaSigma,
    *,
    distance: Distance,
    weight: Weight,
    **cond: Tensor,
) -> dict[str, Tensor]:
    """w d(x~, x^(z_t)) per sample with x~ from two DDIM steps of the teacher (Salimans & Ho 2022, Algorithm 2)."""
    alpha, sigma = _coefficients(schedule, x0.ndim, draw.t)
    z = alpha * x0 + sigma * draw.noise
    prediction = predict_x(roles.student, z, draw.t, schedule, **cond)
    with torch.no_grad():
        z_mid = ddim_step(z, predict_x(roles.teacher, z, draw.t, schedule, **cond), draw.t, t_mid, schedule)
        z_end = ddim_step(
            z_mid, predict_x(roles.teacher, z_mid, t_mid, schedule, **cond), t_mid, draw.r, schedule
        )
        target = ddim_target(z, z_end, draw.t, draw.r, schedule)
    return {"loss": distance(prediction, target) * weight(draw.t, draw.r)}
