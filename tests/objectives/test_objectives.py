"""The three losses against golden numbers, and the mathematics behind them on closed-form data."""

import pytest
import torch

from cm.diffusion.denoiser import Denoiser
from cm.diffusion.grid import Grid
from cm.diffusion.noise_levels import LogNormalSampler
from cm.diffusion.precond import EDMPrecond
from cm.karras_diffusion import KarrasDenoiser
from cm.nn import append_dims
from cm.objectives.base import Roles
from cm.objectives.consistency import ConsistencyObjective, consistency_losses, euler_step, heun_step
from cm.objectives.curricula import EmaAndScales
from cm.objectives.distances import make_distance
from cm.objectives.edm import EDMObjective
from cm.objectives.pairs import GridPairs, pair_at
from cm.objectives.progressive import ProgressiveObjective, interval_at, progressive_losses
from cm.seeding import StepRandom
from tests.helpers import golden_data
from tests.helpers.analytic import Gaussian
from tests.helpers.models import golden_model, tiny_unet


class ClosedForm:
    """Stands for a Denoiser: a function (x, sigma) -> x0."""

    net = None

    def __init__(self, function):
        self.function = function

    def __call__(self, x, sigma, **cond):
        return self.function(x, sigma)


def uniform_weight(sigma, r=None):
    return torch.ones_like(sigma)


