"""CTM: golden losses and gradients, its grid and laws; the exact map is stationary; flags."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cm.commands.cli import parse_config
from cm.config.scripts import CmTrainConfig
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.flow_maps import FlowMap
from cm.diffusion.grid import Grid
from cm.diffusion.precond import EDMPrecond
from cm.errors import UserError
from cm.nn import Dropout
from cm.objectives.base import Roles
from cm.objectives.ctm import (
    TrajectoryDraw,
    TrajectoryGrid,
    TrajectoryObjective,
    balance,
    jumped,
    last_weight,
)
from cm.objectives.distances import make_distance
from cm.seeding import StepRandom
from cm.training.factory import create_objective
from tests.helpers.analytic import Gaussian, free, ones
from tests.helpers.golden_data import later as golden
from tests.helpers.later import pair_weight

CTM = golden("ctm")
L2 = make_distance("l2")


class Mlp(nn.Module):
    """A stored network of (c_in x, ln(t)/4, ln(s)/4); the teacher's knows no s."""

    def __init__(self, name, dtype=torch.float64):
        super().__init__()
        for key in ("W1", "b1", "W2", "b2", "W3", "b3"):
            self.register_parameter(key, nn.Parameter(CTM.tensor(f"{name}/{key}").to(dtype)))

    def forward(self, x, t, second=None):
        clocks = [c[:, None].to(self.W1.dtype) for c in (t, second) if c is not None]
        h = torch.tanh(torch.cat([x.flatten(1), *clocks], 1) @ self.W1.T + self.b1)
        return (torch.tanh(h @ self.W2.T + self.b2) @ self.W3.T + self.b3).reshape(x.shape)


def roles(self_learn=False):
    precond = EDMPrecond(time_scale=1.0)
    networks = {name: FlowMap(Mlp(name), precond) for name in ("student", "target")}
    networks["teacher"] = Denoiser(Mlp("teacher"), precond)
    networks["target"].net.requires_grad_(False)
    return Roles(**networks | ({"teacher": None} if self_learn else {}))


def objective(points=18, weight=ones, **changes):
    schedule = lambda step: (0.999, points)  # noqa: E731
    options = {"distillation": True, "dsm": 0.0, "law": TrajectoryGrid(Grid(), points), **changes}
    return TrajectoryObjective(schedule, L2, weight, **options)


def close(found, expected, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), rtol=rtol, atol=atol
    )


# ---- golden ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CTM.config["cases"])
def test_golden_losses(case):
    about = CTM.config["cases"][case]
    c = {k.removeprefix(f"case/{case}/"): CTM.tensor(k) for k in CTM.keys(f"case/{case}/")}
    found = roles(about["self_learn"])
    how = {
        "inner": {"model_sg": "student", "target_model_sg": "target", "no": "none"}[about["target_inner"]],
        "distillation": not about["self_learn"],
        "iterate": "iter" in case,
        "adaptive": about["adaptive"],
        "dsm": float(about["dsm"]),
    }
    if about["weight"] == "uniform_g":
        how["weight"] = lambda t, s: pair_weight("jump", t, s, 0.5)
    loss = objective(about["scales"], **how)
    draw = TrajectoryDraw(
        t=c["t"].double(),
        r=c["s"].double(),
        noise=c["noise"].double(),
        weight=torch.ones(4),
        index=c["index_t"],
        heun_steps=about["heun_steps"],
        level=c["dsm/sigmas"].double() if about["dsm"] else None,
        level_noise=c["dsm/noise"].double() if about["dsm"] else None,
    )
    terms = loss.forward(found, c["x0"].double(), draw, 0)
    close(terms.get("consistency", terms["loss"]), c["consistency_loss"], rtol=1e-3, atol=1e-7)
    if about["dsm"]:
        close(terms["matching"], c["dsm/loss"], rtol=1e-3)
        weight = c["dsm/lambda"] if about["adaptive"] else 1.0
        close(terms["matching_weight"][0], weight, rtol=2e-3)
    terms["loss"].mean().backward()
    close(terms["loss"].mean().detach(), c["total"], rtol=1e-3, atol=1e-7)
    for name, p in found.student.net.named_parameters():
        expected = c[f"grad/{name}"]
        close(p.grad, expected, rtol=0, atol=2e-4 * expected.abs().max().item())
    assert all(p.grad is None for p in found.target.net.parameters())


