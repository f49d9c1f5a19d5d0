"""Samplers by name. Each is a function (denoiser, x, sigmas, generator, progress, callback, *, own options) -> x.

A new sampler is one function in a file of this package and one entry in SAMPLERS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cm.diffusion.denoiser import DenoiseFn
from cm.errors import UserError
from cm.sampling.ancestral import sample_euler_ancestral
from cm.sampling.consistency import sample_multistep, sample_onestep, sample_progdist
from cm.sampling.driver import Callback, option_names, own_options
from cm.sampling.general import sample_general
from cm.sampling.levels import GRIDS, grid_levels
from cm.sampling.noise import SampleGenerator
from cm.sampling.ode import sample_dpm, sample_euler, sample_heun
from cm.sampling.predictor_corrector import sample_pc, sample_rk45


@dataclass(frozen=True)
class Sampler:
    """A sampler, the grid of its levels, and its order of convergence where it solves the flow with fixed steps."""

    sample: Callable[..., Tensor]
    grid: str = "karras"
    order: int | None = None


SAMPLERS: dict[str, Sampler] = {
    "heun": Sampler(sample_heun, order=2),
    "dpm": Sampler(sample_dpm, order=2),
    "euler": Sampler(sample_euler, order=1),
    "ancestral": Sampler(sample_euler_ancestral),
    "onestep": Sampler(sample_onestep),
    "progdist": Sampler(sample_progdist, grid="intervals"),
    "multistep": Sampler(sample_multistep, grid="ts"),
    "general": Sampler(sample_general, order=2),
    "pc": Sampler(sample_pc, grid="sde"),
    "rk45": Sampler(sample_rk45),
}


def sampler_sigmas(
    name: str,
    steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    ts: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """The noise levels that sampler `name` walks along, decreasing; options: of its grid, by name."""
    if name not in SAMPLERS:
        raise UserError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    return grid_levels(SAMPLERS[name].grid, steps, sigma_min, sigma_max, rho, {**(options or {}), "ts": ts})


def run_sampler(
    name: str,
    denoiser: DenoiseFn,
    x: Tensor,
    generator: SampleGenerator | None,
    *,
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    ts: Sequence[int] | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    sigmas: Tensor | None = None,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """Sample with the sampler called `name` on its grid, from x of noise level sigma_max.

    sigmas: other levels than `sampler_sigmas` gives, with the last. options by name: the sampler and its grid are given
    those that they take, and others may belong to other samplers.
    """
    options = dict(options or {})
    functions = [row.sample for row in SAMPLERS.values()] + list(GRIDS.values())
    if unknown := options.keys() - set().union(*map(option_names, functions)):
        raise TypeError(f"no sampler has an option {', '.join(sorted(unknown))}")
    if sigmas is None:
        sigmas = sampler_sigmas(name, steps, sigma_min, sigma_max, rho, ts, options)
    sample = SAMPLERS[name].sample
    own = own_options(sample, {"sigma_min": sigma_min, **options})
    return sample(denoiser, x, sigmas, generator, progress, callback, **own)
