"""Diffusion in z = alpha x + sigma e: schedules, loss, DDIM, progressive distillation; equality with x + sigma e."""

import math

import pytest
import torch

from cm.commands.cli import parse_config
from cm.config.scripts import CmTrainConfig, EdmTrainConfig
from cm.diffusion.alpha_sigma import AlphaSigma
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.precond import Coefficients, EDMPrecond
from cm.diffusion.weightings import get_snr, get_weightings
from cm.errors import UserError
from cm.nn import append_dims, mean_flat
from cm.objectives.base import Draw, Roles
from cm.objectives.curricula import EmaAndScales
from cm.objectives.edm import EDMObjective, edm_losses
from cm.objectives.progressive import ProgressiveObjective, interval_at
from cm.objectives.progressive import progressive_losses as sigma_form
from cm.sampling.consistency import sample_progdist
from cm.seeding import StepRandom
from cm.training.factory import create_objective
from tests.helpers.alpha_sigma_reference import (
    ddim_step,
    ddim_target,
    diffusion_losses,
    predict_x,
    progressive_losses,
)
from tests.helpers.analytic import Gaussian
from tests.helpers.models import PointNet

GAUSS = Gaussian(mean=0.3, std=0.5)
NAMES = ("cosine", "vp", "ve")


def levels(*values):
    return torch.tensor(values, dtype=torch.float64)


def weight(name):
    return lambda t, r=None: get_weightings(name, get_snr(t), 0.5)


def distance(a, b):
    return mean_flat((a - b) ** 2)


