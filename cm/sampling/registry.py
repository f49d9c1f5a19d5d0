"""Samplers by name. Each is a function (denoiser, x, sigmas, generator, progress, callback, own options) -> x.

A new sampler is one function in a file of this package and one entry in SAMPLERS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cm.diffusion.denoiser import DenoiseFn, clamped
from cm.errors import UserError
from cm.nn import append_zero
from cm.sampling.ancestral import get_ancestral_step, sample_euler_ancestral
from cm.sampling.common import Callback, to_d
from cm.sampling.consistency import (
    checked_ts,
    sample_multistep,
    sample_onestep,
    sample_progdist,
    stochastic_iterative_sampler,
    ts_to_sigmas,
)
from cm.sampling.general import sample_general
from cm.sampling.ode import sample_dpm, sample_euler, sample_heun
from cm.sampling.predictor_corrector import sample_pc, sample_rk45

__all__ = [
    "SAMPLERS",
    "Sampler",
    "checked_ts",
    "clamped",
    "get_ancestral_step",
    "run_sampler",
    "sample_dpm",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_general",
    "sample_heun",
    "sample_multistep",
    "sample_onestep",
    "sample_pc",
    "sample_progdist",
    "sample_rk45",
    "sampler_sigmas",
    "sampling_grid",
    "stochastic_iterative_sampler",
    "to_d",
    "ts_to_sigmas",
]


@dataclass(frozen=True)
class Sampler:
    """A sampler, how many levels its grid has for N steps (a final 0 comes on top), and the options it reads."""

    sample: Callable[..., Tensor]
    levels: Callable[[int], int] | None  # None: the levels come from grid indices `ts`
    options: tuple[str, ...] = ()


CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")
GENERAL = ("noise_schedule", "state_scale", "order", "alpha", "round_sigma")
PC = ("sde", "predictor", "corrector", "corrector_steps", "snr")

SAMPLERS: dict[str, Sampler] = {
    "heun": Sampler(sample_heun, lambda steps: steps, CHURN),
    "dpm": Sampler(sample_dpm, lambda steps: steps, CHURN),
    "euler": Sampler(sample_euler, lambda steps: steps),
    "ancestral": Sampler(sample_euler_ancestral, lambda steps: steps, ("gradient",)),
    "onestep": Sampler(sample_onestep, lambda steps: steps),
    "progdist": Sampler(sample_progdist, lambda steps: steps + 1),
    "multistep": Sampler(sample_multistep, None, ("sigma_min",)),
    "general": Sampler(sample_general, lambda steps: steps, (*CHURN, *GENERAL)),
    "pc": Sampler(sample_pc, lambda steps: steps, PC),
    "rk45": Sampler(sample_rk45, lambda steps: steps, ("sde", "tolerance")),
}


def sampling_grid(n: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Karras's grid of n levels and a final 0 (Karras et al. 2022, Eq. 5), evaluated in float32.

    `cm.diffusion.grid.karras_sigmas` is the exact grid. Published samples were drawn on this one, whose levels are
    rounded (79.999985 for 80), and runs of one or two steps amplify the difference to 6e-4.
    """
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return append_zero((high + torch.linspace(0, 1, n) * (low - high)) ** rho)


def sampler_sigmas(
    name: str, steps: int, sigma_min: float, sigma_max: float, rho: float, ts: Sequence[int] | None = None
) -> Tensor:
    """The noise levels that sampler `name` walks along, decreasing; the first is sigma_max."""
    if name not in SAMPLERS:
        raise UserError(f"--sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if SAMPLERS[name].levels is None:
        sigmas = ts_to_sigmas(ts, steps, sigma_min, sigma_max, rho)
        if sigmas[0] != sigma_max:
            raise UserError(f"--ts must begin with 0 (sigma_max), where the noise is, got {ts[0]}")
        return sigmas
    if steps < 1:
        raise UserError(f"--steps must be at least 1, got {steps}")
    return sampling_grid(SAMPLERS[name].levels(steps), sigma_min, sigma_max, rho)


def run_sampler(
    name: str,
    denoiser: DenoiseFn,
    x: Tensor,
    generator,
    *,
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    ts: Sequence[int] | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    progress: bool = False,
    callback: Callback | None = None,
    sigmas: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """Sample with the sampler called `name` on Karras's grid, from x of noise level sigma_max.

    sigmas: other levels than `sampler_sigmas` gives, with their final 0. options: more of the sampler's own options by
    name. A sampler is given the options that its entry in SAMPLERS lists; it does not read the others.
    """
    if sigmas is None:
        sigmas = sampler_sigmas(name, steps, sigma_min, sigma_max, rho, ts)
    known = {
        **(options or {}),
        "s_churn": s_churn,
        "s_tmin": s_tmin,
        "s_tmax": s_tmax,
        "s_noise": s_noise,
        "sigma_min": sigma_min,
    }
    own = {key: known[key] for key in SAMPLERS[name].options if key in known}
    return SAMPLERS[name].sample(denoiser, x, sigmas, generator, progress, callback, **own)
