"""Preconditionings: how a raw network F becomes a denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).

A preconditioning is a frozen dataclass that maps noise levels sigma (B,) to four coefficients (B,). It knows no
network. `time_scale` is the network's clock: c_noise = time_scale * ln(sigma) / 4 (1000 for the ADM U-Net with its
sinusoidal embedding, 1 for NCSN++ and DDPM++). The columns VP, VE and iDDPM of EDM's Table 1, and DDPM's
linear schedule, have clocks of their own.
"""

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cm.config.rows import PRECONDS
from cm.diffusion.noise_schedules import (
    VPSchedule,
    ddpm_levels,
    iddpm_levels,
    level_position,
    nearest_level,
)
from cm.errors import UserError

LOWEST = 0.002  # sigma_min of all published models, where a clock that follows ln(sigma) stops


class Coefficients(NamedTuple):
    """c_skip, c_out, c_in, c_noise, each (B,)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Precond(Protocol):
    """What a denoiser asks of its preconditioning."""

    def __call__(self, sigma: Tensor) -> Coefficients:
        """Coefficients at the noise levels sigma (B,)."""

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise levels that the network knows; all of them, unless a preconditioning says otherwise."""
        return sigma

    def smooth(self) -> "Precond":
        """The same on a clock without steps, for functions of all noise levels and their derivatives."""
        return self

    def second(self, sigma: Tensor, lower: Tensor) -> Tensor:
        """The second clock (B,) of a flow map's step from sigma to lower: the first one at lower, as in CTM.

        Levels below 0.002, those of no picture, look like it: ln(lower) has no end at 0.
        """
        return self(lower.clamp_min(LOWEST)).c_noise


def _log_sigma(sigma: Tensor) -> Tensor:
    return sigma.clamp_min(torch.finfo(sigma.dtype).tiny).log()


def _as_stored(level: float, sigma: Tensor) -> Tensor:
    """A level rounded to sigma's dtype. It stays on the CPU: a copy to a GPU would wait for all work under way."""
    return torch.tensor(level, dtype=sigma.dtype)


@dataclass(frozen=True)
class EDMPrecond(Precond):
    """EDM's preconditioning (Karras et al. 2022, Table 1, last column)."""

    sigma_data: float = 0.5
    time_scale: float = 1000.0

    def __call__(self, sigma: Tensor) -> Coefficients:
        variance = sigma**2 + self.sigma_data**2
        return Coefficients(
            c_skip=self.sigma_data**2 / variance,
            c_out=sigma * self.sigma_data / variance.sqrt(),
            c_in=variance.rsqrt(),
            c_noise=self.time_scale * 0.25 * _log_sigma(sigma),
        )


@dataclass(frozen=True)
class ConsistencyPrecond(Precond):
    """Skip parameterisation of a consistency function (Song et al. 2023, Eq. 5 and App. C): D(x; sigma_min) = x.

    c_skip = sd^2 / ((t - eps)^2 + sd^2), c_out = sd (t - eps) / sqrt(sd^2 + t^2). `printed_c_out` puts (t - eps)^2
    under that root, a form in circulation that no released model uses.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    time_scale: float = 1000.0
    printed_c_out: bool = False

    def __call__(self, sigma: Tensor) -> Coefficients:
        edm = EDMPrecond(self.sigma_data, self.time_scale)(sigma)
        # The boundary is sigma_min as this dtype stores it, so that c_out is exactly 0 there.
        shifted = sigma - _as_stored(self.sigma_min, sigma)
        shifted_variance = shifted**2 + self.sigma_data**2
        out_variance = shifted_variance if self.printed_c_out else sigma**2 + self.sigma_data**2
        return edm._replace(
            c_skip=self.sigma_data**2 / shifted_variance,
            c_out=shifted * self.sigma_data / out_variance.sqrt(),
        )


@dataclass(frozen=True)
class PiecewisePrecond(Precond):
    """Free-form parameterisation of a consistency function (Song et al. 2023, Eq. 4).

    D(x; t) = F(c_in x; t) for t > sigma_min and D(x; sigma_min) = x.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    time_scale: float = 1000.0

    def __call__(self, sigma: Tensor) -> Coefficients:
        edm = EDMPrecond(self.sigma_data, self.time_scale)(sigma)
        # Grid points computed in fp32 may miss sigma_min by a rounding error.
        at_boundary = (sigma <= self.sigma_min * (1 + 1e-6)).to(sigma.dtype)
        return edm._replace(c_skip=at_boundary, c_out=1 - at_boundary)


