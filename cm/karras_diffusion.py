"""The public face of the mathematics: KarrasDenoiser and karras_sample, under the names that outside code imports.

Nothing is computed here that the modules below do not compute: preconditionings in `cm.diffusion.precond`, losses in
`cm.objectives`, samplers in `cm.sampling.registry`, editing in `cm.sampling.editing`.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from cm.config.choices import ODE_SOLVERS
from cm.diffusion.denoiser import DenoiseFn, Denoiser, clamped
from cm.diffusion.grid import Grid, karras_sigmas
from cm.diffusion.precond import EDMPrecond, Precond, boundary_precond
from cm.diffusion.weightings import get_snr, get_weightings
from cm.nn import append_zero
from cm.objectives.base import Roles
from cm.objectives.consistency import consistency_losses
from cm.objectives.distances import Distance, make_distance
from cm.objectives.edm import edm_losses
from cm.objectives.pairs import pair_at
from cm.objectives.progressive import interval_at, progressive_losses
from cm.sampling.ancestral import get_ancestral_step, sample_euler_ancestral
from cm.sampling.consistency import sample_onestep, sample_progdist, stochastic_iterative_sampler
from cm.sampling.editing import LinearEdit, colorize, edit_images, inpaint, superres
from cm.sampling.levels import ts_to_sigmas
from cm.sampling.noise import DummyGenerator, get_generator
from cm.sampling.ode import sample_dpm, sample_euler, sample_heun, to_d
from cm.sampling.registry import run_sampler

__all__ = [
    "KarrasDenoiser",
    "get_ancestral_step",
    "get_sigmas_karras",
    "get_weightings",
    "iterative_colorization",
    "iterative_inpainting",
    "iterative_superres",
    "karras_sample",
    "sample_dpm",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_onestep",
    "sample_progdist",
    "stochastic_iterative_sampler",
    "to_d",
]


class KarrasDenoiser:
    """Preconditioning, weighting, distance and grid of a model, with its three losses.

    `distillation` selects the boundary-condition scalings of a consistency function; otherwise EDM's. `loss_norm` is
    read by the consistency and progressive losses only, and its network (LPIPS) is loaded at their first call.
    """

    def __init__(
        self,
        sigma_data: float = 0.5,
        sigma_max: float = 80.0,
        sigma_min: float = 0.002,
        rho: float = 7.0,
        weight_schedule: str = "karras",
        distillation: bool = False,
        loss_norm: str = "lpips",
        *,
        ode_solver: str = "heun",
        boundary: str = "skip",
        printed_c_out: bool = False,
        time_scale: float = 1000.0,
        num_timesteps: int = 40,
        distance: Distance | None = None,
    ):
        get_weightings(weight_schedule, torch.ones(1), sigma_data)  # refuses unknown names at once
        ODE_SOLVERS[ode_solver]
        self.sigma_data = sigma_data
        self.sigma_max = sigma_max
        self.sigma_min = sigma_min
        self.rho = rho
        self.weight_schedule = weight_schedule
        self.distillation = distillation
        self.loss_norm = loss_norm
        self.ode_solver = ode_solver
        self.num_timesteps = num_timesteps
        self._distance = distance
        self._edm = EDMPrecond(sigma_data, time_scale)
        self._boundary = boundary_precond(
            boundary,
            sigma_data=sigma_data,
            sigma_min=sigma_min,
            time_scale=time_scale,
            printed_c_out=printed_c_out,
        )

    @property
    def precond(self) -> Precond:
        """The scalings that `denoise` applies."""
        return self._boundary if self.distillation else self._edm

    @property
    def grid(self) -> Grid:
        """The noise grid between sigma_max and sigma_min."""
        return Grid(self.sigma_min, self.sigma_max, self.rho)

    @cached_property
    def distance(self) -> Distance:
        """The distance that `loss_norm` names."""
        return self._distance or make_distance(self.loss_norm)

    def denoiser(self, model: nn.Module) -> Denoiser:
        """The model under this preconditioning."""
        return Denoiser(model, self.precond)

    def get_snr(self, sigmas: Tensor) -> Tensor:
        """Signal-to-noise ratio 1 / sigma^2."""
        return get_snr(sigmas)

    def get_sigmas(self, sigmas: Tensor) -> Tensor:
        """Noise levels of noise levels: the identity, kept for callers."""
        return sigmas

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """EDM's (c_skip, c_out, c_in)."""
        return self._edm(sigma)[:3]

    def get_scalings_for_boundary_condition(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in) of a consistency function."""
        return self._boundary(sigma)[:3]

    def denoise(
        self, model: nn.Module, x_t: Tensor, sigmas: Tensor, **model_kwargs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(raw network output, denoised image) at noise levels sigmas (B,)."""
        return self.denoiser(model).raw(x_t, sigmas, **model_kwargs)

    def training_losses(
        self,
        model: nn.Module,
        x_start: Tensor,
        sigmas: Tensor,
        model_kwargs: dict[str, Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Denoising score matching: {"loss", "mse", "xs_mse"}, each (B,)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        terms = edm_losses(self.denoiser(model), x_start, sigmas, noise, self._weight, **(model_kwargs or {}))
        return {**terms, "mse": terms["loss"]}

    def consistency_losses(
        self,
        model: nn.Module,
        x_start: Tensor,
        num_scales: int,
        model_kwargs: dict[str, Tensor] | None = None,
        target_model: nn.Module | None = None,
        teacher_model: nn.Module | None = None,
        teacher_diffusion: "KarrasDenoiser | None" = None,
        noise: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Consistency distillation with a teacher, consistency training without: {"loss": (B,)}.

        indices: int64 (B,) in 0..num_scales-2, 0 = sigma_max; with indices and noise given nothing is drawn.
        """
        if target_model is None:
            raise ValueError("consistency_losses needs target_model")
        if num_scales < 2:
            raise ValueError(f"num_scales must be at least 2, got {num_scales}")
        draw = pair_at(self.grid, num_scales, *self._draw(x_start, num_scales - 1, noise, indices))
        teacher = None if teacher_model is None else (teacher_diffusion or self).denoiser(teacher_model)
        roles = Roles(self.denoiser(model), self.denoiser(target_model), teacher)
        return consistency_losses(
            roles,
            x_start,
            draw,
            distance=self.distance,
            weight=self._weight,
            ode_solver=self.ode_solver,
            **(model_kwargs or {}),
        )

    def progdist_losses(
        self,
        model: nn.Module,
        x_start: Tensor,
        num_scales: int,
        model_kwargs: dict[str, Tensor] | None = None,
        teacher_model: nn.Module | None = None,
        teacher_diffusion: "KarrasDenoiser | None" = None,
        noise: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Progressive distillation to num_scales sampling steps: {"loss": (B,)}; indices in 0..num_scales-1."""
        if teacher_model is None:
            raise ValueError("progdist_losses needs teacher_model")
        index, noise = self._draw(x_start, num_scales, noise, indices)
        draw = interval_at(self.grid, num_scales, index, noise)
        roles = Roles(self.denoiser(model), teacher=(teacher_diffusion or self).denoiser(teacher_model))
        return progressive_losses(
            roles,
            x_start,
            draw,
            self.grid.sigma(index + 0.5, num_scales),
            distance=self.distance,
            weight=self._weight,
            **(model_kwargs or {}),
        )

    def _weight(self, sigmas: Tensor, r: Tensor | None = None) -> Tensor:
        return get_weightings(self.weight_schedule, get_snr(sigmas), self.sigma_data)

    @staticmethod
    def _draw(
        x_start: Tensor, high: int, noise: Tensor | None, indices: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if indices is None:
            indices = torch.randint(0, high, (x_start.shape[0],), device=x_start.device)
        return indices, torch.randn_like(x_start) if noise is None else noise


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Tensor:
    """Karras's grid of n noise levels and a final 0, fp32 (n + 1,) (Karras et al. 2022, Eq. 5)."""
    return append_zero(karras_sigmas(n, sigma_min, sigma_max, rho).float()).to(device)


def karras_sample(
    diffusion: KarrasDenoiser,
    model: nn.Module,
    shape: tuple[int, ...],
    steps: int,
    clip_denoised: bool = True,
    progress: bool = False,
    callback: Callable[[dict], None] | None = None,
    model_kwargs: dict[str, Tensor] | None = None,
    device: torch.device | str | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7.0,
    sampler: str = "heun",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    generator=None,
    ts: list[int] | None = None,
) -> Tensor:
    """Images (shape) in [-1, 1] drawn with a named sampler on Karras's grid.

    generator: an object with randn and randn_like (`cm.sampling.noise.get_generator`), default torch's global one.
    ts: grid indices of the multistep sampler, 0 = sigma_max. clip_denoised clamps every prediction to [-1, 1]; the
    result is clamped always.
    """
    generator = get_generator("dummy") if generator is None else generator
    device = next(model.parameters()).device if device is None else device

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return diffusion.denoise(model, x, sigma, **(model_kwargs or {}))[1]

    x = generator.randn(*shape, device=device) * sigma_max
    sample = run_sampler(
        sampler,
        clamped(denoise) if clip_denoised else denoise,
        x,
        generator,
        steps=steps,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        rho=rho,
        ts=ts,
        progress=progress,
        callback=callback,
        options={"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise},
    )
    return sample.clamp(-1, 1)


def _by_index(
    distiller: DenoiseFn,
    images: Tensor,
    x: Tensor,
    ts: Sequence[int],
    t_min: float,
    t_max: float,
    rho: float,
    steps: int,
    generator,
    edit: LinearEdit,
) -> tuple[Tensor, Tensor]:
    """The loop as the functions below call it: grid indices, clamped predictions, (result, picture)."""
    sigmas = ts_to_sigmas(ts, steps, t_min, t_max, rho)
    generator = DummyGenerator() if generator is None else generator
    out = edit_images(
        clamped(distiller), images, sigmas, generator, edit, x=x, sigma_min=t_min, final_project=False
    )
    return out, edit.picture(images)


def iterative_inpainting(
    distiller: DenoiseFn,
    images: Tensor,
    x: Tensor,
    ts: Sequence[int],
    t_min: float = 0.002,
    t_max: float = 80.0,
    rho: float = 7.0,
    steps: int = 40,
    generator=None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """In-painting from x (noise of level t_max) at grid indices ts: (result, masked images).

    mask: 1 where the images are known, broadcastable to them; required.
    """
    if mask is None:
        raise ValueError("iterative_inpainting needs a mask: 1 = known, broadcastable to the images")
    edit = inpaint(mask)
    return _by_index(distiller, images, x, ts, t_min, t_max, rho, steps, generator, edit)


def iterative_colorization(
    distiller: DenoiseFn,
    images: Tensor,
    x: Tensor,
    ts: Sequence[int],
    t_min: float = 0.002,
    t_max: float = 80.0,
    rho: float = 7.0,
    steps: int = 40,
    generator=None,
) -> tuple[Tensor, Tensor]:
    """Colourisation from x (noise of level t_max) at grid indices ts: (result, the images' luma component)."""
    return _by_index(distiller, images, x, ts, t_min, t_max, rho, steps, generator, colorize())


def iterative_superres(
    distiller: DenoiseFn,
    images: Tensor,
    x: Tensor,
    ts: Sequence[int],
    t_min: float = 0.002,
    t_max: float = 80.0,
    rho: float = 7.0,
    steps: int = 40,
    generator=None,
    factor: int = 8,
) -> tuple[Tensor, Tensor]:
    """Super-resolution from x (noise of level t_max) at grid indices ts: (result, patch means at full size)."""
    return _by_index(distiller, images, x, ts, t_min, t_max, rho, steps, generator, superres(factor))
