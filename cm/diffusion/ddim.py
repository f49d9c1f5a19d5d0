"""DDIM, its inverse and aDDIM in x = x0 + t noise (Heek et al. 2024, Multistep Consistency Models).

Their z = alpha x + sigma e is alpha times this x, at t = sigma / alpha; divided by alpha, nothing says which path. A
DDIM step is an Euler step of the flow in t. Shapes: x, denoised (B, C, ...); levels and variances (B,).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cm.nn import append_dims, mean_flat

# (t (B,), squared error (B,) per value of the teacher's prediction) -> x_var (B,)
Variance = Callable[[Tensor, Tensor], Tensor]


def ddim(x: Tensor, denoised: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The point at level r >= 0 on the line from x at level t > 0 to the clean image; x itself where r = t."""
    return denoised + append_dims(r / t, x.ndim) * (x - denoised)


def inverse_ddim(x_r: Tensor, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """The clean image by which `ddim` goes from x_t at level t to x_r at level r < t."""
    ratio = append_dims(r / t, x_t.ndim)
    return (x_r - ratio * x_t) / (1 - ratio)


def addim(x: Tensor, denoised: Tensor, t: Tensor, r: Tensor, x_var: Tensor) -> Tensor:
    """DDIM's step with a longer noise: its square, per image of d values, is r^2 + d / |e|^2 (1 - r/t)^2 x_var.

    A prediction is the mean of the images that x may come from, which is too smooth; x_var (B,) is the variance of one
    value of those. 0 is DDIM. t and r: (B,), or numbers for the whole batch, which stay where they are.
    """
    noise = (x - denoised) / (append_dims(t, x.ndim) if t.ndim else t)
    square = noise.flatten(1).square().sum(1)
    lost = noise[0].numel() / square * (1 - r / t) ** 2 * x_var
    return denoised + append_dims((r**2 + lost).sqrt(), x.ndim) * noise


def of_snr(t: Tensor, error: Tensor | None = None, eta: float = 0.1) -> Tensor:
    """x_var = eta / (2 + SNR): their rule for sampling and distillation."""
    return eta * t**2 / (1 + 2 * t**2)


def of_error(t: Tensor, error: Tensor) -> Tensor:
    """x_var = 0.75 of the squared error that a prediction has, which distillation knows."""
    return 0.75 * error


def none(t: Tensor, error: Tensor) -> Tensor:
    """x_var = 0: DDIM."""
    return torch.zeros_like(t)


def squared_error(prediction: Tensor, x0: Tensor) -> Tensor:
    """(B,) per value."""
    return mean_flat((prediction - x0).square())
