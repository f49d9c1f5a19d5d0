"""Guidance by a model without a class and by a weaker model: closed forms on a mixture of two classes."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from cm.config.parsing import Guidance, parse_guidance
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.flow_maps import FlowMap
from cm.diffusion.grid import karras_sigmas
from cm.diffusion.guidance import GuidedDenoiser, acts, guided, limited, unconditional, without_labels
from cm.diffusion.precond import EDMPrecond, FlowPrecond
from cm.diffusion.trigflow import velocity
from cm.errors import UserError
from cm.nn import NO_CLASS
from cm.objectives.base import Draw, Roles
from cm.objectives.consistency import consistency_losses, heun_step
from cm.objectives.distances import make_distance
from cm.objectives.flow_map import Adaptive, FlowMapObjective
from cm.objectives.flow_times import TimeLaw
from cm.objectives.trigflow import Tangent, trigflow_losses
from cm.sampling.ode import sample_heun
from tests.helpers.analytic import free, ones

# Two classes at -1 and +1 in every coordinate of a point (B, D), each with this standard deviation.
STD = 0.3


class Classes(nn.Module):
    """The exact denoiser as a network: of a class y, or of both together for the label -1. calls: how often."""

    def __init__(self, std=STD):
        super().__init__()
        self.std, self.calls = std, 0

    def forward(self, x, sigma, y):
        self.calls += 1
        v, s = self.std**2, sigma[:, None] ** 2
        of = [(v * x + s * m) / (v + s) for m in (-1.0, 1.0)]
        weight = torch.softmax(2 * x.sum(1, keepdim=True) / (v + s) * torch.tensor([-0.5, 0.5]), dim=1)
        both = weight[:, :1] * of[0] + weight[:, 1:] * of[1]
        chosen = torch.where(y[:, None] == 1, of[1], of[0])
        return torch.where(y[:, None] == NO_CLASS, both, chosen)


def points(count, scale=1.0):
    return scale * torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


X, SIGMA, Y = points(24, 2.0), torch.logspace(-2, 1, 24, dtype=torch.float64), torch.arange(24) % 2
MODEL = Denoiser(Classes(), free)


def by_class(guidance, **changes):
    return GuidedDenoiser(MODEL.net, MODEL.precond, unconditional(MODEL), guidance, **changes)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_guidance_adds_the_gradient_of_the_classifier_that_bayes_rule_gives(w):
    """D_w = D_null + w sigma^2 grad log p(y | x), with p(y | x) of the mixture."""
    x = X.clone().requires_grad_()
    variance = STD**2 + SIGMA[:, None] ** 2
    logits = torch.cat([-((x - m) ** 2).sum(1, keepdim=True) / (2 * variance) for m in (-1.0, 1.0)], dim=1)
    log_p = torch.log_softmax(logits, 1).gather(1, Y[:, None]).sum()
    (gradient,) = torch.autograd.grad(log_p, x)
    plain = Classes()(X, SIGMA, torch.full_like(Y, NO_CLASS))
    expected = guided(lambda x, sigma: plain, lambda x, sigma: w * gradient)(X, SIGMA)
    torch.testing.assert_close(by_class(Guidance(w, w))(X, SIGMA, y=Y), expected, rtol=1e-10, atol=1e-10)


def test_scale_one_is_the_model_itself_bit_for_bit():
    assert torch.equal(by_class(Guidance())(X, SIGMA, y=Y), MODEL(X, SIGMA, y=Y))


def test_it_acts_between_its_noise_levels_only():
    guidance = parse_guidance("3,0.1,2")
    inside = acts(guidance, SIGMA)
    assert inside.tolist() == [0.1 <= s <= 2 for s in SIGMA.tolist()] and 0 < inside.sum() < 24
    everywhere, here = by_class(Guidance(3, 3))(X, SIGMA, y=Y), by_class(guidance)(X, SIGMA, y=Y)
    assert torch.equal(here[inside], everywhere[inside])
    assert torch.equal(here[~inside], MODEL(X, SIGMA, y=Y)[~inside])
    slope = limited(lambda x, sigma: torch.ones_like(x), guidance)(X, SIGMA)
    assert torch.equal(slope, inside[:, None].expand(24, 2).double())


def test_a_lazy_one_evaluates_the_baseline_where_it_acts():
    lazy, net = by_class(parse_guidance("3,0.1,2"), lazy=True), MODEL.net
    for level, calls in ((5.0, 1), (1.0, 2), (0.05, 1)):
        sigma, before = torch.full((24,), level).double(), net.calls
        lazy(X, sigma, y=Y)
        assert net.calls - before == calls == lazy.evaluations(sigma)


def test_scales_of_the_rows():
    w = torch.linspace(0, 4, 24)
    rows = by_class(Guidance(0, 4)).raw(X, SIGMA, guidance=w, y=Y)[1]
    for i in (0, 7, 23):
        one = by_class(Guidance(w[i].item(), w[i].item()))(X[i : i + 1], SIGMA[i : i + 1], y=Y[i : i + 1])
        torch.testing.assert_close(rows[i : i + 1], one)


def test_a_weaker_model_of_another_preconditioning_guides():
    """Autoguidance is D + (w - 1) (D - B), whatever scalings either network has, and with a guide without classes."""
    weak = Denoiser(lambda x, t: 0.1 * x + t[:, None], EDMPrecond(time_scale=4.0))
    strong = Denoiser(lambda x, t, y: torch.tanh(x) * y[:, None], EDMPrecond())
    d, b = strong(X, SIGMA, y=Y), weak(X, SIGMA)
    ours = GuidedDenoiser(strong.net, strong.precond, without_labels(weak), Guidance(2.0, 2.0))
    torch.testing.assert_close(ours(X, SIGMA, y=Y), d + (d - b), rtol=1e-9, atol=1e-9)
    # As a teacher of sCD, which asks for the network's output.
    flow = velocity(ours, X, SIGMA, 0.5, y=Y)
    t = torch.atan(SIGMA / 0.5)[:, None]
    expected = (t.cos() * X - ours(X / t.cos(), SIGMA, y=Y)) / t.sin()
    torch.testing.assert_close(flow, expected, rtol=1e-6, atol=1e-7)


def test_guided_flows_go_deeper_into_the_class():
    sigmas = torch.cat([karras_sigmas(30, 0.01, 20.0), torch.zeros(1).double()])
    means = []
    for w in (0.0, 1.0, 3.0):
        model = by_class(Guidance(w, w))
        x = sample_heun(lambda x, s, model=model: model(x, s, y=Y), points(24, 20.0), sigmas)
        means.append((x * (2 * Y - 1)[:, None]).mean().item())
    assert abs(means[0]) < 0.6 < means[1] < means[2] and means[1] == pytest.approx(1, abs=0.15)


def test_a_student_learns_the_flow_of_the_guided_teacher():
    """The target of CD is f- at the end of a solver step of the guided flow."""
    teacher = by_class(Guidance(2.0, 2.0))
    student = Denoiser(lambda x, t, y: 0.5 * x, free)
    t, r = SIGMA + 0.5, SIGMA
    draw = Draw(t=t, r=r, noise=points(24), weight=torch.ones(24))
    losses = consistency_losses(
        Roles(student, teacher=teacher),
        X,
        draw,
        distance=make_distance("l2"),
        weight=ones,
        ode_solver="heun",
        y=Y,
    )["loss"]
    x_t = X + t[:, None] * draw.noise
    x_r = heun_step(lambda x, s: teacher(x, s, y=Y), x_t, t, r)
    torch.testing.assert_close(losses, (0.25 * (x_t - x_r) ** 2).mean(1))
    plain = heun_step(lambda x, s: MODEL(x, s, y=Y), x_t, t, r)
    assert (x_r - plain).abs().max() > 0.01


SCALES = torch.linspace(1, 4, 24)


def exact_student(x, times, y, guidance):
    """A network that is told its scale and has learned the guided denoiser; `free` scalings leave it as it is."""
    return by_class(Guidance(1, 4)).raw(x, times, guidance=guidance, y=y)[1]


def of_consistency(teacher, student, draw, cond):
    arguments = {"distance": make_distance("l2"), "weight": ones, "ode_solver": "euler"}
    return consistency_losses(Roles(student, teacher=teacher), X, draw, **arguments, **cond)


def of_sct(teacher, student, draw, cond):
    tangent = Tangent(warmup=0, step=0.05)
    return trigflow_losses(Roles(student, teacher=teacher), X, draw, tangent=tangent, share=1.0, **cond)


def of_flow_map(teacher, student, draw, cond):
    """On the linear path the map's last step is the guided velocity of the row."""
    objective = FlowMapObjective(
        law=TimeLaw(), identity="progressive", source="teacher", weight=Adaptive(0.0)
    )
    share = torch.full_like(draw.t, 0.5)
    linear = replace(draw, t=draw.t / (1 + draw.t), r=draw.r / (1 + draw.r), share=share)
    net = lambda z, t, second, **cond: student.net(z, t, **cond)  # noqa: E731
    roles = Roles(FlowMap(net, FlowPrecond()), teacher=teacher)
    return objective.forward(roles, X, linear, 0, **cond)


