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
    larger (v1). dyadic: t - r is 1, 1/2 ... 2^(1-octaves) and t a multiple of it, or, where r = t, of half the smallest
    (shortcut models: a step over a gap is learned from two over half of it). latest: t at the largest noise level.
    """

    kind: str = "sorted"
    mean: float = -2.0
    std: float = 2.0
    lower_mean: float = -2.0
    lower_std: float = 2.0
    share: float = 0.75
    octaves: int = 7
    latest: float = LATEST

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
        """By three uniform numbers a row: the gap, where it lies, whether r = t."""
        at_once = uniform < 1 - self.share
        gap = torch.exp2(-torch.where(at_once, self.octaves, torch.floor(octave * self.octaves)))
        end = gap * torch.floor(place / gap)
        t = (end + gap).clamp_max(self.latest)
        return t, torch.where(at_once, t, end)
