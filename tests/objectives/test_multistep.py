"""Multistep consistency models: golden numbers of the loss, the exact segment map, the draws; aDDIM."""

import math
from types import SimpleNamespace

import pytest
import torch

from cm.commands.cli import parse_config
from cm.config.choices import ADDIM_VARIANCES
from cm.config.derived import stored_config
from cm.config.scripts import CmTrainConfig
from cm.diffusion.alpha_sigma import AlphaSigma
from cm.diffusion.ddim import addim, ddim, inverse_ddim, of_snr
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.grid import Grid
from cm.diffusion.paths import VP_COSINE
from cm.errors import UserError
from cm.objectives.base import Draw, Roles
from cm.objectives.distances import make_distance
from cm.objectives.multistep import Intervals, MultistepObjective, multistep_losses
from cm.sampling.ode import sample_addim, sample_euler
from cm.seeding import StepRandom
from cm.training.factory import create_objective
from tests.helpers.analytic import Gaussian, free, ones
from tests.helpers.golden_data import later as golden
from tests.helpers.later import pair_weight

MCM = golden("multistep_cm")
NORM = make_distance("pseudo-huber", c=0.0)
VARIANCE = {"rule": "snr", "eta": "error", "none": "none"}


def tensors(prefix):
    return {name.removeprefix(f"{prefix}/"): MCM.tensor(name) for name in MCM.keys(f"{prefix}/")}


def level(t):
    """Of their time; t = 1 has 1.6e16, which float64 carries."""
    return VP_COSINE.level(t)


def column(values, like):
    return values.reshape(-1, *[1] * (like.ndim - 1))


class Mlp:
    """A stored network of z and t, as a denoiser of x = z / alpha at level sigma."""

    def __init__(self, name):
        self.p = {k: v.requires_grad_() for k, v in tensors(name).items()}

    def __call__(self, x, sigma):
        t = VP_COSINE.time(sigma)
        alpha, beta = (column(a, x) for a in (VP_COSINE.alpha(t), VP_COSINE.beta(t)))
        z, p = alpha * x, self.p
        h = torch.tanh(torch.cat([z, t[:, None]], 1) @ p["W1"].T + p["b1"])
        v = torch.tanh(h @ p["W2"].T + p["b2"]) @ p["W3"].T + p["b3"]
        return alpha * z - beta * v