@pytest.mark.parametrize("losses", [of_consistency, of_sct, of_flow_map])
def test_a_student_is_told_the_scale_that_its_teacher_follows(losses):
    """The losses of rows with scales of their own are those of runs with one scale, row by row."""
    student, teacher = Denoiser(exact_student, free), by_class(Guidance(1, 4))
    draw = Draw(t=SIGMA + 0.5, r=SIGMA + 0.2, noise=points(24), weight=torch.ones(24))
    drawn = losses(teacher, student, draw, {"y": Y, "guidance": SCALES})["loss"]
    for i in (0, 5, 11, 20):
        w = SCALES[i].item()
        one = by_class(Guidance(w, w))
        fixed = losses(
            one, Denoiser(lambda *a, w=w, **k: exact_student(*a, guidance=SCALES.new_full((24,), w), **k), free),
            draw, {"y": Y},
        )["loss"]  # fmt: skip
        torch.testing.assert_close(drawn[i], fixed[i], rtol=1e-6, atol=1e-8)
    swapped = losses(teacher, student, draw, {"y": Y, "guidance": SCALES.flip(0)})["loss"]
    assert (swapped - drawn).abs().max() > 1e-3


def test_the_flag_is_read():
    assert parse_guidance("2") == Guidance(2, 2) and parse_guidance("1").plain
    assert parse_guidance("1:4,0.3,5") == Guidance(1, 4, 0.3, 5) and parse_guidance("1:4").drawn
    assert parse_guidance("0").sigma_high == math.inf and not parse_guidance("0").plain
    for text in ("", "x", "-1", "2,1", "4:1", "nan", "inf", "2,5,0.3", "2,-1,3", "1:2:3", "2,0,1,3"):
        with pytest.raises(UserError, match="--guidance"):
            parse_guidance(text)


def test_denoisers_stay_values():
    assert replace(by_class(Guidance(2, 2)), lazy=True).guidance == Guidance(2, 2)
