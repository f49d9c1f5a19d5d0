"""Samplers of score SDEs: predictor-corrector, and an adaptive solver of the probability flow (Song et al. 2021).

As for all samplers, x = x0 + sigma noise; inside, the state is the SDE's own z = alpha x.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cm.diffusion.denoiser import DenoiseFn
from cm.diffusion.sde import SDE, create_sde
from cm.errors import UserError
from cm.nn import append_dims
from cm.sampling.common import Callback, evaluate, intervals, report, start

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


# --predictor: (sde, z, t, r, score) -> (mean, std) of the state at r
PREDICTORS = {
    "reverse_diffusion": reverse_diffusion,
    "euler_maruyama": euler_maruyama,
    "ancestral": ancestral,
    "none": stay,
}
# --corrector: step size of z + step * score + sqrt(2 step) noise
CORRECTORS = {
    "langevin": langevin_step,
    "annealed_langevin": annealed_langevin_step,
    "none": None,
}


def _named(registry: dict, flag: str, name: str):
    if name not in registry:
        raise UserError(f"--{flag} must be one of {', '.join(registry)}, got {name}")
    return registry[name]


def _edm_sde(sigmas: Tensor) -> SDE:
    positive = sigmas[sigmas > 0]
    return create_sde("edm", positive.min().item(), positive.max().item())


@torch.no_grad()
def sample_pc(
    denoiser: DenoiseFn,
    x: Tensor,
    sigmas: Tensor,
    generator,
    progress: bool = False,
    callback: Callback | None = None,
    *,
    sde: SDE | None = None,
    predictor: str = "reverse_diffusion",
    corrector: str = "langevin",
    corrector_steps: int = 1,
    snr: float = 0.16,
) -> Tensor:
    """Predictor-corrector sampling (Song et al. 2021, Algorithm 1): N (1 + corrector_steps) evaluations.

    At each level of `sigmas`: corrector_steps Langevin steps, then the predictor to the next level. The step to
    0 returns the denoised image, without noise. sigmas: levels of the SDE, such as `sde.levels(...)`, and a
    final 0. sde None: EDM's. snr: ratio of the norms of score and noise in a Langevin step (0.16 for VE on CIFAR-10).
    """
    predict = _named(PREDICTORS, "predictor", predictor)
    step_size = _named(CORRECTORS, "corrector", corrector)
    x = start(x)
    sde = sde or _edm_sde(sigmas)
    for i, sigma, sigma_next in intervals(sigmas.double(), progress):
        t = sde.time(sigma)
        r = sde.time(sigma_next) if sigma_next > 0 else t
        z = sde.alpha(t) * x
        for _ in range(corrector_steps if step_size else 0):
            noise = generator.randn_like(z)
            score = sde.score(evaluate(denoiser, z / sde.alpha(t), sigma), z, t)
            step = step_size(z, score, noise, sde.transition(r, t).scale ** 2, sde.std(t), snr)
            z = z + step * score + (2 * step) ** 0.5 * noise
        x = z / sde.alpha(t)
        denoised = evaluate(denoiser, x, sigma)
        report(callback, i, x, sigma, denoised)
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
    generator=None,
    progress: bool = False,
    callback: Callback | None = None,
    *,
    sde: SDE | None = None,
    tolerance: float = 1e-5,
) -> Tensor:
    """The probability-flow ODE by an adaptive Runge-Kutta method of order 5(4) with relative and absolute tolerance.

    Of `sigmas` only both ends count; an end at 0 is reached by denoising at the lowest positive level, since the ODE is
    singular there. The error is controlled over the whole batch on the CPU: each evaluation costs a transfer.
    """
    from scipy.integrate import solve_ivp

    positive = sigmas[sigmas > 0].double().cpu()
    sde = sde or _edm_sde(sigmas)
    x = start(x)
    first, last = (sde.time(level) for level in (positive[0], positive[-1]))

    def slope(time: float, flat) -> Tensor:
        t = torch.tensor(time, dtype=torch.float64)
        z = torch.from_numpy(flat).reshape(x.shape)
        denoised = evaluate(denoiser, (z / sde.alpha(t)).to(x), sde.level(t)).to(z)
        return sde.flow(z, t, sde.score(denoised, z, t)).numpy().ravel()

    z = (x.double().cpu() * sde.alpha(first)).numpy().ravel()
    solution = solve_ivp(slope, (first.item(), last.item()), z, rtol=tolerance, atol=tolerance, method="RK45")
    if not solution.success:
        raise RuntimeError(f"the ODE solver gave up: {solution.message}")
    x = (torch.from_numpy(solution.y[:, -1]).reshape(x.shape) / sde.alpha(last)).to(x)
    if sigmas[-1] > 0:
        return x
    denoised = evaluate(denoiser, x, positive[-1])
    report(callback, 0, x, positive[-1], denoised)
    return denoised
