"""The parts of objectives as flags name them: grid, schedule, distance, weight.

`config` is anything that has the flags as attributes.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cm.config.fields import arguments_of
from cm.config.rows import DISTANCES, OBJECTIVES
from cm.diffusion.alpha_sigma import AlphaSigma
from cm.diffusion.grid import Grid
from cm.diffusion.weightings import make_weight
from cm.objectives.curricula import EmaAndScales
from cm.objectives.distances import Distance, make_distance

# (t (B,), r (B,) or None) -> weights (B,)
Weight = Callable[..., Tensor]


def distils(config: Any) -> bool:
    """Whether the objective of the configuration has a teacher."""
    return OBJECTIVES[config.training_mode].teacher


def grid_of(config: Any) -> Grid:
    """Karras's grid between --sigma_max and --sigma_min."""
    return Grid(config.sigma_min, config.sigma_max, config.rho)


def alpha_sigma_of(config: Any) -> AlphaSigma:
    """The schedule of z = alpha x + sigma e by --diffusion_schedule."""
    return AlphaSigma(config.diffusion_schedule, config.sigma_min, config.sigma_max)


def weight_of(config: Any) -> Weight:
    """lambda(t), or lambda(t, r) of pairs, by --weight_schedule."""
    return make_weight(config.weight_schedule, config.sigma_data)


def distance_of(config: Any) -> Distance:
    """The distance d by --loss_norm with its options."""
    return make_distance(config.loss_norm, **arguments_of(DISTANCES[config.loss_norm].options, config))


def schedule_of(config: Any) -> EmaAndScales:
    """N(k) and mu(k)."""
    return EmaAndScales(
        config.target_ema_mode,
        config.start_ema,
        config.scale_mode,
        config.start_scales,
        config.end_scales,
        config.total_training_steps,
        config.distill_steps_per_iter,
        printed_mu=config.mu_formula == "paper",
    )
