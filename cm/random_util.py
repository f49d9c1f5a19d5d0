"""The original's name for `cm.sampling.noise`."""

from cm.sampling.noise import (
    DeterministicGenerator,
    DeterministicIndividualGenerator,
    DummyGenerator,
    IndexedGenerator,
    get_generator,
)
from cm.seeding import StepRandom, derive_seed

__all__ = [
    "DeterministicGenerator",
    "DeterministicIndividualGenerator",
    "DummyGenerator",
    "IndexedGenerator",
    "StepRandom",
    "derive_seed",
    "get_generator",
]
