"""Where on the noise axis the teacher's objective looks: log-normal, uniform in the time of a schedule, or
importance-sampled grid positions."""

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cm.config.rows import NOISE_LEVELS
from cm.diffusion.grid import karras_sigma
from cm.diffusion.noise_schedules import VPSchedule, ddpm_levels, iddpm_levels
from cm.errors import UserError
from cm.nn import alike
from cm.seeding import StepRandom


class NoiseSampler(Protocol):
    """Draws noise levels for a batch."""

    def draw(self, random: StepRandom) -> tuple[Tensor, Tensor, Tensor | None]:
        """(sigma, importance weight, grid index or None), each (B,)."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold; empty by default."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of state_dict."""


class ScheduleSampler(NoiseSampler):
    """A distribution over the positions 0..T-1 of a grid, used to reduce the variance of the objective.

    `diffusion` gives num_timesteps and, for `draw`, sigma_min, sigma_max and rho of the grid (0 is sigma_max).
    """

    def __init__(self, diffusion):
        self.diffusion = diffusion

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Positive weight of each position, not normalised."""

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """(positions int64, importance weights fp32), each (B,), from torch's global generator."""
        return self.at(torch.rand(batch_size), device)

    def draw(self, random: StepRandom) -> tuple[Tensor, Tensor, Tensor]:
        """Noise levels of sampled positions; a function of (seed, step, global row)."""
        uniforms = random.uniform()
        index, importance = self.at(uniforms, uniforms.device)
        d = self.diffusion
        position = index / max(d.num_timesteps - 1, 1)
        return karras_sigma(position, d.sigma_min, d.sigma_max, d.rho).float(), importance, index

    def at(self, uniforms: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Positions by inversion of the distribution function at uniforms (B,) in [0, 1), with weights 1 / (T p)."""
        # Tables come to the uniforms, without waiting; the other way round each step would wait for the GPU.
        uniforms = uniforms.to(device, non_blocking=True)
        cumulative = self._probabilities().cumsum(0).to(device, non_blocking=True)
        index = torch.searchsorted(cumulative, uniforms.double(), right=True).clamp_max(len(cumulative) - 1)
        return index, self.importance(index)

    def importance(self, index: Tensor) -> Tensor:
        """1 / (T p(index)), fp32: makes the weighted loss an unbiased estimate of the uniform one."""
        p = self._probabilities()
        return (1 / (len(p) * p)).float().to(index.device, non_blocking=True)[index]

    def _probabilities(self) -> Tensor:
        """p of each position, float64 on the CPU."""
        p = torch.as_tensor(self.weights(), dtype=torch.float64)
        return p / p.sum()

    def observe(self, index: Tensor, losses: Tensor) -> None:
        """See the losses of sampled positions; nothing by default."""


class UniformSampler(ScheduleSampler):
    """Every position equally often."""

    def weights(self) -> np.ndarray:
        return np.ones([self.diffusion.num_timesteps])


class LossAwareSampler(ScheduleSampler):
    """A sampler that follows the losses; all ranks see all losses and so keep equal weights."""

    def observe(self, index: Tensor, losses: Tensor) -> None:
        self.update_with_local_losses(index, losses)

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Gather (positions, losses) of all ranks in rank order, then update; batches may differ in size."""
        ts, losses = torch.stack(
            [local_ts.double(), local_losses.double()]
        ).tolist()  # one copy from the device
        local = ([int(t) for t in ts], losses)
        gathered = [local]
        if dist.is_available() and dist.is_initialized():
            gathered = [local] * dist.get_world_size()
            dist.all_gather_object(gathered, local)
        self.update_with_all_losses(
            [t for ts, _ in gathered for t in ts], [x for _, xs in gathered for x in xs]
        )

    @abstractmethod
    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        """Update the weights; deterministic, so that ranks stay equal."""


class LossSecondMomentResampler(LossAwareSampler):
    """p(t) proportional to sqrt(E[loss^2]) over the last losses at t (Nichol & Dhariwal 2021, Eq. 18).

    Uniform until every position has history_per_term losses; then mixed with uniform_prob of the uniform one.
    """

    def __init__(self, diffusion, history_per_term: int = 10, uniform_prob: float = 0.001):
        super().__init__(diffusion)
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._loss_history = np.zeros([diffusion.num_timesteps, history_per_term], dtype=np.float64)
        self._loss_counts = np.zeros([diffusion.num_timesteps], dtype=np.int64)

    def weights(self) -> np.ndarray:
        if not self._warmed_up():
            return np.ones([self.diffusion.num_timesteps], dtype=np.float64)
        weights = np.sqrt(np.mean(self._loss_history**2, axis=-1))
        weights /= np.sum(weights)
        return weights * (1 - self.uniform_prob) + self.uniform_prob / len(weights)

    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        for t, loss in zip(ts, losses, strict=True):
            if not math.isfinite(loss):
                continue
            if self._loss_counts[t] == self.history_per_term:
                self._loss_history[t, :-1] = self._loss_history[t, 1:]
                self._loss_history[t, -1] = loss
            else:
                self._loss_history[t, self._loss_counts[t]] = loss
                self._loss_counts[t] += 1

    def _warmed_up(self) -> bool:
        return bool((self._loss_counts == self.history_per_term).all())

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "history": torch.from_numpy(self._loss_history),
            "counts": torch.from_numpy(self._loss_counts),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["history"].shape != self._loss_history.shape:
            raise UserError(
                f"the checkpoint's loss history has shape {tuple(state['history'].shape)}, "
                f"--schedule_sampler expects {self._loss_history.shape}"
            )
        self._loss_history = state["history"].numpy().copy()
        self._loss_counts = state["counts"].numpy().copy()


class LogNormalSampler(NoiseSampler):
    """ln sigma ~ N(p_mean, p_std^2) (Karras et al. 2022, Sec. 5); `even` stratifies the global batch by inversion."""

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2, even: bool = False):
        if p_std < 0:
            raise UserError(f"--p_std must not be negative, got {p_std}")
        self.p_mean = p_mean
        self.p_std = p_std
        self.even = even

    def sample(self, bs: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """(sigmas, ones), each (B,), from torch's global generator; `even` uses this rank's strata."""
        if not self.even:
            return self._levels(torch.randn(bs, device=device))
        initialised = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if initialised else (0, 1)
        strata = torch.arange(rank * bs, (rank + 1) * bs, device=device)
        return self._levels(self._normal_at(strata, torch.rand(bs, device=device), world * bs))

    def draw(self, random: StepRandom) -> tuple[Tensor, Tensor, None]:
        """Noise levels for this rank's rows; a function of (seed, step, global row)."""
        if not self.even:
            return *self._levels(random.normal()), None
        normal = self._normal_at(random.rows(), random.uniform(), random.global_batch)
        return *self._levels(normal), None

    @staticmethod
    def _normal_at(strata: Tensor, uniforms: Tensor, total: int) -> Tensor:
        """Standard normal quantiles at (stratum + uniform) / total; a draw of exactly 0 is kept off minus infinity."""
        u = (strata + uniforms.double()) / total
        return torch.special.ndtri(u.clamp_min(0.5**25 / total)).float()

    def _levels(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        sigmas = torch.exp(self.p_mean + self.p_std * normal)
        return sigmas, torch.ones_like(sigmas)


class UniformTimeSampler(NoiseSampler):
    """sigma = level(u) with u ~ U[0, 1): the training distributions of EDM's other columns, and of any schedule.

    level: float64 (B,) in [0, 1) -> noise levels.
    """

    def __init__(self, level: Callable[[Tensor], Tensor]):
        self.level = level

    def draw(self, random: StepRandom) -> tuple[Tensor, Tensor, None]:
        """Noise levels for this rank's rows; a function of (seed, step, global row)."""
        return *self._levels(random.uniform()), None

    def sample(self, bs: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """(sigmas, ones), each (B,), from torch's global generator."""
        return self._levels(torch.rand(bs, device=device))

    def _levels(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        sigmas = self.level(uniforms.double()).float()
        return sigmas, torch.ones_like(sigmas)


def lognormal(source: Any) -> LogNormalSampler:
    """Row lognormal; p_mean and p_std of a configuration, or the defaults."""
    return LogNormalSampler(getattr(source, "p_mean", -1.2), getattr(source, "p_std", 1.2))


def lognormal_even(source: Any) -> LogNormalSampler:
    """Row lognormal-even."""
    return LogNormalSampler(getattr(source, "p_mean", -1.2), getattr(source, "p_std", 1.2), even=True)


def vp_levels(source: Any = None, epsilon_t: float = 1e-5) -> UniformTimeSampler:
    """t ~ U(epsilon_t, 1) of the VP schedule (Karras et al. 2022, Table 1, column VP)."""
    return UniformTimeSampler(lambda u: VPSchedule().sigma(epsilon_t + u * (1 - epsilon_t)))


def ve_levels(source: Any) -> UniformTimeSampler:
    """ln sigma ~ U(ln sigma_min, ln sigma_max) (Karras et al. 2022, Table 1, column VE)."""
    low, high = source.sigma_min, source.sigma_max
    return UniformTimeSampler(partial(alike, lambda u: low * (high / low) ** u))


def iddpm_uniform_levels(source: Any = None) -> UniformTimeSampler:
    """sigma = u_j with j ~ U{0..M-1} (Karras et al. 2022, Table 1, column iDDPM + DDIM)."""
    return _uniform_over(iddpm_levels)


def ddpm_uniform_levels(source: Any = None) -> UniformTimeSampler:
    """The noise level of a step t ~ U{0..M-1} of DDPM's linear schedule (Ho et al. 2020, Algorithm 1)."""
    return _uniform_over(ddpm_levels)


def _uniform_over(known: Callable[..., Tensor]) -> UniformTimeSampler:
    def level(u: Tensor) -> Tensor:
        levels = known(device=u.device)
        return levels[(u * len(levels)).long()]

    return UniformTimeSampler(level)


def create_named_schedule_sampler(name: str, diffusion: Any) -> NoiseSampler:
    """Sampler by its flag value.

    diffusion: a KarrasDenoiser or a configuration. Grid points need its num_timesteps, sigma_min, sigma_max and rho;
    lognormal takes its p_mean and p_std, else the defaults.
    """
    return NOISE_LEVELS.load(name)(diffusion)