def test_golden_jumps():
    x, t, s = (CTM.tensor(f"G/{k}").double() for k in "xts")
    student = FlowMap(Mlp("student"), EDMPrecond(time_scale=1.0))
    close(student(x, t, s), CTM["G/euler/denoised"])
    close(jumped(student, x, t, s), CTM["G/euler/G"])
    close(jumped(student, x, t, t), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("points", [18, 40])
def test_golden_grid_and_law(points):
    law = TrajectoryGrid(Grid(), points)
    close(law.level(torch.arange(points)), CTM[f"grid/{points}"], rtol=1e-5, atol=1e-9)
    expected = CTM[f"law/n_weighted_{points}"]
    drawn = torch.tensor([law.steps((i + 0.5) / 20000) for i in range(20000)])
    found = torch.bincount(drawn, minlength=points)[1:].double() / 20000
    close(found, expected, rtol=0, atol=1e-4)
    assert TrajectoryGrid(Grid(), points, 5).steps(0.999999) == 5 and law.steps(0.0) == 1


def test_golden_levels_of_matching():
    normal, uniform = CTM.tensor("dsm/normal"), CTM.tensor("dsm/uniform")
    first = torch.arange(9) < 4
    zeros = torch.zeros(5)
    span = TrajectoryGrid(Grid(), 18, dsm_span=1.0)  # the stored uniforms are those after 0.7
    for law in (TrajectoryGrid(Grid(), 18), span):
        found = law.dsm_levels(torch.cat([normal, zeros]), torch.cat([zeros[:4], uniform]), first)
        if torch.allclose(found, CTM.tensor("dsm/sigmas"), rtol=1e-4):
            return
    close(found, CTM["dsm/sigmas"])


# ---- closed form ---------------------------------------------------------------------------------------

DATA = Gaussian(0.2, 0.4)


class Exact(nn.Module):
    """g of the exact map: jumps land on the flow. Its weight is one."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))

    def forward(self, x, t, second=None):
        if second is None:
            return DATA.denoise(x, t)
        s, ratio = second[:, None], (second / t)[:, None]
        same = (s - t[:, None]).abs() < 1e-12 * s
        far = (
            DATA.flow(x, t, torch.where(same[:, 0], 0.5 * t, second)) - torch.where(same, 0.5, ratio) * x
        ) / (1 - torch.where(same, 0.5, ratio))
        return self.one * torch.where(same, DATA.denoise(x, t), far)


class Levels:
    """The network is the whole function, and its clocks are the levels."""

    def __call__(self, sigma):
        return free(sigma)

    def second(self, sigma, lower):
        return lower


def exact_roles():
    plain = FlowMap(Exact(), Levels())
    return Roles(plain, plain, None)


def test_the_exact_map_is_a_fixed_point():
    """Without a teacher, whatever the jumps: the semigroup property of the flow."""
    loss = objective(distillation=False)
    draw = loss.law.draw(torch.zeros(64, 2), StepRandom(0, 3, 0, 64, 64), False)
    x0 = DATA.sample((64, 2), torch.Generator().manual_seed(0))
    double = TrajectoryDraw(
        t=draw.t.double(), r=draw.r.double(), noise=draw.noise.double(), weight=draw.weight, index=draw.index,
        heun_steps=draw.heun_steps,
    )  # fmt: skip
    assert loss.forward(exact_roles(), x0, double, 0)["loss"].max() < 1e-10
    wrong = exact_roles()
    wrong = Roles(FlowMap(lambda x, t, second: Exact()(x, t, second) + 0.1, Levels()), wrong.target, None)
    s, t = double.r, double.t
    carried = 0.1 * (1 - s / t) * ((0.4**2 + 0.002**2) / (0.4**2 + s**2)).sqrt()
    inner = TrajectoryObjective(
        loss.schedule, L2, ones, law=loss.law, distillation=False, dsm=0.0, inner="target"
    )
    close(inner.forward(wrong, x0, double, 0)["loss"], carried**2, rtol=1e-5, atol=1e-9)


def test_matching_is_edms_loss_with_a_weight_that_balances_gradients():
    weight = torch.tensor([[2.0, -1.0]], requires_grad=True)
    first, second = 3 * weight.sum(), weight.square().sum()
    expected = (3 * math.sqrt(2)) / (2 * math.sqrt(5) + 1e-4)
    close(balance(first, second, weight), expected, rtol=1e-6)
    close(balance(first, 0 * second, weight), 1e4)
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    assert last_weight(net) is net[1].weight
    net.logvar_linear = nn.Linear(3, 1)
    assert last_weight(net) is net[1].weight, "the head of the uncertainty is no output layer"


class Masked(nn.Module):
    """A network whose output is its dropout mask; `seen` collects the masks of all passes."""

    def __init__(self, seen):
        super().__init__()
        self.drop, self.seen, self.weight = Dropout(0.5), seen, nn.Parameter(torch.ones(1, 1))

    def forward(self, x, t, second=None):
        mask = self.drop(torch.ones_like(x))
        self.seen.append(mask.detach() != 0)
        return self.weight * mask


@pytest.mark.parametrize("inner", ["student", "target"])
@pytest.mark.parametrize("alone", [False, True])
def test_all_jumps_drop_out_under_the_same_masks(inner, alone):
    seen = []
    student, target = (FlowMap(Masked(seen), EDMPrecond()) for _ in range(2))
    teacher = None if alone else Denoiser(Masked([]).eval(), EDMPrecond())
    for model in (student, target):
        model.net.drop.rows = torch.arange(6, dtype=torch.int32) * 2**28
    loss = objective(4, distillation=not alone, inner=inner)
    x0 = torch.zeros(6, 1, 4, 4)
    loss.forward(Roles(student, target, teacher), x0, loss.draw(x0, 0, StepRandom(0, 0, 0, 6, 6)), 0)
    assert len(seen) == (5 if alone else 4)
    assert all(torch.equal(seen[0], mask) for mask in seen)
    assert 0.2 < seen[0].float().mean() < 0.8


def test_draws_do_not_depend_on_the_ranks():
    law, x0 = TrajectoryGrid(Grid(), 18), torch.zeros(300, 1)
    whole = law.draw(x0, StepRandom(0, 7, 0, 300, 300), True)
    part = law.draw(x0[:100], StepRandom(0, 7, 150, 250, 300), True)
    for name in ("t", "r", "noise", "index", "level", "level_noise"):
        assert torch.equal(getattr(whole, name)[150:250], getattr(part, name)), name
    assert whole.heun_steps == part.heun_steps and whole[:5].heun_steps == whole.heun_steps
    u = law.level(whole.index + whole.heun_steps)
    assert (whole.t > u).all() and (whole.r <= u).all() and (whole.r >= 0.0019).all()
    ends = [law.draw(x0, StepRandom(0, k, 0, 300, 300), False) for k in range(40)]
    assert {d.heun_steps for d in ends} > {8, 16} and any(
        (d.r == law.level(d.index + d.heun_steps)).any() for d in ends
    )


def test_jumps_begin_and_end_wherever_they_can():
    """Of one teacher's step on four points: t on each but the last, and s on each from u to the lowest, alike."""
    law, x0 = TrajectoryGrid(Grid(), 4, most=1), torch.zeros(3000, 1)
    draw = law.draw(x0, StepRandom(0, 0, 0, 3000, 3000), True)
    assert draw.heun_steps == 1 and draw.index.unique().tolist() == [0, 1, 2]
    for index in range(3):
        ends, counts = draw.r[draw.index == index].unique(return_counts=True)
        assert torch.equal(ends, law.level(torch.arange(3, index, -1)))
        assert counts.sum() > 900 and counts.min() > 0.8 * counts.max()
    log_normal, of_grid = draw.level[:1500], draw.level[1500:]
    close(log_normal.log().mean(), -1.2, rtol=0, atol=0.1)
    close(log_normal.log().std(), 1.2, rtol=0, atol=0.1)
    assert of_grid.max() <= 80 and of_grid.min() > 0.9 * Grid().sigma(torch.tensor(0.7), 1)
    local = objective(inner="none").draw(x0[:64], 0, StepRandom(0, 0, 0, 64, 64))
    assert torch.equal(local.r, TrajectoryGrid(Grid(), 18).level(local.index + local.heun_steps))


def test_flags_make_the_objective():
    flags = "--training_mode ctm --loss_norm l2 --start_ema 0.999 --start_scales 18 --max_teacher_steps 5"
    flags = flags.split()
    config = parse_config(CmTrainConfig, [*flags, "--target_jump", "target", "--dsm_adaptive", "False"])
    made = create_objective(config)
    assert made.needs_teacher and made.law.longest == 5 and made.inner == "target" and not made.adaptive
    alone = create_objective(parse_config(CmTrainConfig, ["--training_mode", "ctm_training", *flags[2:]]))
    assert not alone.needs_teacher and alone.needs_target and not alone.iterate
    for more, match in (
        (["--start_ema", "0"], "needs a target network: --start_ema above 0"),
        (["--scale_mode", "doubling"], "--scale_mode must be fixed"),
        (["--iterate", "True"], "--iterate is for --training_mode ctm_training"),
    ):
        with pytest.raises(UserError, match=match):
            parse_config(CmTrainConfig, [*flags, *more])


def test_schedule_and_needs():
    loss = objective()
    assert (
        loss.needs_target
        and loss.needs_teacher
        and loss.target_decay(0) == 0.999
        and loss.num_scales(0) == 18
    )
    with pytest.raises(ValueError, match="needs a target network"):
        loss.forward(Roles(exact_roles().student), torch.zeros(1, 2), SimpleNamespace(), 0)
