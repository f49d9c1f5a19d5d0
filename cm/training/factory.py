"""From a training configuration to its objective and optimisation."""

from cm.config.derived import is_consistency, lr_decay, precision, training_mode
from cm.config.rows import OBJECTIVES
from cm.config.scripts import TrainConfig
from cm.objectives.base import Objective
from cm.training.learning_rate import LearningRate
from cm.training.options import Optimization


def create_objective(config: TrainConfig) -> Objective:
    """The loss, its draws and its schedules; TypeError when a row says other things of it than it does itself."""
    mode = training_mode(config)
    row = OBJECTIVES[mode]
    objective = row.load()(config)
    if objective.needs_teacher != row.teacher:
        raise TypeError(
            f"objective {mode}: its row says teacher={row.teacher}, it says {objective.needs_teacher}"
        )
    return objective


def trains_consistency(config: TrainConfig) -> bool:
    """Whether the student is a consistency function, with a boundary condition."""
    return is_consistency(training_mode(config))


def create_optimization(config: TrainConfig) -> Optimization:
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
        ema_profiles=config.ema_profiles,
        ema_device=config.ema_device,
        shard=config.shard,
        max_bad_steps=config.max_bad_steps,
    )
