"""Samplers by name. Each is a function (denoiser, x, sigmas, generator, progress, callback, *, own options) -> x."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cm.config.rows import GRIDS, SAMPLERS
from cm.diffusion.denoiser import DenoiseFn
from cm.sampling.driver import Callback, option_names, own_options
from cm.sampling.levels import grid_levels
from cm.sampling.noise import SampleGenerator


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
    functions = [row.load() for row in (*SAMPLERS.values(), *GRIDS.values())]
    if unknown := options.keys() - set().union(*map(option_names, functions)):
        raise TypeError(f"no sampler has an option {', '.join(sorted(unknown))}")
    if sigmas is None:
        sigmas = sampler_sigmas(name, steps, sigma_min, sigma_max, rho, ts, options)
    sample = SAMPLERS.load(name)
    own = own_options(sample, {"sigma_min": sigma_min, "sigma_max": sigma_max, **options})
    return sample(denoiser, x, sigmas, generator, progress, callback, **own)
