"""The original's name for `cm.diffusion.noise_levels`."""

from cm.diffusion.noise_levels import (
    LogNormalSampler,
    LossAwareSampler,
    LossSecondMomentResampler,
    ScheduleSampler,
    UniformSampler,
    create_named_schedule_sampler,
)

__all__ = [
    "LogNormalSampler",
    "LossAwareSampler",
    "LossSecondMomentResampler",
    "ScheduleSampler",
    "UniformSampler",
    "create_named_schedule_sampler",
]
