"""Every objective learns a mixture in the plane: a small network, the real training loop, distances to the data.

python -m tests.helpers.learning [--length 3]     a table; length 1 is what the test suite runs
"""

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cm.diffusion.denoiser import Denoiser
from cm.diffusion.grid import Grid
from cm.diffusion.noise_levels import LogNormalSampler
from cm.diffusion.precond import ConsistencyPrecond, EDMPrecond
from cm.diffusion.proposals import Proposal
from cm.objectives.base import Objective, Roles
from cm.objectives.consistency import ConsistencyObjective
from cm.objectives.continuous import ContinuousObjective
from cm.objectives.curricula import EmaAndScales, Ratio, progdist_steps
from cm.objectives.distances import PseudoHuber, make_distance
from cm.objectives.edm import EDMObjective
from cm.objectives.pairs import GridPairs, LogNormalGridPairs, Pairs, RatioPairs
from cm.objectives.parts import Weight
from cm.objectives.progressive import ProgressiveObjective
from cm.objectives.trigflow import Tangent, TrigFlowObjective
from cm.objectives.truncated import TruncatedObjective, TruncatedPairs
from cm.runtime import logger
from cm.sampling.noise import get_generator
from cm.sampling.registry import run_sampler
from cm.storage.saver import Saver
from cm.training.learning_rate import LearningRate
from cm.training.options import BatchSize, Optimization, Reports
from cm.training.trainer import Trainer
from tests.helpers.later import pair_weight
from tests.helpers.models import PointNet

GRID = Grid(sigma_max=10.0)
BATCH = 256
COUNT = 4096  # points that are compared
STD = 0.15
ANGLES = torch.arange(4) * math.pi / 2
CENTRES = 0.6 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)
# By what --boundary says of a consistency function; empty: a denoiser
PRECONDS = {
    "": EDMPrecond(time_scale=1.0),
    "skip": ConsistencyPrecond(time_scale=1.0),
    "zero": ConsistencyPrecond(sigma_min=0.0, time_scale=1.0),
}


def data(count: int, seed: int) -> Tensor:
    """Points (count, 2) of the mixture: four spots on a circle."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(0, len(CENTRES), (count,), generator=generator)
    return CENTRES[which] + STD * torch.randn(count, 2, generator=generator)


def gaussian_fit(count: int) -> Tensor:
    """Points of the Gaussian with the data's mean and covariance: what learning nothing but these would give."""
    factor = torch.linalg.cholesky(torch.cov(data(COUNT, seed=-1).T))
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(2)) @ factor.T


def distance(points: Tensor, directions: int = 64) -> float:
    """Sliced Wasserstein distance to the data: mean |difference of quantiles|, in units of the data."""
    angles = torch.arange(directions) * math.pi / directions
    axes = torch.stack([angles.cos(), angles.sin()])
    quantiles = [(p @ axes).sort(0).values for p in (points, data(len(points), seed=-1))]
    return (quantiles[0] - quantiles[1]).abs().mean().item()


def on_spots(points: Tensor) -> float:
    """Share of points within three standard deviations of a spot; 1 - exp(-4.5) = .989 for the data."""
    return (torch.cdist(points, CENTRES).min(1).values < 3 * STD).float().mean().item()


@dataclass(frozen=True)
class Recipe:
    """How one objective is trained. teacher: the method whose model it starts from and learns from; empty: none."""

    objective: Callable[[], Objective]
    steps: int
    lr: float
    teacher: str = "EDM"
    boundary: str = "skip"


def _weight(name: str) -> Weight:
    return lambda t, r=None: pair_weight(name, t, r, 0.5)


L2, UNIFORM = make_distance("l2"), _weight("uniform")
STAGE = 100  # steps of a stage of progressive distillation


def _edm() -> Objective:
    return EDMObjective(LogNormalSampler(), _weight("karras"))


def _consistency(points: int, mu: float, distillation: bool) -> Objective:
    schedule = EmaAndScales("fixed", mu, "fixed", points, points, 1, 1)
    return ConsistencyObjective(schedule, L2, UNIFORM, pairs=GridPairs(GRID), distillation=distillation)


def _progressive(length: float) -> Objective:
    schedule = EmaAndScales("fixed", 0.0, "progdist", 16, 16, 1, round(STAGE * length))
    return ProgressiveObjective(schedule, L2, _weight("truncated-snr"), grid=GRID)


def _continuous(distillation: bool, stop_grad: bool = True) -> Objective:
    return ContinuousObjective(L2, UNIFORM, grid=GRID, distillation=distillation, stop_grad=stop_grad)


def _later(pairs: Pairs, c: float, total: int) -> Objective:
    """iCT and ECT."""
    schedule = EmaAndScales("fixed", 0.0, "doubling", 10, 160, total, 1)
    return ConsistencyObjective(
        schedule, PseudoHuber(c), _weight("inverse-gap"), pairs=pairs, distillation=False
    )


def _truncated() -> Objective:
    law = Proposal(0.0, 0.2, 0.0, math.log(GRID.sigma_max), df=0.01)
    pairs = TruncatedPairs(law, Ratio(16.0, 0))
    return TruncatedObjective(PseudoHuber(0.03), _weight("inverse-gap"), pairs=pairs)


def _trigflow(mode: str, length: float) -> Objective:
    law = Proposal(-1.0, 1.4, math.log(GRID.sigma_min), math.log(GRID.sigma_max))
    tangent = Tangent(warmup=round(100 * length), mode=mode)
    return TrigFlowObjective(law, tangent, distillation=mode == "scd")


