"""No training step waits for the device between log intervals, but for the one flag that tells bad gradients.

The device `meta` has no values: reading one raises. Blocking copies to it are counted, as they would wait on a GPU.
"""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from cm.denoiser import Denoiser
from cm.meters import LossMeter
from cm.objectives import ConsistencyObjective, EDMObjective, Grid, ProgressiveObjective, Roles
from cm.precond import BoundaryPrecond, ConsistencyPrecond, EDMPrecond, PiecewisePrecond, VEPrecond
from cm.random_util import StepRandom
from cm.resample import LogNormalSampler
from cm.schedules import EmaAndScales
from cm.weightings import get_snr, get_weightings
from tests.models import tiny_unet


class BlockingCopies(TorchFunctionMode):
    """Collects the calls that copy from the CPU to `meta` and wait for it."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if getattr(result, "is_meta", False):
            makes = func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
            moves = func in (torch.Tensor.to, torch.Tensor.type_as) and not args[0].is_meta
            if makes or (moves and not kwargs.get("non_blocking")):
                self.found.append(func.__name__)
        return result


def l2(a, b):
    return (a - b).square().flatten(1).mean(1)


def weight(sigma):
    return get_weightings("karras", get_snr(sigma), 0.5)


def schedule(scale_mode: str) -> EmaAndScales:
    return EmaAndScales("fixed", 0.5, scale_mode, 8, 8, 9, 9)


SKIP = ConsistencyPrecond()
STEPS = {
    "edm": (lambda: EDMObjective(LogNormalSampler(), weight), EDMPrecond()),
    "edm_even": (lambda: EDMObjective(LogNormalSampler(even=True), weight), EDMPrecond()),
    "cd": (lambda: ConsistencyObjective(schedule("fixed"), l2, weight, grid=Grid(), distillation=True), SKIP),
    "ct": (
        lambda: ConsistencyObjective(schedule("fixed"), l2, weight, grid=Grid(), distillation=False),
        SKIP,
    ),
    "ct_piecewise": (
        lambda: ConsistencyObjective(schedule("fixed"), l2, weight, grid=Grid(), distillation=False),
        PiecewisePrecond(),
    ),
    "ct_ve": (
        lambda: ConsistencyObjective(schedule("fixed"), l2, weight, grid=Grid(), distillation=False),
        BoundaryPrecond(VEPrecond(), SKIP),
    ),
    "pd": (lambda: ProgressiveObjective(schedule("progdist"), l2, weight, grid=Grid()), EDMPrecond()),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_copies_nothing_blocking_and_reads_nothing(name):
    make, precond = STEPS[name]
    objective, net = make(), tiny_unet(dropout=0.1).to("meta")
    roles = Roles(
        Denoiser(net, precond),
        Denoiser(net, precond) if objective.needs_target else None,
        Denoiser(net, EDMPrecond()) if objective.needs_teacher else None,
    )
    x0 = torch.empty(3, 1, 8, 8, device="meta")
    meter = LossMeter(0.002, 80.0)
    with BlockingCopies() as copies:
        draw = objective.draw(x0, 4, StepRandom(0, 4, 2, 5, 8, "meta"))
        terms = objective.forward(roles, x0, draw, 4)
        (terms["loss"] * draw.weight).sum().backward()
        meter.update(terms, draw.t, draw.weight)
    assert copies.found == []


def test_the_counter_counts():
    with BlockingCopies() as copies:
        torch.tensor(0.5, device="meta")
        torch.ones(2).to("meta")
        torch.ones(2).to("meta", non_blocking=True)
    assert copies.found == ["tensor", "to"]
