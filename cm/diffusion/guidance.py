"""Guidance of a denoiser: by its own prediction without a class, by a weaker model, or by a classifier.

**Two predictions.** D_w = B + w (D - B) goes beyond what tells D from a baseline B: at w = 1 it is D, at w = 0 it is B.
Classifier-free guidance (Ho & Salimans 2022) has the same network without the class as B; autoguidance (Karras et al.
2024) a smaller or less trained one. It may act within an interval of noise levels only (Kynkaanniemi et al. 2024).

**A classifier** of noisy images (Dhariwal & Nichol 2021, section 4) gives, in x = x0 + sigma noise,
D + sigma^2 s grad log p(y | x; sigma), which adds s grad log p(y | x) to the score: by Bayes' rule the same with w = s,
the conditional model as D and D as B. With the noise prediction e = (x - D) / sigma it reads e - sigma s grad log p:
Algorithm 2 (DDIM), whose sqrt(1 - abar) and gradient refer to the state sqrt(abar) x. Algorithm 1 (ancestral) shifts
the mean of each step by its variance times the gradient instead: see `cm.sampling.ancestral`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cm.config.parsing import Guidance
from cm.diffusion.denoiser import DenoiseFn, Denoiser, Gradient
from cm.diffusion.paths import LINEAR
from cm.nn import NO_CLASS, append_dims


def guided(denoiser: DenoiseFn, gradient: Gradient) -> DenoiseFn:
    """D + sigma^2 gradient: any sampler of denoisers follows the guided flow."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(x, sigma) + append_dims(sigma.to(x) ** 2, x.ndim) * gradient(x, sigma)

    return denoise


def limited(gradient: Gradient, guidance: Guidance) -> Gradient:
    """The same gradient, and 0 outside the guidance's noise levels."""
    return lambda x, sigma: append_dims(acts(guidance, sigma).to(x), x.ndim) * gradient(x, sigma)


def acts(guidance: Guidance, sigma: Tensor) -> Tensor:
    """Whether it acts at these noise levels, (B,) bool."""
    return (sigma >= guidance.sigma_low) & (sigma <= guidance.sigma_high)


def unconditional(denoiser: Denoiser) -> Denoiser:
    """The denoiser of a class-conditional network that is never told the class."""
    net = denoiser.net
    return replace(
        denoiser, net=lambda x, times, y, **cond: net(x, times, y=torch.full_like(y, NO_CLASS), **cond)
    )


def without_labels(denoiser: Denoiser) -> Denoiser:
    """A denoiser that knows no classes, among others that do: it ignores them."""
    net = denoiser.net
    return replace(denoiser, net=lambda x, times, y=None, **cond: net(x, times, **cond))


def told(denoiser: Denoiser, guidance: Guidance) -> Denoiser:
    """The denoiser of a network that is told its guidance (improved MeanFlow); noise levels become times."""
    net = denoiser.net
    levels = torch.tensor([guidance.sigma_low, min(guidance.sigma_high, 1e9)], dtype=torch.float64)
    inputs = torch.cat([torch.tensor([1 / guidance.low]), LINEAR.time(levels).float()])

    def with_guidance(x: Tensor, times: Tensor, **cond: Tensor) -> Tensor:
        return net(x, times, guidance_inputs=inputs.to(times.device).expand(len(x), -1), **cond)

    return replace(denoiser, net=with_guidance)


@dataclass(frozen=True)
class GuidedDenoiser(Denoiser):
    """D + (w - 1) (D - B) at the noise levels where the guidance acts, D elsewhere.

    A denoiser like any other: a sampler walks along it, a student learns from it. baseline: B, which is given the same
    conditions. lazy: B is not evaluated where no row needs it, at the price of waiting for the device to say so.
    """

    baseline: Denoiser
    guidance: Guidance
    lazy: bool = False

    def raw(
        self, x: Tensor, sigma: Tensor, *, guidance: Tensor | None = None, **cond: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(output, denoised) as of a network that has learned D_w; guidance (B,): scales w of the rows, if drawn."""
        output, denoised = super().raw(x, sigma, **cond)
        x, c = self._scaled(x, sigma)
        inside = acts(self.guidance, sigma.to(x).expand(len(x)))
        if self.lazy and not inside.any():
            return output, denoised
        output = output[:, : x.shape[1]]
        weaker, weaker_denoised = self.baseline.raw(x, sigma, **cond)
        if self.baseline.precond != self.precond:
            weaker = (weaker_denoised - append_dims(c.c_skip, x.ndim) * x) / append_dims(c.c_out, x.ndim)
        scale = self.guidance.low if guidance is None else guidance.to(x)
        beyond = append_dims((scale - 1) * inside.to(x), x.ndim)
        output = output + beyond * (output - weaker[:, : x.shape[1]])
        return output, self._denoised(x, c, output)

    def evaluations(self, sigma: Tensor) -> int:
        """Network evaluations of one call."""
        return 2 if not self.lazy or bool(acts(self.guidance, sigma).any()) else 1
