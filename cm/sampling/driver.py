"""Samplers as their papers write them: `sampler` turns a generator of steps into a public function.

    @sampler
    def sample_euler(denoise, x, sigmas, generator):
        for sigma, sigma_next in pairwise(sigmas):
            denoised = denoise(x, sigma)
            yield Step(x, sigma, denoised)
            x = x + (sigma_next - sigma) * (x - denoised) / sigma
        return x

The driver owns what all share: no gradients, the state's precision, the check of the levels, one noise level for the
whole batch, progress and callback.
"""

import inspect
from collections.abc import Callable, Generator, Mapping
from functools import partial, update_wrapper
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cm.diffusion.denoiser import DenoiseFn
from cm.runtime.progress import progress as progress_bar
from cm.sampling.noise import DummyGenerator, SampleGenerator

Callback = Callable[[dict[str, Any]], None]
# (x, one noise level for the whole batch) -> D(x; sigma); of a flow map with a second one, where the step ends
Denoise = Callable[..., Tensor]


class Step(NamedTuple):
    """The first evaluation of a step from level sigma: denoised = D(x; sigma_hat); sigma_hat is sigma without churn."""

    x: Tensor
    sigma: Tensor
    denoised: Tensor
    sigma_hat: Tensor | None = None


Walk = Generator[Step, None, Tensor]


def start(x: Tensor) -> Tensor:
    """The sampler's state: float32 at least, whatever the network computes in."""
    return x.float() if x.element_size() < 4 else x


def evaluate(denoiser: DenoiseFn, x: Tensor, *levels: Tensor | float) -> Tensor:
    """D(x; sigma), or a flow map's x^(x; sigma, lower), with one noise level for the whole batch."""
    return denoiser(x, *(filled(x, float(level)) for level in levels))


def filled(x: Tensor, level: float) -> Tensor:
    """(B,) on x's device; its attribute `on_host` spares who asks for the number the way back."""
    sigma = x.new_full(x.shape[:1], level)
    sigma.on_host = level
    return sigma


def sampler(walk: Callable[..., Walk]) -> Callable[..., Tensor]:
    """The public function (denoiser, x, sigmas, generator, progress, callback, *, own options) -> sample.

    walk(denoise, x, sigmas, generator, *, own options) yields a `Step` for each step and returns the sample. Its
    `sigmas` are on the CPU, so that no step waits for a GPU. generator None: torch's global random stream. callback
    receives {"i", "x", "sigma", "sigma_hat", "denoised"} of each step: x is the denoiser's input, at level sigma_hat.
    """
    if not inspect.isgeneratorfunction(walk):
        raise TypeError(f"{walk.__name__} must yield its steps")

    @torch.no_grad()
    def sample(
        denoiser: DenoiseFn,
        x: Tensor,
        sigmas: Tensor,
        generator: SampleGenerator | None = None,
        progress: bool = False,
        callback: Callback | None = None,
        **options: Any,
    ) -> Tensor:
        levels = sigmas.cpu()
        wrong = f"sigmas must be at least two levels that never increase, got {levels.tolist()}"
        if (levels[1:] > levels[:-1]).any():
            raise ValueError(wrong)
        noise = DummyGenerator() if generator is None else generator
        i, result = -1, x

        def steps() -> Generator[Step, None, None]:
            nonlocal result
            result = yield from walk(partial(evaluate, denoiser), start(x), levels, noise, **options)

        bar = progress_bar(steps(), total=len(levels) - 1, desc="sampling", unit="step", enabled=progress)
        for i, step in enumerate(bar):
            if callback is not None:
                hat = step.sigma if step.sigma_hat is None else step.sigma_hat
                callback({**step._asdict(), "i": i, "sigma_hat": hat})
        if i < 0:
            raise ValueError(wrong)
        return result

    call = inspect.signature(sample)
    shared = [p for p in call.parameters.values() if p.kind is not p.VAR_KEYWORD]
    own = list(inspect.signature(walk).parameters.values())[4:]
    update_wrapper(sample, walk)
    sample.__signature__ = call.replace(parameters=[*shared, *(p.replace(kind=p.KEYWORD_ONLY) for p in own)])
    sample.__annotations__ = {p.name: p.annotation for p in sample.__signature__.parameters.values()}
    sample.__annotations__["return"] = Tensor
    return sample


def option_names(function: Callable) -> frozenset[str]:
    """The own options of a sampler or a grid: what it takes by keyword only."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def own_options(function: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that a sampler or a grid takes."""
    return {name: options[name] for name in option_names(function) & options.keys()}