@pytest.mark.parametrize("name", ["denoise_uncond", "denoise_classcond"])
def test_golden_denoise(name):
    g = golden_data.load(name)
    model = golden_model(g)
    cond = {"y": g.tensor("y")} if "y" in g else {}
    for kind in ("edm", "distill"):
        diffusion = KarrasDenoiser(**g.config["denoiser"], distillation=kind == "distill")
        with torch.no_grad():
            output, denoised = diffusion.denoise(model, g.tensor("x_t"), g.tensor("sigmas"), **cond)
        torch.testing.assert_close(output, g.tensor(f"{kind}/model_output"), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(denoised, g.tensor(f"{kind}/denoised"), rtol=1e-4, atol=1e-5)


def test_golden_edm_losses():
    g = golden_data.load("loss_edm")
    model = golden_model(g)
    inputs = (g.tensor("x_start"), g.tensor("sigmas"))
    for key in g.keys():
        if not key.endswith("/loss"):
            continue
        kind, schedule, _ = key.split("/")
        diffusion = KarrasDenoiser(weight_schedule=schedule, distillation=kind == "distill")
        terms = diffusion.training_losses(model, *inputs, noise=g.tensor("noise"))
        for term in ("loss", "mse", "xs_mse"):
            expected = g.tensor(f"{kind}/{schedule}/{term}")
            torch.testing.assert_close(terms[term], expected, rtol=1e-4, atol=1e-6)
    check_gradients(
        g, model, KarrasDenoiser().training_losses(model, *inputs, noise=g.tensor("noise")), "edm/karras"
    )


def check_gradients(g, model, terms, prefix):
    terms["loss"].mean().backward()
    params = dict(model.named_parameters())
    for key in g.keys(f"{prefix}/grad_of_mean/"):
        expected = g.tensor(key)
        actual = params[key.split("grad_of_mean/")[1]].grad
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    model.zero_grad()


@pytest.mark.parametrize("name", ["loss_consistency_cd", "loss_consistency_ct", "loss_progdist"])
def test_golden_distillation_losses(name):
    g = golden_data.load(name)
    models = {who: golden_model(g, f"sd_{who}/") for who in roles_in(g)}
    for case in g.config["cases"]:
        terms = golden_case(g, case, name, models)
        torch.testing.assert_close(terms["loss"], g.tensor(f"case/{case['id']}/loss"), rtol=2e-4, atol=1e-6)
        if case.get("grad"):
            check_gradients(g, models["student"], terms, f"case/{case['id']}")


def roles_in(g):
    return [who for who in ("student", "target", "teacher") if g.keys(f"sd_{who}/")]


def golden_case(g, case, name, models):
    data = {
        key: g.tensor(f"data/{case['data']}/{key}")
        for key in ("x_start", "noise", "y")
        if f"data/{case['data']}/{key}" in g
    }
    diffusion = KarrasDenoiser(
        weight_schedule=case["weight_schedule"],
        loss_norm=case["loss_norm"],
        distillation=name != "loss_progdist",
    )
    common = dict(
        num_scales=case["num_scales"],
        model_kwargs={"y": data["y"]} if "y" in data and g.config["create_model"].get("class_cond") else None,
        noise=data["noise"],
        indices=g.tensor(f"case/{case['id']}/indices"),
        teacher_model=models.get("teacher"),
        teacher_diffusion=KarrasDenoiser() if "teacher" in models else None,
    )
    if name == "loss_progdist":
        return diffusion.progdist_losses(models["student"], data["x_start"], **common)
    return diffusion.consistency_losses(
        models["student"], data["x_start"], target_model=models["target"], **common
    )


def test_grid_pairs_are_golden():
    g = golden_data.load("loss_consistency_cd")
    for case in g.config["cases"]:
        key = f"case/{case['id']}"
        noise = g.tensor(f"data/{case['data']}/noise")
        draw = pair_at(Grid(), case["num_scales"], g.tensor(f"{key}/indices"), noise)
        torch.testing.assert_close(draw.t, g.tensor(f"{key}/t"), rtol=1e-5, atol=0)
        torch.testing.assert_close(draw.r, g.tensor(f"{key}/t2"), rtol=1e-5, atol=0)


# --- closed form ---


@pytest.mark.parametrize(("step", "order"), [(euler_step, 2), (heun_step, 3)])
def test_local_order_of_the_distillation_solvers(step, order):
    data = Gaussian()
    x = data.sample((64, 1), torch.Generator().manual_seed(0)) + 1.0
    errors = []
    for h in (0.2, 0.1, 0.05):
        t, r = torch.tensor([1.0]).double(), torch.tensor([1.0 - h]).double()
        errors.append((step(data.denoise, x, t, r) - data.flow(x, t, r)).abs().max().item())
    orders = torch.tensor(errors).log2().diff().neg()
    assert torch.allclose(orders, torch.full((2,), float(order)), atol=0.25), orders


def test_consistency_training_is_euler_with_the_clean_image():
    x0, noise = torch.randn(2, 4, 3).double()
    draw = pair_at(Grid(), 10, torch.tensor([0, 3, 6, 8]), noise)
    x_t = x0 + draw.noise * append_dims(draw.t, 2)
    euler = euler_step(lambda x, t: x0, x_t, draw.t, draw.r)
    torch.testing.assert_close(euler, x0 + append_dims(draw.r, 2) * noise)


def test_exact_consistency_function_with_exact_teacher_has_vanishing_loss():
    data = Gaussian()
    generator = torch.Generator().manual_seed(1)
    x0, noise = data.sample((512, 1), generator), torch.randn(512, 1, generator=generator).double()
    losses = []
    for n in (20, 40, 80):
        index = torch.randint(0, n - 1, (512,), generator=generator)
        roles = Roles(ClosedForm(data.consistency), ClosedForm(data.consistency), ClosedForm(data.denoise))
        draw = pair_at(Grid(), n, index, noise)
        terms = consistency_losses(
            roles, x0, draw, distance=make_distance("l1"), weight=uniform_weight, ode_solver="heun"
        )
        losses.append(terms["loss"].mean().item())
    # Heun's error per step is O(dt^3): halving dt divides it by about 8.
    assert losses[0] / losses[1] > 5 and losses[1] / losses[2] > 5
    assert losses[2] < 1e-4


def test_score_identity():
    """grad log p(x_t) = -E[(x_t - x0) / t^2 | x_t] (Song et al. 2023, Lemma 1), by regression on Gaussian data."""
    data = Gaussian()
    generator = torch.Generator().manual_seed(2)
    x0 = data.sample((400_000,), generator)
    t = 0.7
    x_t = x0 + t * torch.randn(400_000, generator=generator).double()
    target = -(x_t - x0) / t**2
    slope = torch.cov(torch.stack([x_t, target]))[0, 1] / x_t.var()
    intercept = target.mean() - slope * x_t.mean()
    variance = data.std**2 + t**2
    assert slope.item() == pytest.approx(-1 / variance, rel=1e-2)
    assert intercept.item() == pytest.approx(data.mean / variance, abs=1e-2)


def test_theorem_2_distillation_and_training_losses_agree_to_first_order():
    """(L_CD - L_CT) / dt -> 0 with the exact score and the Euler solver (Song et al. 2023, Theorem 2)."""
    data = Gaussian()
    generator = torch.Generator().manual_seed(3)
    count = 200_000
    x0 = data.sample((count, 1), generator)
    noise = torch.randn(count, 1, generator=generator).double()
    noise = torch.cat([noise, -noise])
    x0 = torch.cat([x0, x0])

    def student(x, t):  # any smooth function that is not the consistency function
        return torch.sin(x) / (1 + append_dims(t.double(), x.ndim))

    t = torch.full((2 * count,), 1.5).double()
    gaps = []
    for dt in (0.4, 0.2, 0.1):
        draw = pair_at(Grid(), 10, torch.zeros(2 * count, dtype=torch.int64), noise)
        draw = type(draw)(t=t, r=t - dt, noise=noise, weight=torch.ones_like(t))
        losses = [
            consistency_losses(
                Roles(ClosedForm(student), ClosedForm(student), teacher),
                x0,
                draw,
                distance=make_distance("l2"),
                weight=uniform_weight,
                ode_solver="euler",
            )["loss"]
            .double()
            .mean()
            .item()
            for teacher in (ClosedForm(data.denoise), None)
        ]
        gaps.append(abs(losses[0] - losses[1]) / dt)
    assert gaps[0] > 1.6 * gaps[1] > 1.6 * 1.6 * gaps[2], gaps


def test_progressive_target_lands_on_the_teachers_two_step_point():
    """A single Euler (DDIM) step with the target goes exactly where two teacher steps go."""
    data = Gaussian()
    generator = torch.Generator().manual_seed(4)
    x0, noise = data.sample((16, 1), generator), torch.randn(16, 1, generator=generator).double()
    grid, intervals = Grid(), 4
    draw = interval_at(grid, intervals, torch.arange(16) % intervals, noise)
    t_mid = grid.sigma(draw.index + 0.5, intervals)
    seen = {}

    def student(x, t):
        seen["x_t"] = x
        return torch.zeros_like(x)

    def keep(denoised, target):
        seen["target"] = target
        return denoised.flatten(1).sum(1)

    roles = Roles(ClosedForm(student), teacher=ClosedForm(data.denoise))
    progressive_losses(roles, x0, draw, t_mid, distance=keep, weight=uniform_weight)
    two = euler_step(data.denoise, euler_step(data.denoise, seen["x_t"], draw.t, t_mid), t_mid, draw.r)
    one = euler_step(lambda x, t: seen["target"], seen["x_t"], draw.t, draw.r)
    torch.testing.assert_close(one, two)


# --- structure ---


def cm_objective(distillation, **changes):
    schedule = EmaAndScales("fixed", 0.9, "fixed", 18, 18, 100, 10)
    options = dict(pairs=GridPairs(Grid()), distillation=distillation)
    return ConsistencyObjective(schedule, make_distance("l2"), uniform_weight, **{**options, **changes})


def pd_objective():
    schedule = EmaAndScales("fixed", 0.0, "progdist", 4, 4, 100, 10)
    return ProgressiveObjective(schedule, make_distance("l2"), uniform_weight, grid=Grid())


@pytest.mark.parametrize(
    "objective", [EDMObjective(LogNormalSampler(), uniform_weight), cm_objective(True), pd_objective()]
)
def test_draws_belong_to_rows_of_the_global_batch(objective):
    x0 = torch.zeros(8, 1, 4, 4)
    whole = objective.draw(x0, 5, StepRandom(1, 5, 0, 8, 8, "cpu"))
    part = objective.draw(x0[2:6], 5, StepRandom(1, 5, 2, 6, 8, "cpu"))
    other = objective.draw(x0, 6, StepRandom(1, 6, 0, 8, 8, "cpu"))
    for name in ("t", "r", "noise", "index"):
        a, b = getattr(whole, name), getattr(part, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a[2:6], b) and torch.equal(getattr(whole[2:6], name), b)
    assert not torch.equal(whole.noise, other.noise) and not torch.equal(whole.t, other.t)


def test_indices_cover_exactly_the_intervals():
    objective, x0 = cm_objective(False), torch.zeros(4000, 1, 1, 1)
    draw = objective.draw(x0, 0, StepRandom(0, 0, 0, 4000, 4000, "cpu"))
    assert draw.index.unique().tolist() == list(range(17))
    assert draw.t.max() == 80.0 and draw.r.min().item() == pytest.approx(0.002, rel=1e-6)
    assert (draw.t > draw.r).all()


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_student_and_target_share_dropout_and_leave_the_stream_alone(solver):
    model = tiny_unet(dropout=0.5).train()
    x0, noise = torch.randn(2, 4, 1, 8, 8)
    draw = pair_at(Grid(), 18, torch.tensor([3, 5, 9, 16]), noise)
    denoiser = Denoiser(model, EDMPrecond())
    options = dict(distance=make_distance("l2"), weight=uniform_weight, ode_solver=solver)
    # A teacher that never moves makes both points equal when r = t, so equal masks give a loss of exactly 0.
    still = type(draw)(t=draw.t, r=draw.t, noise=noise, weight=draw.weight)
    torch.manual_seed(7)
    loss = consistency_losses(Roles(denoiser, denoiser), x0, still, **options)["loss"]
    after = torch.rand(1)
    assert loss.abs().max() == 0
    torch.manual_seed(7)
    with torch.no_grad():
        denoiser(x0, draw.t)
    assert torch.equal(torch.rand(1), after)
    assert denoiser(x0, draw.t).sub(denoiser(x0, draw.t)).abs().max() > 0


def test_gradients_reach_the_student_only():
    student, target, teacher = (tiny_unet() for _ in range(3))
    x0, noise = torch.randn(2, 2, 1, 8, 8)
    draw = pair_at(Grid(), 18, torch.tensor([3, 12]), noise)
    roles = Roles(*(Denoiser(m, EDMPrecond()) for m in (student, target, teacher)))
    loss = consistency_losses(
        roles, x0, draw, distance=make_distance("l2"), weight=uniform_weight, ode_solver="heun"
    )
    loss["loss"].sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for m in (target, teacher) for p in m.parameters())


def test_roles_must_fit_the_algorithm():
    d = Denoiser(tiny_unet(), EDMPrecond())
    x0, random = torch.zeros(2, 1, 8, 8), StepRandom(0, 0, 0, 2, 2, "cpu")
    for distillation, roles in ((True, Roles(d, d)), (False, Roles(d, d, d))):
        objective = cm_objective(distillation)
        with pytest.raises(ValueError, match="teacher"):
            objective.forward(roles, x0, objective.draw(x0, 0, random), 0)


@pytest.mark.parametrize("shape", [(5,), (1, 7), (4, 8, 8)])
def test_any_data_shape(shape):
    data = Gaussian()
    x0, noise = data.sample((3, *shape)), torch.randn(3, *shape).double()
    roles = Roles(ClosedForm(data.consistency), ClosedForm(data.consistency), ClosedForm(data.denoise))
    draw = pair_at(Grid(), 18, torch.tensor([0, 8, 16]), noise)
    terms = consistency_losses(
        roles, x0, draw, distance=make_distance("l2"), weight=uniform_weight, ode_solver="heun"
    )
    assert terms["loss"].shape == (3,) and torch.isfinite(terms["loss"]).all()
