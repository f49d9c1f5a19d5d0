"""sCT and sCD: tangents, losses, discrete form and samples against tests/golden_later/scm.npz and closed forms."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from cm.config.rows import PRECONDS
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.grid import karras_sigmas
from cm.diffusion.precond import EDMPrecond, TrigFlowPrecond, boundary_precond, denoiser_precond
from cm.diffusion.proposals import Proposal
from cm.diffusion.trigflow import TrigFlow, time_of, velocity
from cm.nn import append_dims, append_zero
from cm.objectives.base import Draw, Roles
from cm.objectives.pairs import draw_level
from cm.objectives.trigflow import Tangent, trigflow_losses
from cm.sampling.consistency import sample_multistep, sample_onestep
from cm.sampling.ode import sample_euler, sample_heun
from cm.seeding import StepRandom
from tests.helpers import later
from tests.helpers.analytic import free
from tests.helpers.continuous_functions import Function
from tests.helpers.golden_data import later as golden

SCM = golden("scm")
SD = SCM.config["sigma_data"]
ZERO = boundary_precond("zero", sigma_data=SD, sigma_min=0.002, time_scale=1.0)
NATIVE = boundary_precond("zero", sigma_data=SD, sigma_min=0.002, time_scale=1.0, column="trigflow")
STEPS = sorted({int(key.split("/")[1][2:]) for key in SCM.keys("sct/it")})
LAW = Proposal(-1.0, 1.4)
NETWORK = 2e-8  # position frequencies are fp32, and their last digit is not that of the public network


def close(found, expected, rtol=1e-6, atol=0.0):
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), rtol=rtol, atol=atol
    )


def near(found, expected, tolerance=1e-9):
    """Within a tolerance of the largest number."""
    expected = torch.as_tensor(expected).double()
    close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


# --- coordinates ---


def test_preconditioning():
    sigma, t = SCM.tensor("precond/sigma"), SCM.tensor("precond/t")
    close(time_of(sigma, SD), t, rtol=1e-12)
    edm = EDMPrecond(SD, 1.0)(sigma)
    for name in ("c_skip", "c_out", "c_in", "c_noise"):
        close(getattr(edm, name), SCM[f"precond/edm_{name}"], rtol=1e-9)
    # D in x is D in x_t = cos(t) x, so every coefficient of x is one of x_t times cos(t).
    native, cos = TrigFlowPrecond(SD)(sigma), t.cos()
    close(cos, SCM["precond/x_trig_over_x_edm"], rtol=1e-9, atol=1e-15)
    close(native.c_skip, SCM.tensor("precond/c_skip") * cos, rtol=1e-9)
    close(native.c_out, SCM["precond/c_out"], rtol=1e-9)
    close(native.c_in, SCM.tensor("precond/c_in") * cos, rtol=1e-9)
    close(native.c_noise, t, rtol=1e-12)


def test_noise_levels():
    for (mean, std), key in (
        ((-1.0, 1.4), "t_cifar_m1_1p4"), ((-1.0, 1.6), "t_img64_m1_1p6"), ((-0.8, 1.6), "t_img512_m0p8_1p6"),
    ):  # fmt: skip
        close(time_of(torch.exp(mean + std * SCM.tensor("tsample/normal")), SD), SCM[f"tsample/{key}"])
    random = StepRandom(0, 0, 0, 500, 500)
    close(draw_level(LAW, random), torch.exp(-1 + 1.4 * StepRandom(0, 0, 0, 500, 500).normal()))
    cut = draw_level(replace(LAW, low=math.log(0.1), high=0.0), random)
    assert cut.min() >= 0.0999 and cut.max() <= 1.0001
    close(time_of(torch.tensor(80.0).double(), SD), SCM["tsample/t_max"], rtol=1e-12)
    close(SD * math.tan(1.1), SCM["tsample/sigma_mid_of_t_1p1"])


# --- tangents and losses of the stored networks ---


class Case:
    """The stored batch of `sct` or `scd` on an EDM-wrapped or a native student."""

    def __init__(self, mode, native=False, dtype=torch.float64):
        self.mode, self.dtype, self.key = mode, dtype, f"native/{mode}" if native else mode
        self.student = later.network(SCM, "student", dtype, "student/teacher")
        precond = NATIVE if native else ZERO
        teacher_precond = TrigFlowPrecond(SD) if native else EDMPrecond(SD, 1.0)
        self.cond = later.labels(SCM, "data", self.student)
        self.x0 = SCM.tensor("data/x0").to(dtype)
        sigma = SCM.tensor("data/sigma").to(dtype)
        self.draw = Draw(sigma, SCM.tensor("data/z").to(dtype) / SD, torch.ones_like(sigma))
        teacher = None
        if mode == "scd":
            net = later.network(SCM, "teacher", dtype, "student/teacher")
            teacher = Denoiser(net, teacher_precond)
        self.roles = Roles(Denoiser(self.student, precond), teacher=teacher)

    def losses(self, step, log_error=None, **changes):
        """Losses at a step."""
        tangent = Tangent(SD, mode=self.mode, **changes)
        return trigflow_losses(
            self.roles, self.x0, self.draw, tangent=tangent, share=tangent.share(step), log_error=log_error,
            **self.cond,
        )  # fmt: skip

    def tangent(self, share, x_t, t, slope, **changes):
        """g before it is bounded."""
        with torch.no_grad():
            return Tangent(SD, **changes)(self.roles.student, x_t, t, slope, share, **self.cond)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("native", [False, True], ids=["edm", "native"])
@pytest.mark.parametrize("mode", ["sct", "scd"])
def test_tangents(mode, native, dtype):
    case = Case(mode, native, dtype)
    tolerance = NETWORK if dtype == torch.float64 else 1e-5
    t = time_of(case.draw.t, SD)
    x_t, slope = (SCM.tensor(f"{case.key}/{name}").to(dtype) for name in ("x_t", "dxdt"))
    with torch.no_grad():
        cos, sin = append_dims(t.cos(), 4), append_dims(t.sin(), 4)
        near(cos * case.x0 + sin * SD * case.draw.noise, SCM[f"{case.key}/x_t"], tolerance)
        if mode == "scd":
            near(
                velocity(case.roles.teacher, x_t, case.draw.t, SD, **case.cond),
                SCM[f"{case.key}/dxdt"],
                tolerance,
            )
        f, change = Tangent(SD)._derivative(case.roles.student, x_t, t, slope, case.cond)
        near(f, SCM[f"{case.key}/F"], tolerance)
        near(case.roles.student(x_t / cos, case.draw.t, **case.cond), SCM[f"{case.key}/f"], 10 * tolerance)
    stored = SCM.tensor(f"{case.key}/{'dFdt' if native else 'cos_sin_dFdt'}")
    near(change, stored * (cos * sin).double() if native else stored, tolerance)
    for step in (k for k in STEPS if f"{case.key}/it{k}/g" in SCM):
        share = Tangent().share(step)
        close(share, SCM[f"{case.key}/it{step}/r"])
        g = case.tangent(share, x_t, t, slope)
        near(g, SCM[f"{case.key}/it{step}/g"], tolerance)
        for norm in ("l2", "rms"):
            near(Tangent(norm=norm).bounded(g), SCM[f"{case.key}/it{step}/g_normalised_{norm}"], tolerance)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", ["sct", "scd"])
def test_losses_with_given_weights(mode, step):
    case, key = Case(mode), f"{mode}/it{step}/paper"
    log_error = SCM.tensor("data/logvar").double().requires_grad_()
    terms = case.losses(step, log_error)
    terms["loss"].mean().backward()
    close(terms["loss"].detach(), SCM[f"{key}/loss"], rtol=1e-7)
    close(terms["squared"].detach(), SCM[f"{key}/squared_mean"], rtol=1e-7)
    close(log_error.grad, SCM[f"{key}/grad_logvar_of_mean"], rtol=1e-6, atol=1e-9)
    if SCM.keys(f"{key}/grad_of_mean/"):
        later.check_gradients(SCM, f"{key}/grad_of_mean/", case.student, 1e-6)


@pytest.mark.parametrize("mode", ["sct", "scd"])
def test_losses_of_a_native_student(mode):
    """No EDM around it: the same loss through --precond trigflow. Another public step takes the rms and no weight."""
    for step in (k for k in STEPS if f"native/{mode}/it{k}/loss_paper" in SCM):
        case, key = Case(mode, native=True), f"native/{mode}/it{step}"
        log_error = SCM.tensor("data/logvar").double()
        terms = case.losses(step, log_error)
        terms["loss"].mean().backward()
        close(terms["loss"].detach(), SCM[f"{key}/loss_paper"], rtol=1e-7)
        later.check_gradients(SCM, f"{key}/grad_of_mean/", case.student, 1e-6)
        terms = case.losses(step, log_error, norm="rms")
        close(terms["loss"].detach(), SCM[f"{key}/loss_rms_no_prior"], rtol=1e-7)


def test_fastgens_extra_weights_are_not_ours():
    """Its rms norm, 1/d and 1/sigma explain its numbers, so that what differs is known."""
    u = SCM.tensor("data/logvar").double()
    for mode, step in itertools.product(("sct", "scd"), STEPS):
        case, key = Case(mode), f"{mode}/it{step}/fastgen"
        squared = case.losses(step, norm="rms")["squared"].detach()
        close(squared, SCM[f"{key}/squared_mean"], rtol=1e-7)
        loss = squared / (case.x0[0].numel() * case.draw.t) / u.exp() + u
        close(loss, SCM[f"{key}/loss"], rtol=1e-7)


# --- the diffusion loss in these coordinates ---


@pytest.mark.parametrize("native", [False, True], ids=["edm_wrapped", "native"])
def test_velocity_loss_is_edms_with_its_weighting(native):
    """(sigma_data F - v)^2 = sigma_data^2 lambda (D - x0)^2, lambda = 1 / sigma^2 + 1 / sigma_data^2: row karras."""
    case, key = Case("sct", native), f"diffusion/{'native' if native else 'edm_wrapped'}"
    t = time_of(case.draw.t, SD)
    cos, sin = append_dims(t.cos(), 4), append_dims(t.sin(), 4)
    x_t = cos * case.x0 + sin * SD * case.draw.noise
    f = TrigFlow(case.roles.student, SD)(x_t / SD, t, **case.cond)
    near(f.detach(), SCM[f"{key}/F"], NETWORK)
    near(cos * SD * case.draw.noise - sin * case.x0, SCM[f"{key}/v"])
    denoised = case.roles.student(
        case.x0 + append_dims(case.draw.t, 4) * case.draw.noise, case.draw.t, **case.cond
    )
    lam = 1 / case.draw.t**2 + 1 / SD**2
    squared = SD**2 * append_dims(lam, 4) * (denoised - case.x0).square()
    close(squared.flatten(1).sum(1).detach(), SCM[f"{key}/loss_sum"], rtol=1e-7)
    u = SCM.tensor("data/logvar").double()
    loss = squared.flatten(1).mean(1) / u.exp() + u
    close(loss.detach(), SCM[f"{key}/loss_adaptive"], rtol=1e-7)
    loss.mean().backward()
    later.check_gradients(SCM, f"{key}/grad_of_mean_adaptive/", case.student, 1e-6)


# --- samples and solvers ---


def test_samples():
    net = later.network(SCM, "student", torch.float64, "student/teacher")
    cond = later.labels(SCM, "data", net)
    denoiser = Denoiser(net, NATIVE)

    class Noise:
        def randn_like(self, x):
            return SCM.tensor("sample/noise2")

    def model(x, sigma):
        return denoiser(x, sigma, **cond)

    start = 80 * SCM.tensor("sample/noise1")
    with torch.no_grad():
        close(
            sample_onestep(model, start, torch.tensor([80.0])), SCM["sample/one_step"], rtol=1e-4, atol=1e-4
        )
        levels = torch.tensor([80.0, SD * math.tan(1.1), 0.0], dtype=torch.float64)
        two = sample_multistep(model, start, levels, Noise(), sigma_min=0.0)
    close(two, SCM["sample/two_step_t1p1"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted({key.split("/")[1] for key in SCM.keys("ode/")}))
def test_the_solvers_of_these_coordinates_are_ours(name):
    """TrigFlow's DDIM step is Euler's in sigma, and its second-order correction is Heun's."""
    net = later.network(SCM, "student", torch.float64, "student/teacher")
    cond = later.labels(SCM, "data", net)
    denoiser = Denoiser(net, TrigFlowPrecond(SD))
    t = SCM.tensor(f"ode/{name}/t")
    sigmas = append_zero(SD * t[:-1].tan())
    close(sigmas[:-1], karras_sigmas(len(t) - 1, 0.002, 80.0), rtol=1e-6)
    start = SCM.tensor(f"ode/{name}/start") / t[0].cos()
    for sampler, key in ((sample_euler, "first_order"), (sample_heun, "second_order")):
        found = sampler(lambda x, sigma: denoiser(x, sigma, **cond), start, sigmas, torch)
        close(found, SCM[f"ode/{name}/{key}"], rtol=1e-6, atol=1e-7)


