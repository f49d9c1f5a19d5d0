"""Options of a training loop, grouped: how weights move, and what a run leaves behind."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cm.storage.mirror import Mirror
from cm.storage.saver import Saver
from cm.training.learning_rate import LearningRate


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
    ema_device: str = "auto"  # where the averages are kept; auto: beside the weights
    shard_optimizer: bool = False  # share moments and averages out over the ranks
    max_bad_steps: int = 100


@dataclass(frozen=True)
class Reporting:
    """What a run leaves behind: logs every log_interval steps, checkpoints every save_interval (-1: at the end).

    `cm.storage.saver.Saver` explains the others.
    """

    run_dir: str
    log_interval: int = 10
    save_interval: int = 10000
    keep_last: int = 0
    keep_every: int = 0
    async_save: bool = False
    on_save_error: str = "stop"
    mirror: Mirror | None = None
    meta: dict = field(default_factory=dict)
    preview: Callable[[Any], None] | None = None
    preview_interval: int = 0  # 0: at each checkpoint
    progress: bool = False  # a bar with the time left, on rank 0

    def saver(self) -> Saver:
        """The writer of this run's checkpoints."""
        return Saver(
            self.run_dir,
            keep_last=self.keep_last,
            keep_every=self.keep_every,
            meta=self.meta,
            background=self.async_save,
            on_error=self.on_save_error,
            mirror=self.mirror,
        )