@dataclass(frozen=True)
class VPPrecond(Precond):
    """Preconditioning of score SDE's VP models (Karras et al. 2022, Table 1, column VP): F predicts the noise.

    D = x - sigma F(x / sqrt(sigma^2 + 1); (M - 1) t(sigma)).
    """

    schedule: VPSchedule = field(default_factory=VPSchedule)
    num_levels: int = 1000

    def __call__(self, sigma: Tensor) -> Coefficients:
        return _predicts_noise(sigma, (self.num_levels - 1) * self.schedule.time(sigma))


@dataclass(frozen=True)
class VEPrecond(Precond):
    """Preconditioning of score SDE's VE models (Karras et al. 2022, Table 1, column VE).

    D = x + sigma F(x; ln(sigma / 2)): the network sees images of standard deviation up to sigma_max. `time_scale`
    multiplies the clock, for networks whose embedding wants a faster one than NCSN++.
    """

    time_scale: float = 1.0

    def __call__(self, sigma: Tensor) -> Coefficients:
        ones = torch.ones_like(sigma)
        return Coefficients(
            c_skip=ones, c_out=sigma, c_in=ones, c_noise=self.time_scale * (_log_sigma(sigma) - math.log(2))
        )


@dataclass(frozen=True)
class IDDPMPrecond(Precond):
    """Preconditioning of improved DDPM's models (Karras et al. 2022, Table 1, column iDDPM + DDIM).

    D = x - sigma F(x / sqrt(sigma^2 + 1); M - 1 - argmin_j |u_j - sigma|) with the M levels u_j it was trained on.
    """

    num_levels: int = 1000
    c1: float = 0.001
    c2: float = 0.008
    interpolated: bool = False  # between the levels the clock follows ln(sigma) instead of standing still

    def __call__(self, sigma: Tensor) -> Coefficients:
        levels = self._levels(sigma)
        index = (level_position if self.interpolated else nearest_level)(levels, sigma)
        return _predicts_noise(sigma, (self.num_levels - 1 - index).to(sigma.dtype))

    def smooth(self) -> Precond:
        """Equal at the levels, linear in ln(sigma) between them."""
        return replace(self, interpolated=True)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest trained level u_j; 0 stays 0."""
        if self.interpolated:
            return sigma
        levels = self._levels(sigma)
        nearest = levels[nearest_level(levels, sigma)].to(sigma.dtype)
        return torch.where(sigma > 0, nearest, sigma)

    def _levels(self, sigma: Tensor) -> Tensor:
        return iddpm_levels(self.num_levels, self.c1, self.c2, sigma.device)


@dataclass(frozen=True)
class DDPMPrecond(IDDPMPrecond):
    """The same on the levels of DDPM's linear schedule: c_noise is the discrete time, 0 for the least noise."""

    def _levels(self, sigma: Tensor) -> Tensor:
        return ddpm_levels(self.num_levels, sigma.device)


@dataclass(frozen=True)
class TrigFlowPrecond(Precond):
    """A TrigFlow network F(x_t / sigma_data, t) in x = x0 + sigma noise (Lu & Song 2025, section 3.1).

    t = arctan(sigma / sigma_data) and x_t = cos(t) x, so D = cos(t) x_t - sin(t) sigma_data F.
    """

    sigma_data: float = 0.5

    def __call__(self, sigma: Tensor) -> Coefficients:
        edm = EDMPrecond(self.sigma_data)(sigma)
        return edm._replace(c_out=-edm.c_out, c_noise=torch.atan(sigma / self.sigma_data))


@dataclass(frozen=True)
class FlowPrecond(Precond):
    """A network of the linear path z = (1 - t) x0 + t n, which predicts a velocity (Lipman et al. 2023; MeanFlow).

    t = sigma / (1 + sigma) is its clock and z = (1 - t) x its input; D = z - t F. The second clock is t - r.
    """

    def __call__(self, sigma: Tensor) -> Coefficients:
        scale = 1 / (1 + sigma)
        t = sigma / (1 + sigma)
        return Coefficients(c_skip=scale, c_out=-t, c_in=scale, c_noise=t)

    def second(self, sigma: Tensor, lower: Tensor) -> Tensor:
        return (sigma - lower) / ((1 + sigma) * (1 + lower))


