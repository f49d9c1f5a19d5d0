"""The general sampler of EDM's ablations: any noise schedule, scale of the state, and second-order rule."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from cm.config.choices import NOISE_SCHEDULES, STATE_SCALES
from cm.errors import UserError
from cm.sampling.driver import Denoise, Step, Walk, sampler
from cm.sampling.noise import SampleGenerator
from cm.sampling.ode import churn


@sampler
def sample_general(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    generator: SampleGenerator,
    *,
    noise_schedule: str = "linear",
    state_scale: str = "none",
    order: int = 2,
    alpha: float = 1.0,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    round_sigma: Callable[[Tensor], Tensor] = lambda sigma: sigma,
    sigma_min: float = 0.0,
    sigma_max: float = 0.0,
) -> Walk:
    """Solve dz/dt = (sigma'/sigma + s'/s) z - (sigma' s / sigma) D(z / s; sigma) (Karras et al. 2022, Algorithm 3).

    noise_schedule gives sigma(t) and state_scale s(t); the steps are those times at which sigma(t) is in `sigmas`, so
    that the same levels are joined by other curves. order 1 is Euler's method. In order 2 the slopes at t and at
    t + alpha h count 1 - 1/(2 alpha) and 1/(2 alpha): alpha 1 is Heun's rule, 1/2 the midpoint rule, 2/3 Ralston's. The
    step to sigma = 0 is an Euler step. round_sigma: to the levels that the network knows, for churn's; `sigmas` come
    rounded. sigma_min, sigma_max: the range that the curve vp is derived from (0: the ends of `sigmas`), as EDM's
    ablation does it. x has noise level sigmas[0] and is not scaled; nor is the sample.
    """
    if order not in (1, 2) or not 0 < alpha <= 1:
        raise UserError(f"order must be 1 or 2 and alpha in (0, 1], got {order} and {alpha}")
    ends = sigma_min or sigmas[sigmas > 0].min().item(), sigma_max or sigmas.max().item()
    schedule, scaling = NOISE_SCHEDULES.load(noise_schedule)(*ends), STATE_SCALES.load(state_scale)()

    def slope(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(dz/dt, denoised) at time t."""
        sigma, sigma_deriv = schedule.sigma(t), schedule.sigma_deriv(t)
        s, s_deriv = scaling.scale(sigma), scaling.scale_deriv(sigma, sigma_deriv)
        denoised = denoise(z / s, sigma)
        return (sigma_deriv / sigma + s_deriv / s) * z - sigma_deriv * s / sigma * denoised, denoised

    steps = len(sigmas) - 1
    for sigma, sigma_next in pairwise(sigmas.double()):
        x, sigma_hat = churn(x, sigma, generator, steps, s_churn, s_tmin, s_tmax, s_noise, round_sigma)
        t, t_next = schedule.time(sigma_hat), schedule.time(sigma_next)
        z, h = scaling.scale(sigma_hat) * x, t_next - t
        d, denoised = slope(z, t)
        yield Step(x, sigma, denoised, sigma_hat)
        if order == 2 and sigma_next > 0:
            d_inner, _ = slope(z + alpha * h * d, t + alpha * h)
            d = (1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_inner
        x = (z + h * d) / scaling.scale(sigma_next)
    return x