def batch():
    generator = torch.Generator().manual_seed(0)
    return GAUSS.sample((4, 2), generator), torch.randn(4, 2, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Denoiser(PointNet().double(), EDMPrecond(time_scale=1.0))


@pytest.mark.parametrize("name", NAMES)
def test_schedules(name):
    schedule = AlphaSigma(name, 0.01, 50.0)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    level = schedule.level(t)
    assert (level[1:] > level[:-1]).all()
    assert level[[0, -1]].tolist() == pytest.approx([0.01, 50.0])
    alpha = schedule.alpha(level)
    norm = alpha**2 * (1 + (level**2 if name != "ve" else 0))
    torch.testing.assert_close(norm, torch.ones_like(norm))
    # The grid of distillation counts from sigma_max down and ends with a 0 for the sampler.
    assert schedule.steps(4).tolist() == pytest.approx(
        [*schedule.level(levels(1, 0.75, 0.5, 0.25, 0)).tolist(), 0]
    )


def test_log_snr_by_hand():
    wide = AlphaSigma("cosine", 1e-6, 1e6)
    assert wide.level(levels(0.5)).item() == pytest.approx(1.0)
    assert wide.alpha(wide.level(levels(0.25))).item() == pytest.approx(math.cos(math.pi / 8), rel=1e-5)
    # Linear beta: ln alpha = -(beta_d t^2 / 4 + beta_min t / 2), on the part of time that is used.
    vp = AlphaSigma("vp", 0.0010005, 152.16697)
    t = 1e-5 + 0.4 * (1 - 1e-5)
    expected = math.exp(-(19.9 * t**2 / 4 + 0.1 * t / 2))
    assert vp.alpha(vp.level(levels(0.4))).item() == pytest.approx(expected, rel=1e-4)
    assert AlphaSigma("ve", 0.01, 100.0).level(levels(0.5)).item() == pytest.approx(1.0)
    with pytest.raises(UserError, match="diffusion_schedule must be one of cosine, vp, ve"):
        AlphaSigma("quadratic")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighting", ["snr", "snr+1", "truncated-snr", "uniform"])
def test_the_loss_is_algorithm_1(net, name, weighting):
    schedule = AlphaSigma(name)
    x0, noise = batch()
    t = schedule.level(levels(0.1, 0.4, 0.6, 0.9))
    draw = Draw(t=t, noise=noise, weight=torch.ones(4))
    got = diffusion_losses(net, x0, draw, schedule, weight(weighting))
    # By hand: alpha, sigma, log-SNR, the weightings of Salimans & Ho, section 4.
    alpha = schedule.alpha(t)
    sigma = alpha * t
    snr = torch.exp(torch.log(alpha**2 / sigma**2))
    w = {"snr": snr, "snr+1": snr + 1, "truncated-snr": snr.clamp(min=1), "uniform": torch.ones(4)}[weighting]
    z = alpha[:, None] * x0 + sigma[:, None] * noise
    prediction = net(z / alpha[:, None], t)
    torch.testing.assert_close(got["loss"], w * ((x0 - prediction) ** 2).mean(1))
    # The same as the loss in x + sigma e, at sigma / alpha.
    torch.testing.assert_close(got["loss"], edm_losses(net, x0, t, noise, weight(weighting))["loss"])


@pytest.mark.parametrize("name", NAMES)
def test_ddim_is_the_exact_flow_in_the_limit_and_the_target_inverts_it(name):
    schedule = AlphaSigma(name, 0.02, 20.0)
    x0, noise = batch()
    t, r = levels(5.0, 2.0, 1.0, 0.5), levels(2.0, 0.3, 0.02, 0.4)
    alpha_t = schedule.alpha(t)[:, None]
    z = alpha_t * (x0 + t[:, None] * noise)
    prediction = torch.tensor([[0.3, -0.2]]).double().expand(4, 2)
    z_end = ddim_step(z, prediction, t, r, schedule)
    # z_s = alpha_s x^ + sigma_s e^ with e^ = (z - alpha x^) / sigma.
    eps = (z - alpha_t * prediction) / (alpha_t * t[:, None])
    alpha_r = schedule.alpha(r)[:, None]
    torch.testing.assert_close(z_end, alpha_r * prediction + alpha_r * r[:, None] * eps)
    torch.testing.assert_close(ddim_target(z, z_end, t, r, schedule), prediction)
    # Many DDIM steps follow the probability flow.
    fine = torch.linspace(1, 0, 2001, dtype=torch.float64)
    z = schedule.alpha(levels(20.0)) * x0[:, :1] * 20
    for a, b in zip(schedule.level(fine[:-1]), schedule.level(fine[1:]), strict=True):
        a, b = a.expand(4), b.expand(4)
        z = ddim_step(z, GAUSS.denoise(z / append_dims(schedule.alpha(a), 2), a), a, b, schedule)
    exact = GAUSS.flow(x0[:, :1] * 20, levels(20.0), levels(0.02))
    torch.testing.assert_close(z / schedule.alpha(levels(0.02)), exact, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_one_student_step_with_the_target_lands_on_the_teachers_two_steps(net, name):
    schedule = AlphaSigma(name)
    x0, noise = batch()
    n, index = 8, torch.tensor([0, 2, 5, 7])
    t, mid, r = (schedule.level(1 - (index + shift) / n) for shift in (0, 0.5, 1))
    z = append_dims(schedule.alpha(t), 2) * (x0 + append_dims(t, 2) * noise)
    z_mid = ddim_step(z, predict_x(net, z, t, schedule), t, mid, schedule)
    z_end = ddim_step(z_mid, predict_x(net, z_mid, mid, schedule), mid, r, schedule)
    target = ddim_target(z, z_end, t, r, schedule)
    torch.testing.assert_close(ddim_step(z, target, t, r, schedule), z_end, rtol=1e-12, atol=1e-12)
    # The loss compares with exactly that target.
    draw = Draw(t=t, r=r, noise=noise, weight=torch.ones(4), index=index)
    got = progressive_losses(
        Roles(net, teacher=net), x0, draw, mid, schedule, distance=distance, weight=weight("snr")
    )
    prediction = predict_x(net, z, t, schedule)
    torch.testing.assert_close(got["loss"], ((prediction - target) ** 2).mean(1) / t**2)


@pytest.mark.parametrize("name", NAMES)
def test_both_forms_of_progressive_distillation_agree(net, name):
    """DDIM in (alpha, sigma) is Euler in sigma: on one grid the losses and gradients are equal."""
    schedule = AlphaSigma(name, 0.01, 20.0)
    x0, noise = batch()
    draw = interval_at(schedule, 4, torch.tensor([0, 1, 2, 3]), noise)
    t_mid = schedule.sigma(draw.index + 0.5, 4)
    teacher = Denoiser(lambda x, c: 0.3 * x + 0.01 * c[:, None], EDMPrecond(time_scale=1.0))
    roles = Roles(net, teacher=teacher)
    options = {"distance": distance, "weight": weight("truncated-snr")}
    ours = progressive_losses(roles, x0, draw, t_mid, schedule, **options)["loss"]
    theirs = sigma_form(roles, x0, draw, t_mid, **options)["loss"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    parameters = list(net.net.parameters())
    for a, b in zip(
        torch.autograd.grad(ours.sum(), parameters), torch.autograd.grad(theirs.sum(), parameters)
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_objectives_draw_and_halve():
    x0 = torch.zeros(500, 2)
    random = StepRandom(0, 0, 0, 500, 500)
    flags = ["--preset", "digits_cosine", "--sigma_min", "0.002", "--weight_schedule", "snr"]
    objective = create_objective(parse_config(EdmTrainConfig, flags))
    assert isinstance(objective, EDMObjective)
    level = objective.draw(x0, 0, random).t
    times = torch.atan(level.double()) * 2 / math.pi
    assert times.mean().item() == pytest.approx(0.5, abs=0.04) and level.dtype == torch.float32
    flags = ["--preset", "digits_cosine_pd", "--start_scales", "8", "--distill_steps_per_iter", "10"]
    progressive = create_objective(parse_config(CmTrainConfig, flags))
    assert isinstance(progressive, ProgressiveObjective) and progressive.needs_teacher
    assert [progressive.num_scales(step) for step in (0, 10, 20, 39, 40)] == [8, 4, 2, 2, 1]
    draw = progressive.draw(x0, 10, random)
    assert set(draw.index.tolist()) == {0, 1, 2, 3}
    expected = AlphaSigma("cosine").level(1 - draw.index / 4).float()
    assert torch.equal(draw.t, expected) and (draw.r < draw.t).all()


def exact_scalings(sigma):
    """Under these any network is the exact denoiser of N(0, 0.25) data."""
    zeros = torch.zeros_like(sigma)
    return Coefficients(c_skip=0.25 / (0.25 + sigma**2), c_out=zeros, c_in=zeros, c_noise=zeros)


def test_training_halves_the_steps_of_an_exact_teacher():
    """One stage on Gaussian data: the student's 2 steps come to where the teacher's 4 steps go."""
    schedule = AlphaSigma("cosine", 0.02, 10.0)
    teacher = Denoiser(lambda x, c: x, exact_scalings)
    torch.manual_seed(0)
    student = Denoiser(PointNet(dim=1), EDMPrecond(time_scale=1.0))
    optimizer = torch.optim.Adam(student.net.parameters(), 3e-3)
    objective = ProgressiveObjective(
        EmaAndScales("fixed", 0.0, "progdist", 2, 2, 0, 10**6),
        distance,
        weight("truncated-snr"),
        grid=schedule,
    )
    for step in range(400):
        x0 = GAUSS.sample((128, 1), torch.Generator().manual_seed(step)).float()
        draw = objective.draw(x0, step, StepRandom(0, step, 0, 128, 128))
        loss = objective.forward(Roles(student, teacher=teacher), x0, draw, step)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = 10 * torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    ours, two, four = (
        sample_progdist(denoiser, x, schedule.steps(n))
        for denoiser, n in ((student, 2), (teacher, 2), (teacher, 4))
    )
    assert (ours - four).abs().mean() < 0.25 * (two - four).abs().mean()
