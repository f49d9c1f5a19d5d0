"""The general objective: at the exact map every cell's target is the map itself, on every path; which cell is whose."""

import math

import pytest
import torch

from cm.commands.cli import parse_config
from cm.config.rows import OBJECTIVES
from cm.config.scripts import CmTrainConfig
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.flow_maps import FlowMap, average_velocity, jump, velocity
from cm.diffusion.paths import EDM, LINEAR, VP_COSINE, trigonometric
from cm.diffusion.precond import EDMPrecond, FlowPrecond
from cm.errors import UserError
from cm.objectives.base import Draw, Roles
from cm.objectives.flow_map import Adaptive, FlowMapObjective, Split, eulerian, point, times
from cm.objectives.flow_times import LATEST, TimeLaw
from cm.sampling.jumps import sample_jumps
from cm.sampling.levels import of_jumps
from cm.seeding import StepRandom
from tests.helpers.golden_data import later

MU, S = 0.3, 0.6
PATHS = {"linear": LINEAR, "edm": EDM, "vp": VP_COSINE, "trigonometric": trigonometric(0.5)}


def gaussian_u(z, t, y=None, second=None):
    """Average velocity of N(MU, S^2) on the linear path, without a division by t - r."""
    t, h = (v.reshape(-1, *[1] * (z.ndim - 1)) for v in (t, second))
    r = t - h
    variance = [(1 - v) ** 2 * S**2 + v**2 for v in (t, r)]
    ratio = (variance[1] / variance[0]).sqrt()
    return (z - (1 - t) * MU) * (t + r - S**2 * (2 - t - r)) / (variance[0] * (1 + ratio)) - MU


def gaussian_net(c_in_x, c_noise):
    """EDM's network F of the exact denoiser; sigma from its clock."""
    sigma = (4 * c_noise).exp().reshape(-1, *[1] * (c_in_x.ndim - 1))
    sd = 0.5
    x = c_in_x * (sigma**2 + sd**2).sqrt()
    denoised = (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)
    skip = sd**2 / (sigma**2 + sd**2)
    return (denoised - skip * x) / (sigma * sd / (sigma**2 + sd**2).sqrt())


EXACT = FlowMap(gaussian_u, FlowPrecond())
TEACHER = Denoiser(gaussian_net, EDMPrecond(0.5, 1.0))


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x0 = MU + S * torch.randn(5, 1, 2, 2, generator=generator, dtype=dtype)
    noise = torch.randn(5, 1, 2, 2, generator=generator, dtype=dtype)
    t = torch.tensor([0.3, 0.9, 0.55, 0.99, 0.4], dtype=dtype)
    r = torch.tensor([0.1, 0.5, 0.5, 0.02, 0.4], dtype=dtype)
    share = torch.tensor([0.3, 0.5, 0.7, 0.4, 0.6], dtype=dtype)
    return x0, Draw(t=t, r=r, noise=noise, weight=torch.ones_like(t), share=share)


def target(objective, model, teacher, v, step=0):
    """(u, its target) of the rows with r < t where the velocity of image and noise is v(z, t)."""
    x0, draw = batch()
    t, r = times(objective.path, draw)
    z, _ = point(objective.path, x0, draw.noise, t)
    masks = torch.get_rng_state(), None
    share = draw.share if objective.source == "self" else None
    found = objective.target(Roles(model, None, teacher), z, t, r, v(z, t), share, step, masks, {})
    return average_velocity(model, z, t, r, objective.path), found, z, t, r


