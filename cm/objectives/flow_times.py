"""Laws of the two times t >= r of a flow map's training, in the linear path's time from 0 (images) to 1 (noise)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cm.seeding import StepRandom

LAWS = ("sorted", "capped", "dyadic")
LATEST = 1 - 2**-20  # sigma is finite there


def _sigmoid(x: Tensor) -> Tensor:
    """At most `LATEST`. torch.sigmoid rounds its last few rows otherwise than the others; exp treats all alike."""
    return (1 / (1 + torch.exp(-x))).clamp_max(LATEST)


@dataclass(frozen=True)
class TimeLaw:
    """How t and r are drawn; share: the rows with r < t. The others have r = t and learn the velocity itself.

    sorted: both logit-normal, the larger one is t (MeanFlow, v0). capped: t and r logit-normal, and r is t where it is
    larger (v1). dyadic: t - r is 1/2, 1/4 ... 2^-octaves and t a multiple of it (shortcut models).
    """

    kind: str = "sorted"
    mean: float = -2.0
    std: float = 2.0
    lower_mean: float = -2.0
    lower_std: float = 2.0
    share: float = 0.75
    octaves: int = 7

    def draw(self, random: StepRandom) -> tuple[Tensor, Tensor]:
        """(t, r), each (B,) float32."""
        if self.kind == "dyadic":
            return self.dyadic(random.uniform(), random.uniform(), random.uniform())
        return self.logit_normal(random.normal(), random.normal(), random.uniform())

    def logit_normal(self, normal_t: Tensor, normal_r: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """By two standard normal numbers a row, and a uniform one that says whether r = t."""
        t, r = (
            _sigmoid(normal_t * self.std + self.mean),
            _sigmoid(normal_r * self.lower_std + self.lower_mean),
        )
        if self.kind == "sorted":
            t, r = torch.maximum(t, r), torch.minimum(t, r)
        return t, torch.where(uniform < 1 - self.share, t, torch.minimum(t, r))

    def dyadic(self, octave: Tensor, place: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """By three uniform numbers a row: the gap, where it lies, whether r = t; t is at most `LATEST`."""
        gap = torch.exp2(-1 - torch.floor(octave * self.octaves))
        t = gap * (1 + torch.floor(place / gap)).clamp_max(1 / gap)
        return t.clamp_max(LATEST), torch.where(uniform < 1 - self.share, t.clamp_max(LATEST), t - gap)
