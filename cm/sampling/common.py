"""What all samplers share: the denoiser's call, the walk along the noise levels, the callback."""

from collections.abc import Callable, Iterable
from itertools import pairwise

from torch import Tensor

from cm.diffusion.denoiser import DenoiseFn
from cm.nn import append_dims

Callback = Callable[[dict], None]


def evaluate(denoiser: DenoiseFn, x: Tensor, sigma: Tensor) -> Tensor:
    """D(x; sigma) with one noise level for the whole batch."""
    return denoiser(x, x.new_full(x.shape[:1], float(sigma)))


def to_d(x: Tensor, sigma: Tensor | float, denoised: Tensor) -> Tensor:
    """dx/dsigma = (x - D(x; sigma)) / sigma, the probability-flow ODE (Karras et al. 2022, Eq. 3 with Eq. 1)."""
    if isinstance(sigma, Tensor) and sigma.ndim:
        sigma = append_dims(sigma, x.ndim)
    return (x - denoised) / sigma


def start(x: Tensor) -> Tensor:
    """The sampler's state: float32 at least, whatever the network computes in."""
    return x.float() if x.element_size() < 4 else x


def intervals(sigmas: Tensor, progress: bool) -> Iterable[tuple[int, Tensor, Tensor]]:
    """(i, sigma_i, sigma_i+1) for each step: scalars in the precision of `sigmas`, on the CPU so that none waits."""
    levels = sigmas.cpu()
    if len(levels) < 2 or (levels[1:] > levels[:-1]).any():
        raise ValueError(f"sigmas must be at least two levels that never increase, got {levels.tolist()}")
    steps = [(i, *pair) for i, pair in enumerate(pairwise(levels))]
    if progress:
        from tqdm import tqdm

        return tqdm(steps)
    return steps


def report(
    callback: Callback | None,
    i: int,
    x: Tensor,
    sigma: Tensor,
    denoised: Tensor,
    sigma_hat: Tensor | None = None,
) -> None:
    """Tell the callback about step i: {"i", "x", "sigma", "sigma_hat", "denoised"}.

    x is the denoiser's input, at noise level sigma_hat (sigma, or more with churn).
    """
    if callback is not None:
        hat = sigma if sigma_hat is None else sigma_hat
        callback({"i": i, "x": x, "sigma": sigma, "sigma_hat": hat, "denoised": denoised})
