"""The adaptive Runge-Kutta method of order 5(4) of Dormand & Prince (1980), with steps of its own for every image.

Tolerances, error norm (root mean square), first step and step-size rule are those of scipy's RK45, for each image
alone, but step sizes are rounded down to powers of 2^(1/4). So no image depends on its neighbours: batches differ in
their rounding, which an unrounded step size feeds back until a stiff flow ends 1e-2 elsewhere. Images are evaluated
together; one that has arrived stays where it is until all have. Shapes: times (B,), states (B, D), both float64.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cm.errors import UserError

# Row i: weights of the slopes before stage i + 1, which is taken at C[i] of the step. The last row gives the new state.
A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
# The new state minus that of order 4
E = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
RUNGS = 4  # step sizes between one and twice as much

Slope = Callable[[Tensor, Tensor], Tensor]  # (t, y) -> dy/dt


class Solution(NamedTuple):
    """y (B, D) float64 at the end; nfe (B,) int64: the evaluations that each image needed."""

    y: Tensor
    nfe: Tensor


@torch.no_grad()
def solve_rk45(slope: Slope, start: float, end: float, y: Tensor, *, rtol: float, atol: float) -> Solution:
    """Solve dy/dt = slope(t, y) from y at `start` to `end`, which may lie on either side.

    A step is taken if the error estimate's root mean square, in units of atol + rtol |y|, is below 1. UserError
    where an image needs steps too small for its time's precision.
    """
    y = y.double()
    sign = math.copysign(1.0, end - start)
    t, final, beyond = (y.new_full(y.shape[:1], time) for time in (start, end, sign * math.inf))
    f = slope(t, y).double()
    rung = torch.floor(RUNGS * _first_step(slope, t, y, f, end - start, rtol, atol).log2())
    nfe = torch.full_like(t, 2, dtype=torch.int64)
    rejected = torch.zeros_like(t, dtype=torch.bool)
    while (under_way := t != end).any():
        left = (final - t).abs()
        rung = torch.minimum(rung, torch.ceil(RUNGS * left.log2()))
        h = torch.exp2(rung / RUNGS)
        too_small = ~(h >= 10 * (torch.nextafter(t, beyond) - t).abs())
        if (stuck := under_way & too_small).any():
            i = int(stuck.nonzero()[0])
            why = "it needs too small steps" if f[i].isfinite().all() else "the slope is not finite"
            raise UserError(
                f"the ODE solver gave up on image {i} of the batch: {why} at time {t[i].item():g}"
            )
        t_new = torch.where(h < left, t + sign * h, final)
        step = (t_new - t)[:, None]
        k = [f]
        for c, weights in zip(C, A, strict=True):
            y_new = y + step * _sum(weights, k)
            k.append(slope(t + c * step[:, 0], y_new).double())
        scale = atol + rtol * torch.maximum(y.abs(), y_new.abs())
        error = _rms(step * _sum(E, k) / scale)
        # A slope that is not finite is no estimate: the step is rejected and shrinks until the check above names it.
        error = torch.where(error.isnan(), math.inf, error)
        accepted = under_way & (error < 1)
        factor = (SAFETY * error ** (-1 / 5)).clamp(SHRINK, GROW)
        rung = rung + torch.floor(RUNGS * torch.where(rejected, factor.clamp(max=1), factor).log2())
        nfe += 6 * under_way
        t = torch.where(accepted, t_new, t)
        y, f = torch.where(accepted[:, None], y_new, y), torch.where(accepted[:, None], k[-1], f)
        rejected = ~accepted
    return Solution(y, nfe)


def _first_step(
    slope: Slope, t: Tensor, y: Tensor, f: Tensor, length: float, rtol: float, atol: float
) -> Tensor:
    """Sizes of the first steps (B,) (Hairer, Norsett & Wanner 1993, section II.4), as scipy chooses them."""
    scale = atol + rtol * y.abs()
    d0, d1 = _rms(y / scale), _rms(f / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).clamp(max=abs(length))
    step = math.copysign(1.0, length) * h0
    d2 = _rms((slope(t + step, y + step[:, None] * f).double() - f) / scale) / h0
    largest = torch.maximum(d1, d2)
    h1 = torch.where(largest <= 1e-15, (1e-3 * h0).clamp(min=1e-6), (0.01 / largest) ** (1 / 5))
    return torch.minimum(100 * h0, h1).clamp(max=abs(length))


def _sum(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    return sum(w * k for w, k in zip(weights, slopes, strict=True) if w)


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(1).sqrt()