def _predicts_noise(sigma: Tensor, c_noise: Tensor) -> Coefficients:
    """x0 = x - sigma F(x / sqrt(sigma^2 + 1)): the input has unit variance if the data have."""
    return Coefficients(
        c_skip=torch.ones_like(sigma), c_out=-sigma, c_in=(sigma**2 + 1).rsqrt(), c_noise=c_noise
    )


@dataclass(frozen=True)
class BoundaryPrecond(Precond):
    """A consistency function on the network of another column: its input and clock, Eq. 5's skip and output.

    D = x -+ sigma F multiplies the network's error by sigma, up to 80; a sampler of many steps forgives that, one step
    does not. So c_skip and c_out are those of ConsistencyPrecond, with the column's sign of F: near sigma_min the
    function is the column's denoiser, and a student may start from the weights of a teacher of that column.
    """

    base: Precond
    boundary: ConsistencyPrecond

    def __call__(self, sigma: Tensor) -> Coefficients:
        base, boundary = self.base(sigma), self.boundary(sigma)
        return base._replace(c_skip=boundary.c_skip, c_out=base.c_out.sign() * boundary.c_out)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """As the column does."""
        return self.base.round_sigma(sigma)


def vp_column(sigma_data: float, time_scale: float) -> Precond:
    """Row vp; it has a clock of its own and assumes unit variance."""
    return VPPrecond()


def ve_column(sigma_data: float, time_scale: float) -> Precond:
    """Row ve. The EDM column's clock runs at time_scale / 4 per unit of ln(sigma); NCSN++, with 1, has its own here."""
    return VEPrecond(max(time_scale / 4, 1.0))


def trigflow_column(sigma_data: float, time_scale: float) -> Precond:
    """Row trigflow; its clock is t itself."""
    return TrigFlowPrecond(sigma_data)


def flow_column(sigma_data: float, time_scale: float) -> Precond:
    """Row flow; its clock is t itself."""
    return FlowPrecond()


def iddpm_column(sigma_data: float, time_scale: float) -> Precond:
    """Row iddpm; its clock counts the levels that it was trained on."""
    return IDDPMPrecond()


def ddpm_column(sigma_data: float, time_scale: float) -> Precond:
    """Row ddpm; its clock counts the levels that it was trained on."""
    return DDPMPrecond()


def denoiser_precond(name: str, *, sigma_data: float = 0.5, time_scale: float = 1000.0) -> Precond:
    """Preconditioning of a denoiser by its row of PRECONDS: edm, vp, ve, iddpm, ddpm ..."""
    return PRECONDS.load(name)(sigma_data, time_scale)


def boundary_precond(
    boundary: str,
    *,
    sigma_data: float,
    sigma_min: float,
    time_scale: float,
    printed_c_out: bool = False,
    column: str = "edm",
) -> Precond:
    """Preconditioning of a consistency function by name: `skip` (Eq. 5), `piecewise` (Eq. 4) or `zero`.

    zero is skip with its boundary at 0, EDM's own scalings: the function is a denoiser's whatever the noise level.
    column: the scalings that it starts from, a name of PRECONDS; others than edm have one form, which skips.
    """
    at_zero = boundary == "zero"
    skip = ConsistencyPrecond(sigma_data, 0.0 if at_zero else sigma_min, time_scale, printed_c_out)
    if column != "edm" and boundary in ("skip", "zero"):
        base = denoiser_precond(column, sigma_data=sigma_data, time_scale=time_scale)
        return BoundaryPrecond(base.smooth() if at_zero else base, skip)
    if column != "edm":
        raise UserError(f"--boundary {boundary} goes with --precond edm, not with {column}")
    if boundary in ("skip", "zero"):
        return skip
    if boundary == "piecewise":
        return PiecewisePrecond(sigma_data, sigma_min, time_scale)
    raise UserError(f"--boundary must be skip, piecewise or zero, got {boundary}")
