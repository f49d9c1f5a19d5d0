"""From a training configuration to its objective and optimisation."""

from dataclasses import dataclass

from cm.config.derived import is_consistency, lr_decay, precision, training_mode
from cm.config.scripts import ClassifierConfig, CmTrainConfig, Config, EdmTrainConfig
from cm.diffusion.noise_levels import (
    LogNormalSampler,
    LossSecondMomentResampler,
    NoiseSampler,
    UniformSampler,
    iddpm_uniform_levels,
    ve_levels,
    vp_levels,
)
from cm.diffusion.weightings import get_snr, get_weightings
from cm.models.factory import create_alpha_sigma
from cm.objectives import (
    AlphaSigmaObjective,
    AlphaSigmaProgressive,
    ClassifierObjective,
    ConsistencyObjective,
    ContinuousObjective,
    EDMObjective,
    Grid,
    Objective,
    ProgressiveObjective,
)
from cm.objectives.consistency import Distance, Weight
from cm.objectives.curricula import EmaAndScales
from cm.objectives.distances import make_distance
from cm.training.learning_rate import LearningRate
from cm.training.trainer import Optimization


@dataclass(frozen=True)
class _GridInfo:
    """What an index sampler asks of a diffusion."""

    num_timesteps: int
    sigma_min: float
    sigma_max: float
    rho: float


# --schedule_sampler of edm_train: name -> sampler(config)
NOISE_SAMPLERS = {
    "lognormal": lambda c: LogNormalSampler(c.p_mean, c.p_std),
    "lognormal-even": lambda c: LogNormalSampler(c.p_mean, c.p_std, even=True),
    "uniform": lambda c: UniformSampler(_GridInfo(c.num_timesteps, c.sigma_min, c.sigma_max, c.rho)),
    "loss-second-moment": lambda c: LossSecondMomentResampler(
        _GridInfo(c.num_timesteps, c.sigma_min, c.sigma_max, c.rho)
    ),
    "vp": lambda c: vp_levels(),
    "ve": lambda c: ve_levels(c.sigma_min, c.sigma_max),
    "iddpm": lambda c: iddpm_uniform_levels(),
}


def create_noise_sampler(config: EdmTrainConfig) -> NoiseSampler:
    """The distribution of noise levels that the teacher is trained on."""
    return NOISE_SAMPLERS[config.schedule_sampler](config)


def create_weight(config: Config) -> Weight:
    """lambda(sigma) by --weight_schedule."""
    return lambda sigma: get_weightings(config.weight_schedule, get_snr(sigma), config.sigma_data)


def create_distance(config: CmTrainConfig) -> Distance:
    """The distance d by --loss_norm."""
    return make_distance(
        config.loss_norm,
        lpips_path=config.lpips_path,
        lpips_size=config.lpips_size,
        lpips_precision=config.lpips_precision,
    )


def create_schedule(config: CmTrainConfig) -> EmaAndScales:
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


def _consistency(config: CmTrainConfig, distillation: bool) -> Objective:
    return ConsistencyObjective(
        create_schedule(config),
        create_distance(config),
        create_weight(config),
        grid=_grid(config),
        distillation=distillation,
        ode_solver=config.ode_solver,
    )


def _progressive(config: CmTrainConfig) -> Objective:
    parts = create_schedule(config), create_distance(config), create_weight(config)
    if config.diffusion_schedule:
        return AlphaSigmaProgressive(*parts, alpha_sigma=create_alpha_sigma(config))
    return ProgressiveObjective(*parts, grid=_grid(config))


def _continuous(config: CmTrainConfig, distillation: bool) -> Objective:
    return ContinuousObjective(
        config.loss_norm,
        create_distance(config),
        create_weight(config),
        grid=_grid(config),
        distillation=distillation,
        stop_grad=config.stop_grad,
        clock=config.clock,
    )


def _grid(config: Config) -> Grid:
    return Grid(config.sigma_min, config.sigma_max, config.rho)


# --training_mode -> objective(config); a new objective is one file in cm/objectives and one line here
OBJECTIVES = {
    "consistency_distillation": lambda c: _consistency(c, distillation=True),
    "consistency_training": lambda c: _consistency(c, distillation=False),
    "progdist": _progressive,
    "continuous_distillation": lambda c: _continuous(c, distillation=True),
    "continuous_training": lambda c: _continuous(c, distillation=False),
}


def create_objective(config: EdmTrainConfig | CmTrainConfig) -> Objective:
    """The loss, its draws and its schedules."""
    if isinstance(config, ClassifierConfig):
        return ClassifierObjective(create_noise_sampler(config))
    if isinstance(config, EdmTrainConfig) and config.diffusion_schedule:
        return AlphaSigmaObjective(create_alpha_sigma(config), create_weight(config))
    if isinstance(config, EdmTrainConfig):
        return EDMObjective(create_noise_sampler(config), create_weight(config), config.augment)
    return OBJECTIVES[config.training_mode](config)


def trains_consistency(config: EdmTrainConfig | CmTrainConfig) -> bool:
    """Whether the student is a consistency function, with a boundary condition."""
    return is_consistency(training_mode(config))


def create_optimization(config: EdmTrainConfig | CmTrainConfig) -> Optimization:
    """How the student's weights move."""
    schedule, length = lr_decay(config)
    return Optimization(
        LearningRate(config.lr, schedule, length, config.lr_warmup_steps),
        optimizer=config.optimizer,
        weight_decay=config.weight_decay,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        grad_clip=config.grad_clip,
        precision=precision(config),
        fp16_scale_growth=config.fp16_scale_growth,
        ema_rate=config.ema_rate,
        ema_warmup=config.ema_warmup,
        ema_device=config.ema_device,
        shard_optimizer=config.shard_optimizer,
        max_bad_steps=config.max_bad_steps,
    )
