"""No step of training or sampling waits for the device, but for the one flag that tells bad gradients.

The device `meta` has no values: reading one raises. Blocking copies to it are counted, as they would wait on a GPU.
"""

import types

import pytest
import torch
from torch.overrides import TorchFunctionMode

from cm.config.rows import SAMPLERS
from cm.diffusion.denoiser import Denoiser, NoisyClassifier, clamped
from cm.diffusion.flow_maps import FlowMap
from cm.diffusion.grid import Grid
from cm.diffusion.noise_levels import LogNormalSampler, UniformSampler, ve_levels, vp_levels
from cm.diffusion.precond import (
    BoundaryPrecond,
    ConsistencyPrecond,
    EDMPrecond,
    IDDPMPrecond,
    PiecewisePrecond,
    VEPrecond,
    VPPrecond,
)
from cm.diffusion.sde import create_sde
from cm.diffusion.weightings import get_snr, get_weightings
from cm.objectives.base import Roles
from cm.objectives.consistency import ConsistencyObjective
from cm.objectives.curricula import EmaAndScales
from cm.objectives.edm import EDMObjective
from cm.objectives.pairs import GridPairs
from cm.objectives.progressive import ProgressiveObjective
from cm.sampling.editing import colorize, edit_images, inpaint, superres
from cm.sampling.levels import karras
from cm.sampling.noise import DummyGenerator
from cm.seeding import StepRandom
from cm.training.meters import LossMeter
from evaluations.inception_v3 import InceptionV3
from tests.helpers.models import tiny_unet


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


def weight(t, r=None):
    return get_weightings("karras", get_snr(t), 0.5)


def schedule(scale_mode: str) -> EmaAndScales:
    return EmaAndScales("fixed", 0.5, scale_mode, 8, 8, 9, 9)


# What an index sampler asks of a diffusion.
GRID = types.SimpleNamespace(num_timesteps=40, sigma_min=0.002, sigma_max=80.0, rho=7.0)
SKIP = ConsistencyPrecond()
STEPS = {
    "edm": (lambda: EDMObjective(LogNormalSampler(), weight), EDMPrecond()),
    "edm_even": (lambda: EDMObjective(LogNormalSampler(even=True), weight), EDMPrecond()),
    "edm_index": (lambda: EDMObjective(UniformSampler(GRID), weight), EDMPrecond()),
    "edm_vp": (lambda: EDMObjective(vp_levels(), weight), VPPrecond()),
    "edm_ve": (
        lambda: EDMObjective(ve_levels(types.SimpleNamespace(sigma_min=0.02, sigma_max=100.0)), weight),
        VEPrecond(),
    ),
    "cd": (
        lambda: ConsistencyObjective(
            schedule("fixed"), l2, weight, pairs=GridPairs(Grid()), distillation=True
        ),
        SKIP,
    ),
    "ct": (
        lambda: ConsistencyObjective(
            schedule("fixed"), l2, weight, pairs=GridPairs(Grid()), distillation=False
        ),
        SKIP,
    ),
    "ct_piecewise": (
        lambda: ConsistencyObjective(
            schedule("fixed"), l2, weight, pairs=GridPairs(Grid()), distillation=False
        ),
        PiecewisePrecond(),
    ),
    "ct_ve": (
        lambda: ConsistencyObjective(
            schedule("fixed"), l2, weight, pairs=GridPairs(Grid()), distillation=False
        ),
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


WALKS = {
    **{name: {} for name in SAMPLERS if name != "rk45"},  # it controls its error on the CPU
    "heun with churn": {"s_churn": 10.0},
    "dpm with churn": {"s_churn": 10.0},
    "general, vp": {"noise_schedule": "vp", "state_scale": "vp", "round_sigma": IDDPMPrecond().round_sigma},
    "pc, vp": {
        "sde": create_sde("vp", 0.002, 80.0),
        "corrector": "annealed_langevin",
        "predictor": "ancestral",
    },
}


@pytest.mark.parametrize("precond", [EDMPrecond(), IDDPMPrecond(), SKIP], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", WALKS)
def test_samplers_copy_nothing_blocking_and_read_nothing(name, precond):
    sampler = name.split(",")[0].split(" ")[0]
    jumps = SAMPLERS[sampler].reads == "jumps"
    net = tiny_unet(two_times=jumps).to("meta")
    denoiser = clamped((FlowMap if jumps else Denoiser)(net, precond))
    x = torch.empty(3, 1, 8, 8, device="meta")
    sigmas = karras(4, 0.002, 80.0, 7.0)
    precond(x.new_empty(1))  # tables of the levels are moved once
    with BlockingCopies() as copies:
        sample = SAMPLERS.load(sampler)(denoiser, x, sigmas, DummyGenerator(), **WALKS[name])
    assert sample.is_meta and copies.found == []


@pytest.mark.parametrize("task", ["inpaint", "superres", "colorize", ""])
def test_edits_copy_nothing_blocking_but_their_constants(task):
    """superres and colorize bring one vector each to the device; no number comes back."""
    edits = {"superres": lambda: superres(2), "colorize": colorize, "": lambda: None}
    edits["inpaint"] = lambda: inpaint(torch.empty(8, 8, device="meta"))
    denoiser = clamped(Denoiser(tiny_unet(in_channels=3).to("meta"), SKIP))
    images = torch.empty(2, 3, 8, 8, device="meta")
    sigmas = karras(4, 0.002, 80.0, 7.0)[:-1]
    with BlockingCopies() as copies:
        edited = edit_images(denoiser, images, sigmas, DummyGenerator(), edits[task]())
    assert edited.is_meta and edited.shape == images.shape
    assert set(copies.found) <= {"to"} and (task in ("superres", "colorize") or not copies.found)


def test_inception_reads_nothing():
    net = InceptionV3().to("meta")
    with BlockingCopies() as copies:
        pool, spatial = net(torch.empty(2, 3, 64, 64, device="meta"))
    assert pool.is_meta and spatial.is_meta and copies.found == []


def test_a_classifier_guides_without_waiting():
    classifier = NoisyClassifier(lambda x, c_noise: x.flatten(1)[:, :4], EDMPrecond())
    x = torch.empty(3, 1, 8, 8, device="meta")
    with BlockingCopies() as copies:
        classifier.gradient(torch.zeros(3, dtype=torch.int64, device="meta"))(x, x.new_full((3,), 2.0))
    assert copies.found == []


def test_the_counter_counts():
    with BlockingCopies() as copies:
        torch.tensor(0.5, device="meta")
        torch.ones(2).to("meta")
        torch.ones(2).to("meta", non_blocking=True)
    assert copies.found == ["tensor", "to"]