# --- the discrete form ---


def test_discrete_form():
    case = Case("scd")
    t, low = SCM.tensor("discrete/t"), SCM.tensor("discrete/t_prime")
    x_t, teacher = SCM.tensor("discrete/x_t"), SCM.tensor("discrete/F_teacher")
    cos = append_dims(t.cos(), 4)
    for row in range(len(t)):
        one = slice(row, row + 1)
        cond = {name: value[one] for name, value in case.cond.items()}
        step = (t[row].tan() / low[row].tan()).log().item()
        with torch.no_grad():
            g = Tangent(SD, step=step)(case.roles.student, x_t[one], t[one], SD * teacher[one], 1.0, **cond)
        near(g / cos[one], SCM.tensor("discrete/delta")[one], 10 * NETWORK)


def test_the_difference_tends_to_the_derivative():
    case = Case("sct")
    t = time_of(case.draw.t, SD)
    x_t, slope = (SCM.tensor(f"sct/{name}") for name in ("x_t", "dxdt"))
    for share in (0.25, 1.0):
        exact = case.tangent(share, x_t, t, slope)
        errors = [
            (case.tangent(share, x_t, t, slope, step=h) - exact).abs().max() for h in (0.02, 0.01, 0.005)
        ]
        for wide, narrow in itertools.pairwise(errors):
            assert 1.8 < wide / narrow < 2.2