CELLS = [
    *(
        (identity, source)
        for identity in ("eulerian", "lagrangian", "progressive")
        for source in ("teacher", "self")
    ),
    ("eulerian", "data"),
    ("progressive", "data"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("identity", "source"), CELLS)
def test_the_exact_map_is_its_own_target(identity, source, path):
    # A first step by a velocity is Euler's: right as it shrinks, while two steps of the map may be of any size.
    by_euler = identity == "progressive" and source != "self"
    share, tolerance = (1e-6, 1e-4) if by_euler else (0.3, 1e-8)
    objective = FlowMapObjective(
        law=TimeLaw(), identity=identity, source=source, path=PATHS[path], split=Split(share, share)
    )
    teacher = TEACHER if source == "teacher" else None

    def exact(z, t):
        return velocity(EXACT, z, t, objective.path)

    u, found, *_ = target(objective, EXACT, teacher, exact)
    torch.testing.assert_close(found, u, rtol=tolerance, atol=tolerance)
    # Image and noise scatter around the flow's velocity; the mean of two such targets is the map's again.
    if source == "data" and not by_euler:
        both = [target(objective, EXACT, None, lambda z, t, s=s: exact(z, t) + s)[1] for s in (-0.4, 0.4)]
        off = (both[0] - u).abs().amax((1, 2, 3))
        assert (off[:4] > 1e-3).all()
        torch.testing.assert_close((both[0] + both[1]) / 2, u, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("identity", "source"), CELLS)
def test_a_wrong_map_is_not_its_own_target(identity, source):
    """A map bent where r < t only, so that the diagonal stays right."""
    objective = FlowMapObjective(law=TimeLaw(), identity=identity, source=source)

    def bent(z, t, y=None, second=None):
        gap = second.reshape(-1, 1, 1, 1)
        return gaussian_u(z, t, second=second) + 0.3 * gap * z.sin()

    model = FlowMap(bent, FlowPrecond())
    u, found, *_ = target(
        objective, model, TEACHER if source == "teacher" else None, lambda z, t: velocity(EXACT, z, t)
    )
    assert ((found - u).abs().amax((1, 2, 3))[:4] > 1e-3).all()
    torch.testing.assert_close(found[4], u[4])


@pytest.mark.parametrize("name", ["gauss", "mixture"])
def test_the_eulerian_identity_on_golden_maps(name):
    g = later("meanflow")
    z, t, r, v, u, dudt, z_r = (
        g.tensor(f"oracle/{name}/{k}") for k in ("z", "t", "r", "v", "u", "dudt", "z_r")
    )
    found = eulerian(None, z[:, None], t, r, v[:, None], lambda *_: (None, dudt[:, None]))[:, 0]
    torch.testing.assert_close(found, u, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(z - (t - r) * u, z_r, rtol=1e-9, atol=1e-9)


def test_the_closed_form_is_the_golden_one():
    g = later("meanflow")
    about = g.config["oracle_gauss"]
    z, t, r = (g.tensor(f"oracle/gauss/{k}") for k in ("z", "t", "r"))
    scale = (
        S / about["s"]
    )  # the same Gaussian, moved and stretched, is another; compare by the formula of the map
    variance = [(1 - v) ** 2 * about["s"] ** 2 + v**2 for v in (t, r)]
    phi = (1 - r) * about["mu"] + (variance[1] / variance[0]).sqrt() * (z - (1 - t) * about["mu"])
    torch.testing.assert_close(phi, g.tensor("oracle/gauss/z_r"), rtol=1e-9, atol=1e-9)
    assert scale != 1


def test_the_cells_of_the_papers():
    x0, draw = batch()
    t, r, z = draw.t, draw.r, point(LINEAR, x0, draw.noise, draw.t)[0]
    v = draw.noise - x0
    column = [c.reshape(-1, 1, 1, 1) for c in (t, r)]

    def net(z, t, y=None, second=None):
        return (z + t.reshape(-1, 1, 1, 1)).sin() + second.reshape(-1, 1, 1, 1) * z.square()

    model = FlowMap(net, FlowPrecond())
    off = (r < t).reshape(-1, 1, 1, 1)

    def u(z, t, r):
        return net(z, t, second=t - r)

    def found(source, split):
        objective = FlowMapObjective(law=TimeLaw(), identity="progressive", source=source, split=split)
        share = draw.share if split.uniform else None
        return objective.target(Roles(model), z, t, r, v, share, 50, (torch.get_rng_state(), None), {})

    # Shortcut models (Frans et al. 2025, Eq. 4): s(z, t, 2d) is the mean of two steps of d.
    d = (t - r) / 2
    first = u(z, t, t - d)
    second = u(z - d.reshape(-1, 1, 1, 1) * first, t - d, r)
    torch.testing.assert_close(found("self", Split()), torch.where(off, (first + second) / 2, v))
    # PSD with a middle drawn for each row: the semigroup, written as ends of steps.
    middle = t - draw.share * (t - r)
    at = [c.reshape(-1, 1, 1, 1) for c in (t - middle, middle - r)]
    x_s = z - at[0] * u(z, t, middle)
    end = x_s - at[1] * u(x_s, middle, r)
    torch.testing.assert_close(
        torch.where(off, z - (column[0] - column[1]) * found("self", Split(uniform=True)), end), end
    )
    # alpha-Flow: alpha v + (1 - alpha) u(z_s, s, r), s = alpha r + (1 - alpha) t, alpha from 0.9 to 0.1 in 100 steps.
    alpha = 0.9 * (1 / 9) ** 0.5
    s = alpha * r + (1 - alpha) * t
    z_s = z - (t - s).reshape(-1, 1, 1, 1) * v
    mixed = alpha * v + (1 - alpha) * u(z_s, s, r)
    alpha_target = found("data", Split(0.9, 0.1, 100))
    torch.testing.assert_close(alpha_target, torch.where(off, mixed, v))
    # SoFlow: f(z_t, t, r) -> f(z_l, l, r); its error is (t - r) times that of u.
    f_t = z - (column[0] - column[1]) * u(z, t, r)
    f_l = z_s - (s - r).reshape(-1, 1, 1, 1) * u(z_s, s, r)
    gap = torch.where(off, column[0] - column[1], 0)
    torch.testing.assert_close((f_t - f_l).abs() * off, gap * (u(z, t, r) - alpha_target).abs())
    # alpha -> 0 is MeanFlow: the errors, in units of alpha, are its errors.
    meanflow = FlowMapObjective(law=TimeLaw()).target(
        Roles(model), z, t, r, v, None, 0, (torch.get_rng_state(), None), {}
    )
    error = (found("data", Split(1e-6, 1e-6)) - u(z, t, r)) / 1e-6
    torch.testing.assert_close(error[r < t], (meanflow - u(z, t, r))[r < t], rtol=1e-4, atol=1e-4)


def test_ends_of_steps_are_compared_where_the_gap_has_a_power():
    """Rows with r = t, whose gap is nothing, count as they do without it."""
    wrong = FlowMap(lambda z, t, second: gaussian_u(z, t, second=second) + 0.1, FlowPrecond())
    x0, draw = batch()
    losses = [
        FlowMapObjective(law=TimeLaw(), weight=Adaptive(0.0), gap_power=power).forward(
            Roles(wrong), x0, draw, 0
        )["loss"]
        for power in (0.0, 2.0)
    ]
    gap = draw.t - draw.r
    torch.testing.assert_close(losses[1] / losses[0], torch.where(gap > 0, gap**2, 1.0))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_times_of_a_path_are_the_levels_of_the_linear_one(path):
    _, draw = batch()
    for found, drawn in zip(times(path, draw), (draw.t, draw.r)):
        torch.testing.assert_close(path.level(found), drawn / (1 - drawn))


@pytest.mark.parametrize("identity", ["eulerian", "lagrangian", "progressive"])
def test_every_pass_of_a_target_drops_out_under_the_masks_of_the_one_that_learns(identity):
    """A map that is constant but for its mask is what it should be, where all its passes have the same mask."""
    seen = []

    def net(z, t, second):
        seen.append(torch.rand((), dtype=z.dtype))
        return seen[-1] + 0 * z

    x0, draw = batch()
    objective = FlowMapObjective(law=TimeLaw(), identity=identity, source="self", weight=Adaptive(0.0))
    loss = objective.forward(Roles(FlowMap(net, FlowPrecond())), x0, draw, 0)["loss"]
    assert len(seen) == 3 and (loss[draw.r < draw.t] < 1e-20).all()


def test_any_grid_of_jumps_lands_on_one_image():
    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = MU + S / math.sqrt(S**2 + 80**2) * (80 * noise - MU)
    for spacing in ("linear", "trigonometric", "karras"):
        for steps in (1, 2, 4, 8):
            levels = of_jumps(steps, 0.002, 80.0, 7.0, spacing=spacing)
            assert len(levels) == steps + 1 and levels[0] == pytest.approx(80) and levels[-1] == 0
            found = sample_jumps(EXACT, 80 * noise, levels)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    middle = of_jumps(2, 0.002, 1e6, 7.0)[1]
    assert middle == pytest.approx(1.0, rel=1e-5)  # t = 1/2


def test_a_flow_map_is_a_denoiser_and_a_consistency_function():
    x, sigma = batch()[0] * 3, torch.tensor([0.1, 0.5, 1.0, 5.0, 70.0], dtype=torch.float64)
    column = sigma.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(EXACT.denoiser()(x, sigma), (S**2 * x + column**2 * MU) / (S**2 + column**2))
    torch.testing.assert_close(EXACT(x, sigma), MU + S / (S**2 + column**2).sqrt() * (x - MU))
    torch.testing.assert_close(TEACHER(x, sigma), EXACT.denoiser()(x, sigma))
    half = jump(EXACT(x, sigma, sigma / 2), x, column, column / 2)
    torch.testing.assert_close(EXACT(half, sigma / 2), EXACT(x, sigma))


def test_dyadic_times():
    law = TimeLaw("dyadic", share=0.5, octaves=3)
    octave, place = torch.tensor([0.0, 0.4, 0.4, 0.99, 0.1]), torch.tensor([0.7, 0.0, 0.6, 0.99, 0.2])
    t, r = law.dyadic(octave, place, torch.tensor([0.9, 0.9, 0.9, 0.9, 0.1]))
    torch.testing.assert_close(t, torch.tensor([1.0, 0.5, 1.0, 1.0, 0.25]), atol=2e-6, rtol=0)
    torch.testing.assert_close(r, torch.tensor([0.0, 0.0, 0.5, 0.75, 0.25]), atol=0, rtol=0)
    t, r = law.draw(StepRandom(0, 0, 0, 4096, 4096))
    learned = r < t
    assert (r <= t).all() and (t <= 1).all() and 0.47 < learned.float().mean() < 0.53
    gaps, counts = (t - r)[learned].mul(1024).round().unique(return_counts=True)
    assert gaps.tolist() == [256, 512, 1024] and counts.min() > 0.9 * counts.max()
    times, counts = t[~learned].mul(1024).round().unique(return_counts=True)
    assert times.tolist() == [128 * k for k in range(1, 9)] and counts.min() > 0.7 * counts.max()


def test_dyadic_steps_begin_where_samples_do():
    """One step of a sample is one that was learned: from the model's largest noise level, over the whole gap."""
    for preset, latest in (("digits_shortcut", LATEST), ("fashion_shortcut", 80 / 81)):
        config = parse_config(CmTrainConfig, ["--preset", preset, "--data_dir", "d"])
        law = OBJECTIVES.load("flow_map")(config).law
        t, r = law.draw(StepRandom(0, 0, 0, 1024, 1024))
        assert t.max().item() == pytest.approx(latest, rel=1e-6) and ((t == t.max()) & (r == 0)).any()


def test_draws_belong_to_rows():
    objective = FlowMapObjective(law=TimeLaw("capped"), split=Split(uniform=True))
    x0 = torch.zeros(8, 1, 2, 2)
    whole = objective.draw(x0, 3, StepRandom(0, 3, 0, 8, 8))
    part = objective.draw(x0[:3], 3, StepRandom(0, 3, 4, 7, 8))
    for name in ("t", "r", "noise", "share"):
        assert torch.equal(getattr(whole, name)[4:7], getattr(part, name))
    assert whole[2:5].share.shape == (3,)


@pytest.mark.parametrize("kind", ["sorted", "capped", "dyadic"])
def test_times_of_a_row_are_the_same_in_any_batch(kind):
    """To the last bit, whichever rows a rank has."""
    law = TimeLaw(kind, mean=-0.4, std=1.3)
    whole = law.draw(StepRandom(0, 3, 0, 200, 200))
    for size in (1, 3, 7, 50):
        for start in range(0, 200 - size, 9):
            part = law.draw(StepRandom(0, 3, start, start + size, 200))
            assert all(torch.equal(a[start : start + size], b) for a, b in zip(whole, part))


def test_presets_make_the_cells():
    def made(preset, *flags):
        config = parse_config(CmTrainConfig, ["--preset", preset, "--data_dir", "d", *flags])
        return OBJECTIVES.load(config.training_mode)(config)

    meanflow = made("digits_meanflow")
    assert (meanflow.identity, meanflow.source, meanflow.path) == ("eulerian", "data", LINEAR)
    general = {"training_mode": "flow_map", "flow_velocity": "data", "identity": "eulerian"}
    flags = [part for name, value in general.items() for part in (f"--{name}", value)]
    same = made("digits_meanflow", *flags)
    assert (same.law, same.weight, same.identity, same.source) == (
        meanflow.law,
        meanflow.weight,
        "eulerian",
        "data",
    )
    expected = {
        "digits_shortcut": ("progressive", "self", Split()),
        "digits_esd": ("eulerian", "self", Split()),
        "digits_lsd": ("lagrangian", "self", Split()),
        "digits_psd": ("progressive", "self", Split(uniform=True)),
        "digits_alphaflow": ("progressive", "data", Split(0.9, 0.05, 1000)),
        "digits_soflow": ("progressive", "data", Split(0.9, 1 / 64, 1000)),
    }
    for preset, cell in expected.items():
        objective = made(preset)
        assert (objective.identity, objective.source, objective.split) == cell, preset
    assert made("digits_soflow").gap_power == 2
    assert made("digits_lmd", "--teacher_model_path", "x").needs_teacher
    assert made("cifar10_meanflow_v1").law == TimeLaw(
        "capped", -0.6, 1.6, -4.0, 1.6, 0.75, latest=1e6 / (1 + 1e6)
    )
    with pytest.raises(UserError, match="--identity lagrangian asks for the velocity where a step ends"):
        made("digits_lsd", "--flow_velocity", "data")