def close(found, expected, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


# ---- golden ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MCM.config["cases"])
def test_golden_losses(case):
    about, c = MCM.config["cases"][case], tensors(f"case/{case}")
    roles = Roles(Mlp("student"), Mlp("target"), Mlp("teacher") if about["mode"] == "cd" else None)
    draw = Draw(t=level(c["t"]), r=level(c["s"]), noise=c["eps"], weight=torch.ones(6))
    how = {
        "weight": lambda t, r: pair_weight("snr+1", t, r, 0.5),
        "variance": ADDIM_VARIANCES.load(VARIANCE[about["x_var"]]),
    }
    loss = multistep_losses(roles, c["x"], draw, level(c["t_step"]), distance=NORM, **how)["loss"]
    close(loss, c["loss_l2"], rtol=1e-8)
    loss.mean().backward()
    for name, p in roles.student.p.items():
        expected = c[f"grad_l2/{name}"]
        close(p.grad, expected, atol=1e-9 * expected.abs().max().item())
    assert all(p.grad is None for p in roles.target.p.values())
    squares = multistep_losses(roles, c["x"], draw, level(c["t_step"]), distance=make_distance("l2"), **how)
    close(squares["loss"], c["loss_squared_mean"], rtol=1e-8)


def test_golden_maps():
    m = tensors("map")
    t, s = level(m["t"]), level(m["s"])
    alpha_t, alpha_s = (column(VP_COSINE.alpha(m[name]), m["z"]) for name in "ts")
    x = m["z"] / alpha_t
    moved = ddim(x, m["x"], t, s)
    close(alpha_s * moved, m["ddim"])
    close(inverse_ddim(moved, x, t, s), m["inv_ddim_of_ddim"], atol=1e-7)
    close(alpha_s * addim(x, m["x"], t, s, m["x_var"]), m["addim"])
    schedule = tensors("schedule")
    close(of_snr(level(schedule["t"])), schedule["x_var_rule"])
    close(pair_weight("snr+1", level(schedule["t"]), None, 0.5), schedule["weight_snr_plus_1"])


def test_golden_samples():
    """From t = 1 down: S steps of the student by Euler, the teacher by DDIM and by aDDIM."""
    noise, student, teacher = MCM.tensor("sample/noise"), Mlp("student"), Mlp("teacher")
    for name in MCM.keys("sample/"):
        if name == "sample/noise":
            continue
        steps = int(name.rpartition("_")[2])
        sigmas = level(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
        model = student if "student" in name else teacher
        eta = (
            0.1 if "addim" in name else 0.0
        )  # without it Euler's steps, in a form that 1.6e16 does not spoil
        close(sample_addim(model, noise * sigmas[0], sigmas, eta=eta), MCM.tensor(name), rtol=1e-7, atol=1e-7)


def test_golden_curriculum():
    for k, rounded in zip(*(MCM[f"curriculum/{n}"].tolist() for n in ("iteration", "teacher_steps_rounded"))):
        assert Intervals(1)(k) == rounded
        assert Intervals(8)(k) == 8 * round(Intervals(1)(k) / 8) or abs(Intervals(8)(k) - rounded) <= 8


@pytest.mark.parametrize("segments", [1, 2, 4, 8, 16])
def test_golden_segments(segments):
    """t, s and the start of the segment for every position of t on the grid."""
    s, count = tensors(f"segment/{segments}"), 64
    grid = SimpleNamespace(sigma=lambda position, intervals: 1 - position.double() / intervals)
    objective = make(grid=grid, segments=segments)
    index = count - (s["step"] * (count // segments) + s["n_rel"])
    draw = objective.at(index, 0, torch.zeros(40, 1))
    close(draw.t, s["t"])
    close(draw.r, s["s"])
    close(objective.start(draw, 0), s["t_step"])


# ---- closed form -------------------------------------------------------------------------------------


def make(grid=None, segments=4, distillation=True, variance="none", **changes):
    schedule = SimpleNamespace(copies_student=True)
    return MultistepObjective(
        schedule,
        NORM,
        ones,
        grid=grid or AlphaSigma("cosine"),
        intervals=Intervals(segments, 64, 64),
        variance=ADDIM_VARIANCES.load(variance),
        distillation=distillation,
        **changes,
    )


DATA = Gaussian(0.25, 0.45)


def exact(start):
    """The prediction whose DDIM step from (x, t) to `start` lands on the exact flow."""
    return lambda x, t: inverse_ddim(DATA.flow(x, t, start), x, t, start)


def test_golden_oracle():
    o = tensors("oracle")
    t, start = level(o["t"]), level(o["t_step"])
    alpha = VP_COSINE.alpha(o["t"])
    found = exact(start[:, None])((o["z"] / alpha)[:, None], t[:, None])[:, 0]
    close(found, o["x_hat_exact"], rtol=1e-7, atol=1e-8)


def test_the_exact_segment_map_is_stationary_for_an_exact_teacher():
    """A teacher whose step is exact, and the segment map as target: the student's target is the segment map."""
    objective, x0 = make(), DATA.sample((64, 3), torch.Generator().manual_seed(0))
    draw = objective.draw(x0, 0, StepRandom(0, 0, 0, 64, 64))
    draw = Draw(**{f: getattr(draw, f).double() for f in ("t", "r", "noise", "weight")}, index=draw.index)
    start = objective.start(draw, 0).double()
    first = (draw.r == start)[:, None]
    target = lambda x, t: torch.where(first, torch.nan, exact(start)(x, t))  # noqa: E731
    teacher = lambda x, t: inverse_ddim(DATA.flow(x, t, draw.r), x, t, draw.r)  # noqa: E731
    roles = Roles(exact(start), target, teacher)
    how = {"distance": NORM, "weight": ones, "variance": objective.variance}
    assert multistep_losses(roles, x0, draw, start, **how)["loss"].max() < 1e-7
    wrong = Roles(lambda x, t: exact(start)(x, t) + 0.1, target, teacher)
    close(
        multistep_losses(wrong, x0, draw, start, **how)["loss"],
        torch.full((64,), 0.1 * 3**0.5).double(),
        1e-6,
    )


def test_training_re_noises_and_reads_no_teacher():
    """Without a teacher x_s has the same noise; S = 1 then is consistency training with an Euler map."""
    objective, x0 = make(segments=1, distillation=False), DATA.sample((8, 3))
    draw = objective.draw(x0, 0, StepRandom(0, 0, 0, 8, 8))
    seen = []
    student = Denoiser(lambda x, t: seen.append((x, t)) or 0 * x, free)
    with pytest.raises(ValueError, match="takes none"):
        objective.forward(Roles(student, teacher=student), x0, draw, 0)
    objective.forward(Roles(student), x0, draw, 0)
    (x_t, _), (x_s, s) = seen
    close(x_t - x_s, draw.noise.double() * (draw.t - draw.r)[:, None].double(), rtol=1e-6, atol=1e-6)
    assert ((s == draw.r) | (draw.r == objective.start(draw, 0))).all()


@pytest.mark.parametrize("grid", [Grid(), AlphaSigma("cosine")], ids=["karras", "cosine"])
def test_draws_fill_the_segments(grid):
    objective = make(grid=grid, segments=4)
    draw = objective.draw(torch.zeros(4000, 1), 0, StepRandom(0, 0, 0, 4000, 4000))
    start = objective.start(draw, 0)
    assert (start <= draw.r).all() and (draw.r < draw.t).all() and draw.index.unique().numel() == 64
    assert start.unique().numel() == 4
    torch.testing.assert_close(start.min().item(), 0.002, rtol=1e-4, atol=0)
    torch.testing.assert_close(draw.t.max().item(), 80.0, rtol=1e-4, atol=0)
    # The next step of a sample begins where this one ends.
    ends = grid.sigma(torch.arange(5), 4)
    assert all((ends - s).abs().min() < 1e-5 * s for s in start.unique())


def test_addim_without_variance_is_euler_and_with_it_the_noise_is_longer():
    x, sigmas = 80 * torch.randn(6, 4, dtype=torch.float64), torch.tensor([80.0, 5.0, 1.0, 0.1]).double()
    close(sample_addim(DATA.denoise, x, sigmas, eta=0.0), sample_euler(DATA.denoise, x, sigmas))
    t, r, var = torch.full((6,), 5.0).double(), torch.full((6,), 2.0).double(), torch.full((6,), 0.3).double()
    clean = torch.zeros_like(x)
    longer = addim(x, clean, t, r, var).square().sum(1)
    noise = (x / 5).square().sum(1)
    close(longer, 4 * noise + 4 * (1 - 2 / 5) ** 2 * 0.3)


# ---- flags -------------------------------------------------------------------------------------------


def test_flags_make_the_objective():
    flags = "--training_mode multistep_distillation --segments 8 --diffusion_schedule cosine --loss_norm l2 "
    config = parse_config(
        CmTrainConfig, [*flags.split(), "--addim_variance", "error", "--teacher_steps", "32"]
    )
    objective = create_objective(config)
    assert stored_config(config)["steps"] == 8
    assert objective.needs_teacher and not objective.needs_target and objective.grid.name == "cosine"
    assert objective.num_scales(0) == 32 and objective.num_scales(10**6) == 1280
    assert objective.variance is ADDIM_VARIANCES.load("error")
    training = create_objective(
        parse_config(
            CmTrainConfig,
            ["--training_mode", "multistep_training", "--loss_norm", "l2", "--start_ema", "0.9"],
        )
    )
    assert not training.needs_teacher and training.needs_target and isinstance(training.grid, Grid)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (
            "--training_mode multistep_training --addim_variance snr",
            "for --training_mode multistep_distillation",
        ),
        ("--training_mode multistep_training --scale_mode doubling", "--scale_mode must be fixed"),
        ("--training_mode multistep_distillation --teacher_steps 0", "--teacher_steps must be at least 1"),
        ("--training_mode sct --boundary zero --diffusion_schedule vp", "progdist or multistep_distillation"),
    ],
)
def test_bad_flags(flags, match):
    with pytest.raises(UserError, match=match):
        parse_config(CmTrainConfig, flags.split())


def test_levels_are_where_mathematics_has_them():
    assert level(torch.tensor(0.5).double()).item() == pytest.approx(1) and math.isfinite(
        level(torch.ones(1))
    )