# --- closed forms ---


def gaussian(which):
    """A denoiser of the stored Gaussian: that of its diffusion model or its consistency function, in x."""
    mu, s = SCM.tensor("gauss/mu").reshape(1, -1, 1, 1), SCM.tensor("gauss/s")

    def denoise(x, sigma):
        v = append_dims(sigma, x.ndim) ** 2
        if which == "diffusion":
            return (s**2 * x + v * mu) / (s**2 + v)
        return mu + s / (s**2 + v).sqrt() * (x - mu)

    return denoise


class ExactNetwork(nn.Module):
    """The raw network F(u, t) of a native student whose denoiser is the Gaussian's."""

    def __init__(self, which):
        super().__init__()
        self.denoise = gaussian(which)

    def forward(self, u, t):
        cos, sin = append_dims(t.cos(), 4), append_dims(t.sin(), 4)
        x_t = SD * u
        return (cos * x_t - self.denoise(x_t / cos, SD * t.tan())) / (sin * SD)


@pytest.mark.parametrize("which", ["diffusion", "consistency"])
def test_tangents_of_the_gaussian(which):
    t, x_t = SCM.tensor("gauss/t"), SCM.tensor("gauss/x_t")
    cos, sin = append_dims(t.cos(), 4), append_dims(t.sin(), 4)
    near(gaussian("diffusion")(x_t / cos, SD * t.tan()), SCM["gauss/denoiser"])
    near(gaussian("consistency")(x_t / cos, SD * t.tan()), SCM["gauss/consistency_f"])
    slope = velocity(Denoiser(Function(gaussian("diffusion")), free), x_t, SD * t.tan(), SD)
    near(slope, SCM["gauss/velocity"])
    student = Denoiser(ExactNetwork(which), NATIVE)
    f, change = Tangent(SD)._derivative(student, x_t, t, slope, {})
    near(f, SCM[f"gauss/F_{which}"])
    near(change, cos * sin * SCM.tensor(f"gauss/dF{which}_dt"))
    for key in SCM.keys(f"gauss/g_student_is_{which}_r"):
        share = float(key.rsplit("_r", 1)[1])
        g = Tangent(SD)(student, x_t, t, slope, share)
        close(g, SCM[key], rtol=1e-8, atol=1e-9)
        if which == "consistency" and share == 1:
            assert g.abs().max() < 1e-9, "the exact consistency function stands still"
    exact = Tangent(SD, step=0.3)(Denoiser(ExactNetwork("consistency"), NATIVE), x_t, t, slope, 1.0)
    assert which == "diffusion" or exact.abs().max() < 0.1


