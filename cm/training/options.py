"""Options of a training run, grouped by what they decide."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cm.runtime.preemption import Stopper
from cm.runtime.watchdog import Heartbeat
from cm.training.learning_rate import LearningRate


@dataclass(frozen=True)
class BatchSize:
    """Images of a step over all ranks, and of a forward pass on one rank (-1: all of the rank's images at once)."""

    total: int
    micro: int = -1


@dataclass(frozen=True)
class Optimization:
    """How the student's weights move."""

    learning_rate: LearningRate
    optimizer: str = "radam"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    grad_clip: float = 0.0
    precision: str = "fp32"
    fp16_scale_growth: float = 1e-3
    ema_rate: str | float = "0.9999"
    ema_warmup: bool = False
    ema_profiles: str = ""  # relative lengths of power-function averages
    ema_device: str = "auto"  # where the averages are kept; auto: beside the weights
    shard: str = "none"  # what ranks share out: optimizer (moments and averages, ZeRO-1), fsdp (everything)
    max_bad_steps: int = 100


@dataclass(frozen=True)
class Execution:
    """How networks compute, with equal results up to rounding: by torch.compile, in channels-last memory."""

    compile: bool = False
    channels_last: bool = False


@dataclass(frozen=True)
class Reports:
    """What a run shows of itself, and every how many steps; all of it is due after the last step, too.

    save_interval -1: the last step only. preview: called with the trainer; preview_interval 0: at each checkpoint.
    progress_bar: with the time left, on rank 0. sigma_range: of the noise levels in which the log groups losses.
    """

    log_interval: int = 10
    save_interval: int = 10000
    preview: Callable[[Any], None] | None = None
    preview_interval: int = 0
    progress_bar: bool = False
    sigma_range: tuple[float, float] = (0.002, 80.0)


@dataclass(frozen=True)
class Supervision:
    """Who may end a run before its last step, and who watches that it goes on."""

    stopper: Stopper = field(default_factory=Stopper)
    heartbeat: Heartbeat | None = None
