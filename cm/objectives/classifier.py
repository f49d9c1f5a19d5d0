"""Training of a classifier of noisy images, for guidance (Dhariwal & Nichol 2021, section 4.1)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cm.config.rows import NOISE_LEVELS
from cm.diffusion.denoiser import NoisyClassifier
from cm.diffusion.noise_levels import NoiseSampler
from cm.nn import append_dims
from cm.objectives.base import Draw, Objective, Roles
from cm.seeding import StepRandom


class ClassifierObjective(Objective):
    """Cross-entropy of log p(y | x0 + t noise; t) with noise levels t from a sampler.

    The student is a network of logits; its preconditioning scales its input and gives its clock.
    """

    def __init__(self, sampler: NoiseSampler):
        self.sampler = sampler

    def draw(self, x0: Tensor, step: int, random: StepRandom) -> Draw:
        t, importance, index = self.sampler.draw(random)
        return Draw(t=t, noise=random.noise(tuple(x0.shape[1:])), weight=importance, index=index)

    def forward(self, roles: Roles, x0: Tensor, draw: Draw, step: int, **cond: Tensor) -> dict[str, Tensor]:
        """loss and accuracy, each (B,); cond holds the classes y (B,)."""
        classifier = NoisyClassifier(roles.student.net, roles.student.precond)
        logits = classifier.logits(x0 + draw.noise * append_dims(draw.t, x0.ndim), draw.t)
        correct = (logits.argmax(1) == cond["y"]).to(torch.float32)
        return {"loss": F.cross_entropy(logits, cond["y"], reduction="none"), "accuracy": correct}


def classification(config: Any) -> Objective:
    """Row classifier."""
    return ClassifierObjective(NOISE_LEVELS.load(config.schedule_sampler)(config))