def test_tangents_of_a_student_by_hand():
    a, w, b = (SCM.tensor(f"gauss/analytic_student/{name}") for name in ("A", "w", "b"))

    def network(u, t):
        t = append_dims(t, 4)
        return a * torch.sin(w * t) * u + b.reshape(1, -1, 1, 1) * t

    t, x_t, slope = (SCM.tensor(f"gauss/{name}") for name in ("t", "x_t", "velocity"))
    student = Denoiser(Function(network), NATIVE)
    for key in SCM.keys("gauss/analytic_student/g_r"):
        near(Tangent(SD)(student, x_t, t, slope, float(key.rsplit("_r", 1)[1])), SCM[key])


@pytest.mark.parametrize("column", PRECONDS)
def test_any_teacher_gives_the_same_velocity(column):
    """The ideal network of each column of EDM's Table 1, through its own scalings."""
    precond = denoiser_precond(column, sigma_data=SD, time_scale=1.0)
    sigma = torch.tensor([0.05, 0.4, 2.0, 40.0])
    if column in ("iddpm", "ddpm"):
        sigma = precond.round_sigma(sigma)
    x_t = SCM.tensor("data/x0").float()
    x = x_t / append_dims(time_of(sigma.double(), SD).cos().float(), 4)

    class Ideal(nn.Module):
        """F = (D - c_skip x) / c_out."""

        def forward(self, c_in_x, c_noise):
            c = precond(sigma.double())
            a, b = append_dims(c.c_skip, 4), append_dims(c.c_out, 4)
            return ((gaussian("diffusion")(x.double(), sigma.double()) - a * x) / b).float()

    found = velocity(Denoiser(Ideal(), precond), x_t, sigma, SD)
    td = time_of(sigma.double(), SD)
    exact = (
        append_dims(td.cos(), 4) * x_t.double()
        - gaussian("diffusion")(x_t.double() / append_dims(td.cos(), 4), sigma.double())
    ) / append_dims(td.sin(), 4)
    near(found, exact, 2e-5)


