"""Samplers of score SDEs: predictor-corrector, and an adaptive solver of the probability flow (Song et al. 2021).

As for all samplers, x = x0 + sigma noise; inside, the state is the SDE's own z = alpha x.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from cm.config.choices import CORRECTORS, PREDICTORS
from cm.diffusion.denoiser import DenoiseFn
from cm.diffusion.sde import SDE, create_sde
from cm.nn import append_dims
from cm.sampling.driver import Callback, Denoise, Step, Walk, evaluate, sampler, start
from cm.sampling.noise import SampleGenerator
from cm.sampling.runge_kutta import solve_rk45

Score = Callable[[Tensor], Tensor]


def euler_maruyama(sde: SDE, z: Tensor, t: Tensor, r: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std) of one step of the reverse SDE from t to r < t with frozen coefficients."""
    return z + sde.reverse_drift(z, t, score) * (r - t), sde.diffusion(t) * (t - r).sqrt()


def reverse_diffusion(sde: SDE, z: Tensor, t: Tensor, r: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std) of the reverse of the discrete forward step (App. E; Algorithms 2 and 3 for VE and VP).

    VE: z + (sigma_t^2 - sigma_r^2) score; VP: (2 - sqrt(1 - beta)) z + beta score.
    """
    scale, variance = sde.transition(r, t)
    return (2 - scale) * z + variance * score, variance.sqrt()


def ancestral(sde: SDE, z: Tensor, t: Tensor, r: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, std) of z(r) given z(t) and x0 = the denoised image (App. F; for VP: Ho et al. 2020 with beta-tilde)."""
    scale, variance = sde.transition(r, t)
    return (z + variance * score) / scale, variance.sqrt() * sde.std(r) / sde.std(t)


def stay(sde: SDE, z: Tensor, t: Tensor, r: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """No step: the corrector alone moves the state."""
    return z, torch.zeros_like(t)


def langevin_step(z: Tensor, score: Tensor, noise: Tensor, alpha: Tensor, std: Tensor, snr: float) -> Tensor:
    """Step size 2 alpha (snr |noise| / |score|)^2 (Algorithms 4 and 5), one for each image.

    The published code averages both norms over the batch; taken per image, no sample depends on its neighbours. alpha
    and std are scalars on the CPU, which a GPU's kernels take without a copy to wait for.
    """
    norms = [v.flatten(1).norm(dim=1) for v in (noise, score)]
    return append_dims(2 * alpha.to(z.dtype) * (snr * norms[0] / norms[1]) ** 2, z.ndim)


def annealed_langevin_step(
    z: Tensor, score: Tensor, noise: Tensor, alpha: Tensor, std: Tensor, snr: float
) -> Tensor:
    """Step size 2 alpha (snr std)^2 (Song & Ermon 2019)."""
    return (2 * alpha * (snr * std) ** 2).to(z.dtype)


# Stands for no step size among CORRECTORS
NO_CORRECTION = None


def _edm_sde(sigmas: Tensor) -> SDE:
    positive = sigmas[sigmas > 0]
    return create_sde("edm", positive.min().item(), positive.max().item())


@sampler
def sample_pc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    generator: SampleGenerator,
    *,
    sde: SDE | None = None,
    predictor: str = "reverse_diffusion",
    corrector: str = "langevin",
    corrector_steps: int = 1,
    snr: float = 0.16,
) -> Walk:
    """Predictor-corrector sampling (Song et al. 2021, Algorithm 1): N (1 + corrector_steps) evaluations.

    At each level of `sigmas`: corrector_steps Langevin steps, then the predictor to the next level. The step to
    0 returns the denoised image, without noise. sigmas: levels of the SDE, such as `sde.levels(...)`, and a
    final 0. sde None: EDM's. snr: ratio of the norms of score and noise in a Langevin step (0.16 for VE on CIFAR-10).
    """
    predict = PREDICTORS.load(predictor)
    step_size = CORRECTORS.load(corrector)
    sde = sde or _edm_sde(sigmas)
    for sigma, sigma_next in pairwise(sigmas.double()):
        t = sde.time(sigma)
        r = sde.time(sigma_next) if sigma_next > 0 else t
        z = sde.alpha(t) * x
        for _ in range(corrector_steps if step_size else 0):
            noise = generator.randn_like(z)
            score = sde.score(denoise(z / sde.alpha(t), sigma), z, t)
            step = step_size(z, score, noise, sde.transition(r, t).scale ** 2, sde.std(t), snr)
            z = z + step * score + (2 * step) ** 0.5 * noise
        x = z / sde.alpha(t)
        denoised = denoise(x, sigma)
        yield Step(x, sigma, denoised)
        if sigma_next > 0:
            mean, std = predict(sde, z, t, r, sde.score(denoised, z, t))
            x = (mean + std * generator.randn_like(z)) / sde.alpha(r)
        else:
            x = denoised
    return x


@torch.no_grad()
def sample_rk45(
    denoiser: DenoiseFn,
    x: Tensor,
    sigmas: Tensor,
    generator: SampleGenerator | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    *,
    sde: SDE | None = None,
    tolerance: float = 1e-5,
) -> Tensor:
    """The probability-flow ODE by an adaptive Runge-Kutta method of order 5(4) with relative and absolute tolerance.

    Of `sigmas` only both ends count; an end at 0 is reached by denoising at the lowest positive level, since the ODE is
    singular there. Every image has steps of its own, so that none depends on its neighbours.
    """
    positive = sigmas[sigmas > 0].double().cpu()
    sde = sde or _edm_sde(positive)
    x = start(x)
    first, last = (sde.time(level) for level in (positive[0], positive[-1]))

    def slope(t: Tensor, flat: Tensor) -> Tensor:
        z, times = flat.reshape(x.shape), append_dims(t, x.ndim)
        denoised = denoiser((z / sde.alpha(times)).to(x), sde.level(t).to(x)).to(z)
        return sde.flow(z, times, sde.score(denoised, z, times)).flatten(1)

    z = x.double() * sde.alpha(first)
    z = solve_rk45(slope, first.item(), last.item(), z.flatten(1), rtol=tolerance, atol=tolerance).y
    x = (z.reshape(x.shape) / sde.alpha(last)).to(x)
    if sigmas[-1] > 0:
        return x
    denoised = evaluate(denoiser, x, positive[-1])
    if callback is not None:
        callback({"i": 0, "x": x, "sigma": positive[-1], "sigma_hat": positive[-1], "denoised": denoised})
    return denoised