def recipes(length: float = 1.0) -> dict[str, Recipe]:
    """Method -> recipe."""
    ict = LogNormalGridPairs(GRID, -1.1, 2.0)
    ect = RatioPairs(Proposal(-1.1, 2.0), Ratio(2.0, round(100 * length)))
    return {
        "EDM": Recipe(_edm, 1000, 1e-2, teacher="", boundary=""),
        "CD": Recipe(partial(_consistency, 18, 0.0, distillation=True), 800, 6e-3),
        "CT": Recipe(partial(_consistency, 80, 0.5, distillation=False), 1500, 1e-2, teacher=""),
        "PD": Recipe(partial(_progressive, length), progdist_steps(16, STAGE), 5e-3, boundary=""),
        "continuous CD": Recipe(partial(_continuous, distillation=True), 400, 3e-3),
        "continuous CD, no stop-gradient": Recipe(
            partial(_continuous, distillation=True, stop_grad=False), 400, 3e-3
        ),
        "continuous CT": Recipe(partial(_continuous, distillation=False), 500, 3e-3),
        "iCT": Recipe(partial(_later, ict, -1.0, round(1500 * length)), 1500, 1e-2, teacher=""),
        "ECT": Recipe(partial(_later, ect, 0.03, 1), 600, 3e-3, boundary="zero"),
        "TCM": Recipe(_truncated, 300, 2e-3, teacher="ECT", boundary="zero"),
        "sCT": Recipe(partial(_trigflow, "sct", length), 600, 3e-3, boundary="zero"),
        "sCD": Recipe(partial(_trigflow, "scd", length), 500, 3e-3, boundary="zero"),
    }


# Method -> (number of network evaluations, sampler, steps, ts) of its samples
SAMPLINGS: dict[str, tuple[tuple[int, str, int, list[int] | None], ...]] = {
    "EDM": ((35, "heun", 18, None), (9, "heun", 5, None)),
    "PD": ((1, "progdist", 1, None),),
}
ONE_AND_TWO = ((1, "onestep", 18, None), (2, "multistep", 18, [0, 11, 17]))
SAMPLINGS["TCM"] = ((1, "onestep", 18, None), (2, "multistep", 18, [0, 7, 17]))  # not below t' = 1


def batches() -> Iterator[tuple[Tensor, dict]]:
    """Fresh data for every step."""
    step = 0
    while True:
        yield data(BATCH, step), {}
        step += 1


def train(recipe: Recipe, teacher: Denoiser | None, length: float = 1.0) -> Denoiser:
    """The averaged model after `length` times a recipe's steps."""
    steps = round(recipe.steps * length)
    objective = recipe.objective()
    torch.manual_seed(0)
    student = copy.deepcopy(teacher.net) if teacher else PointNet()
    objective.attach(student)
    precond = PRECONDS[recipe.boundary]
    with tempfile.TemporaryDirectory() as folder:
        logger.configure(folder, ["json"])
        trainer = Trainer(
            roles=Roles(
                Denoiser(student, precond),
                Denoiser(copy.deepcopy(student), precond) if objective.needs_target else None,
                copy.deepcopy(teacher) if objective.needs_teacher else None,
            ),
            objective=objective,
            data=batches(),
            batch=BatchSize(BATCH),
            optimization=Optimization(
                LearningRate(recipe.lr, "late_decay", steps),
                optimizer="adam",
                ema_rate="0.98",
                ema_warmup=True,
            ),
            saver=Saver(folder),
            reports=Reports(log_interval=100, save_interval=-1),
            total_steps=steps,
        )
        trainer.run_loop()
    with torch.no_grad():
        for p, average in zip(student.parameters(), trainer.state.ema.copies[0]):
            p.copy_(average)
    return Denoiser(student, precond)


def sample(model: Denoiser, sampler: str, steps: int, ts: Sequence[int] | None = None) -> Tensor:
    """COUNT points, always from the same noise."""
    x = GRID.sigma_max * torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(1))
    generator = get_generator("indexed", num_samples=COUNT, seed=0)
    return run_sampler(
        sampler,
        model,
        x,
        generator,
        steps=steps,
        sigma_min=GRID.sigma_min,
        sigma_max=GRID.sigma_max,
        ts=ts,
    )


@dataclass(frozen=True)
class Row:
    """What one way of sampling one model reached."""

    method: str
    evaluations: int
    steps: int
    seconds: float
    distance: float
    on_spots: float


def learn(length: float = 1.0) -> Iterator[Row]:
    """Train every recipe, the teacher first, and measure its samples."""
    models: dict[str, Denoiser] = {}
    for method, recipe in recipes(length).items():
        start = time.perf_counter()
        models[method] = model = train(recipe, models.get(recipe.teacher), length)
        seconds = time.perf_counter() - start
        for evaluations, *sampling in SAMPLINGS.get(method, ONE_AND_TWO):
            points = sample(model, *sampling)
            steps = round(recipe.steps * length)
            yield Row(method, evaluations, steps, seconds, distance(points), on_spots(points))


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--length", type=float, default=3.0, help="training steps, in those of the test suite"
    )
    length = parser.parse_args().length
    print("| samples | network evaluations | training | distance to the data | on the spots |")
    print("|---|---|---|---|---|")
    for name, points in (("fresh data", data(COUNT, -2)), ("a Gaussian fit", gaussian_fit(COUNT))):
        print(f"| {name} | | | {distance(points):.3f} | {on_spots(points):.1%} |")
    for r in learn(length):
        training = f"{r.steps} steps, {r.seconds:.0f} s"
        print(
            f"| {r.method} | {r.evaluations} | {training} | {r.distance:.3f} | {r.on_spots:.1%} |", flush=True
        )


if __name__ == "__main__":
    main()