@pytest.mark.parametrize("column", PRECONDS)
def test_derivatives_of_students_of_every_column(column):
    """Forward mode against finite differences in float64, the clock included."""
    net = later.network(SCM, "student", torch.float64, "student/teacher")
    cond = later.labels(SCM, "data", net)
    student = Denoiser(
        net, boundary_precond("zero", sigma_data=SD, sigma_min=0.002, time_scale=1.0, column=column)
    )
    t = time_of(torch.tensor([0.05, 0.4, 2.0, 40.0]).double(), SD)
    x_t, slope = SCM.tensor("sct/x_t"), SCM.tensor("sct/dxdt")
    network, speed = TrigFlow(student, SD), append_dims(t.cos() * t.sin(), 4)
    with torch.no_grad():
        f, change = Tangent(SD)._derivative(student, x_t, t, slope, cond)
        h = 1e-6 * t.cos() * t.sin()
        wide = append_dims(h, 4)
        ahead, behind = (network((x_t + k * wide * slope) / SD, t + k * h, **cond) for k in (1, -1))
        near(change, (ahead - behind) / (2 * wide) * speed, 2e-6)
        # f of a student is its denoiser.
        cos, sin = append_dims(t.cos(), 4), append_dims(t.sin(), 4)
        near(cos * x_t - sin * SD * f, student(x_t / cos, SD * t.tan(), **cond))


# --- planted faults ---


FAULTS = {
    "cos sin twice": lambda f, c, t: (f, c * append_dims(t.cos() * t.sin(), 4)),
    "sigma_data twice": lambda f, c, t: (f, c * SD),
    "no time part": None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault, monkeypatch):
    original = Tangent._derivative

    def faulty(self, student, x_t, t, slope, cond):
        if fault == "no time part":
            f, all_of_it = original(self, student, x_t, t, slope, cond)
            _, time_only = original(self, student, x_t, t, torch.zeros_like(slope), cond)
            return f, all_of_it - time_only
        return FAULTS[fault](*original(self, student, x_t, t, slope, cond), t)

    monkeypatch.setattr(Tangent, "_derivative", faulty)
    with pytest.raises(AssertionError):
        test_tangents("sct", False, torch.float64)
    with pytest.raises(AssertionError):
        test_tangents_of_a_student_by_hand()
