"""Zero-shot editing with a consistency model (Song et al. 2023, Algorithm 4): one loop, and linear measurements.

A task is a `LinearEdit`: what is known of an image is A x where the mask is 1. A new task is one such value:

    channel = LinearEdit(mask=torch.tensor([1.0, 0, 0])[:, None, None])     # red is known, green and blue are not

Shapes: images (B, C, H, W) in [-1, 1], any resolution, floating type and device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cm.diffusion.denoiser import DenoiseFn
from cm.sampling.consistency import sample_multistep
from cm.sampling.driver import Callback, start
from cm.sampling.noise import SampleGenerator

LUMA = (0.2989, 0.5870, 0.1140)


def identity(x: Tensor) -> Tensor:
    """x itself: the transform of tasks that are stated in pixels."""
    return x


@dataclass(frozen=True)
class LinearEdit:
    """A measurement of images: the coefficients A x are known where `mask` is 1 and generated where it is 0.

    A (`transform`) is linear and invertible. Where it is orthogonal, replacing the known coefficients changes an image
    as little as possible. `mask` broadcasts against A x. `fill` stands for unknown coefficients in pictures of the
    measurement; it has no effect on results.
    """

    mask: Tensor
    transform: Callable[[Tensor], Tensor] = identity
    inverse: Callable[[Tensor], Tensor] = identity
    fill: float = 0.0

    def project(self, images: Tensor, generated: Tensor) -> Tensor:
        """`generated` with its known coefficients replaced by those of `images`."""
        mask = self.mask.to(generated)
        return self.inverse(mask * self.transform(images) + (1 - mask) * self.transform(generated))

    def measure(self, images: Tensor) -> Tensor:
        """The images with every unknown coefficient set to 0: all that the task knows."""
        return self.inverse(self.mask.to(images) * self.transform(images))

    def picture(self, images: Tensor) -> Tensor:
        """The images as the task sees them, unknown coefficients shown as `fill`."""
        mask = self.mask.to(images)
        return self.inverse(mask * self.transform(images) + (1 - mask) * self.fill)


def reflect(x: Tensor, axis: Tensor) -> Tensor:
    """Householder reflection of the last dimension that exchanges the unit vector `axis` and the first basis vector.

    Orthogonal, symmetric and its own inverse; the first coefficient of the result is <axis, x>. O(n) per vector, so
    that no n x n matrix is ever made. axis (n,) with axis[0] < 1.
    """
    axis = axis.to(x)
    first = x[..., :1]
    along = (x * axis).sum(-1, keepdim=True)
    rest = x[..., 1:] - axis[1:] * ((along - first) / (1 - axis[0]))
    return torch.cat([along, rest], dim=-1)


def luma(x: Tensor) -> Tensor:
    """0.2989 R + 0.5870 G + 0.1140 B of (B, 3, H, W) as grey images of three equal channels."""
    weights = torch.tensor(LUMA, dtype=x.dtype, device=x.device)
    return ((x.movedim(1, -1) @ weights) / weights.sum())[:, None].expand_as(x)


def inpaint(mask: Tensor) -> LinearEdit:
    """In-painting: pixels where `mask` is 1 are known. `mask` broadcasts against the images, e.g. (H, W)."""
    return LinearEdit(mask, fill=-1.0)


def colorize() -> LinearEdit:
    """Colourisation: the luma 0.2989 R + 0.5870 G + 0.1140 B of every pixel is known, its colour is not."""
    axis = F.normalize(torch.tensor(LUMA, dtype=torch.float64), dim=0)

    def transform(x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError(f"colourisation needs 3 channels, got images {tuple(x.shape)}")
        return reflect(x.movedim(1, -1), axis).movedim(-1, 1)

    return LinearEdit(torch.tensor([1.0, 0.0, 0.0])[:, None, None], transform, transform)


def superres(factor: int) -> LinearEdit:
    """Super-resolution: the mean of every factor x factor patch is known, per channel; the detail in it is not."""
    if factor < 2:
        raise ValueError(f"the factor of super-resolution must be at least 2, got {factor}")
    size = factor**2
    axis = torch.full((size,), 1 / factor, dtype=torch.float64)

    def transform(x: Tensor) -> Tensor:
        if x.shape[-1] % factor or x.shape[-2] % factor:
            raise ValueError(f"patches of {factor} x {factor} do not divide images {tuple(x.shape)}")
        patches = F.pixel_unshuffle(x, factor).unflatten(1, (x.shape[1], size))  # (B, C, factor^2, H', W')
        return reflect(patches.movedim(2, -1), axis)

    def inverse(coefficients: Tensor) -> Tensor:
        return F.pixel_shuffle(reflect(coefficients, axis).movedim(-1, 2).flatten(1, 2), factor)

    return LinearEdit((torch.arange(size) == 0).double(), transform, inverse)


@torch.no_grad()
def edit_images(
    denoiser: DenoiseFn,
    images: Tensor,
    sigmas: Tensor,
    generator: SampleGenerator,
    edit: LinearEdit | None = None,
    *,
    x: Tensor | None = None,
    sigma_min: float = 0.002,
    final_project: bool = True,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Images that agree with what `edit` knows of `images`, the rest generated (Song et al. 2023, Algorithm 4).

    sigmas: decreasing noise levels; one evaluation at each but the last, which is where the result ends (sigma_min).
    x: start at level sigmas[0]; default: what is known of the images plus noise. edit None keeps nothing fixed: the
    images are noised to sigmas[0] and denoised (stroke-guided editing, Meng et al. 2022; denoising). final_project
    replaces the known coefficients once more at the very end, which matters if the last level is above sigma_min.
    """
    images = start(images)
    if edit is not None:
        mask, coefficients = edit.mask.shape, edit.transform(images).shape
        fits = all(m in (1, c) for m, c in zip(reversed(mask), reversed(coefficients)))
        if len(mask) > len(coefficients) or not fits:
            raise ValueError(f"mask {tuple(mask)} does not broadcast to {tuple(coefficients)}")
    if x is None:
        known = images if edit is None else edit.measure(images)
        x = known + float(sigmas[0]) * generator.randn_like(images)

    def denoise_and_replace(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = denoiser(x, sigma)
        return denoised if edit is None else edit.project(images, denoised)

    x = sample_multistep(denoise_and_replace, x, sigmas, generator, progress, callback, sigma_min=sigma_min)
    return edit.project(images, x) if final_project and edit is not None else x


def slerp(a: Tensor, b: Tensor, alpha: Tensor | float) -> Tensor:
    """Spherical interpolation of noise, row by row: a at alpha = 0, b at 1 (Song et al. 2023, App. D).

    sin((1 - alpha) psi) / sin(psi) a + sin(alpha psi) / sin(psi) b with psi the angle between a and b. a, b (B, ...);
    alpha a number or (B,). Rows that point the same way are interpolated linearly.
    """
    if a.shape != b.shape:
        raise ValueError(f"noises of different shapes: {tuple(a.shape)} and {tuple(b.shape)}")
    alpha = torch.as_tensor(alpha, dtype=a.dtype, device=a.device).expand(len(a))
    cosine = F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1).clamp(-1, 1)
    psi = cosine.acos()
    flat = psi.sin().abs() < 1e-4
    sine = torch.where(flat, torch.ones_like(psi), psi.sin())
    from_a = torch.where(flat, 1 - alpha, ((1 - alpha) * psi).sin() / sine)
    from_b = torch.where(flat, alpha, (alpha * psi).sin() / sine)
    rows = (-1, *[1] * (a.ndim - 1))
    return from_a.reshape(rows) * a + from_b.reshape(rows) * b
