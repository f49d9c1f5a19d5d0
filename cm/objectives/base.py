"""What every training objective is made of: Draw, Roles, Objective.

An objective has two halves. `draw` makes everything random of one batch and returns it as data; `forward` computes
the losses of a batch from that data and draws nothing. The training loop knows this file only.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cm.diffusion.denoiser import Denoiser
from cm.objectives.curricula import Stage
from cm.objectives.distances import Distance
from cm.seeding import StepRandom


@dataclass(frozen=True)
class Draw:
    """Everything that was drawn for a batch; slices like the batch does.

    t (B,): noise level of the student's input. r (B,): the next lower level of the pair, t > r. noise: like the
    images. weight (B,): importance weight of the drawn level. index (B,): position on a grid, where one was used.
    share (B,): where between t and r a third level lies, where there is one.
    """

    t: Tensor
    noise: Tensor
    weight: Tensor
    r: Tensor | None = None
    index: Tensor | None = None
    share: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Draw":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[rows] for k, v in values.items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class Roles:
    """The denoisers that take part: the student learns, the target follows it, the teacher is given."""

    student: Denoiser
    target: Denoiser | None = None
    teacher: Denoiser | None = None


def bare(denoiser: Denoiser) -> Denoiser:
    """The denoiser without DistributedDataParallel around its network: for passes whose gradients nobody averages."""
    net = denoiser.net
    return replace(denoiser, net=net.module) if isinstance(net, DistributedDataParallel) else denoiser


class Objective(ABC):
    """A loss with its draws and its schedules; the training loop calls it through these methods only."""

    needs_target = False
    needs_teacher = False
    distance: Distance | None = None  # how images are compared, where the loss compares two

    def load(self, device: torch.device) -> None:
        """Load the networks that the distance needs; all ranks call it once, so that nothing is missing later."""
        if self.distance is not None:
            self.distance.load(device)

    def attach(self, student: nn.Module) -> None:
        """Give the student what belongs to the loss but is trained with it, as a submodule `LOSS_MODULE`.

        Called once, on all ranks, when the student's weights are loaded. It is trained, averaged and saved with the
        student; files of models are read without it.
        """

    def prepare(
        self, x0: Tensor, cond: dict[str, Tensor], random: StepRandom
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Change the clean images and their conditions before anything is drawn for them (augmentation)."""
        return x0, cond

    @abstractmethod
    def draw(self, x0: Tensor, step: int, random: StepRandom) -> Draw:
        """Make all random quantities for the images x0 (B, C, ...) of this step."""

    @abstractmethod
    def forward(self, roles: Roles, x0: Tensor, draw: Draw, step: int, **cond: Tensor) -> dict[str, Tensor]:
        """Per-sample losses {"loss": (B,), ...}; other entries are logged. Draws nothing."""

    def target_decay(self, step: int) -> float:
        """mu of the target network's moving average at this step; 0 copies the student."""
        return 0.0

    def stage(self, step: int) -> Stage | None:
        """Stage of progressive distillation; at its first step the student becomes the teacher."""
        return None

    def num_scales(self, step: int) -> int | None:
        """Grid points N(k), for the log."""
        return None

    def observe(self, draw: Draw, losses: Tensor) -> None:
        """See the losses (B,) of this rank's rows; every rank calls it at the same step."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the objective learned from losses it saw; empty for most."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of state_dict."""


def rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """State of the generators that dropout on `device` draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_rng_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def replayed_rng(device: torch.device, state: tuple[Tensor, Tensor | None]) -> Iterator[None]:
    """Run the body with an earlier generator state, so that it meets the same dropout masks; restore the present."""
    present = rng_state(device)
    _set_rng_state(device, state)
    try:
        yield
    finally:
        _set_rng_state(device, present)
