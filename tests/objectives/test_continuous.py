"""Continuous-time objectives: derivatives, Appendix B of the paper on closed-form data, ranks, bad input."""

import pytest
import torch
from torch import nn

from cm.commands.cli import parse_config
from cm.config.rows import DISTANCES
from cm.config.scripts import CmTrainConfig
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.grid import Grid
from cm.diffusion.precond import ConsistencyPrecond, EDMPrecond
from cm.errors import UserError
from cm.objectives.base import Roles
from cm.objectives.continuous import (
    ContinuousObjective,
    continuous_losses,
    total_derivative,
)
from cm.objectives.distances import L2, FunctionDistance, make_distance
from cm.runtime import distributed, logger
from cm.seeding import StepRandom
from cm.storage.saver import Saver
from cm.training.factory import create_objective
from cm.training.learning_rate import LearningRate
from cm.training.options import BatchSize, Optimization, Reports
from cm.training.trainer import Trainer
from tests.helpers import lpips_files
from tests.helpers.analytic import free, ones
from tests.helpers.continuous_functions import DATA, DIM, GRID, Function, at_levels, feature_distance, teacher
from tests.helpers.models import PointNet, tiny_unet
from tests.helpers.mp import run_ranks

# --- derivatives ---


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (lambda: PointNet(), (2,)),
        (lambda: tiny_unet(), (1, 8, 8)),
        (lambda: tiny_unet(network="ncsnpp", channel_mult="1,1", attention_resolutions="4"), (1, 8, 8)),
    ],
    ids=["points", "adm", "ncsnpp"],
)
def test_total_derivative_equals_finite_differences(network, shape):
    net = network().double()
    if hasattr(net, "convert_torso"):
        net.convert_torso(torch.float64)
    denoiser = Denoiser(net, ConsistencyPrecond(time_scale=1.0))
    torch.manual_seed(1)
    x, slope = torch.randn(2, 3, *shape).double()
    t = torch.tensor([0.05, 0.7, 20.0]).double()
    column = t.reshape(-1, *[1] * len(shape))
    with torch.no_grad():
        f, v = total_derivative(denoiser, x, t, column * slope)
        h = 1e-5 * t
        wide = h.reshape(column.shape)
        difference = (denoiser(x + wide * slope, t + h) - denoiser(x - wide * slope, t - h)) / (2 * wide)
        torch.testing.assert_close(f, denoiser(x, t))
    # timestep_embedding has fp32 frequencies; everything else is fp64
    torch.testing.assert_close(v, difference, rtol=1e-6, atol=1e-6 * difference.abs().max().item())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_half_precision_torso(dtype, tolerance):
    """Near sigma_min, where the U-Net's clock runs at 250 / t = 125,000 a unit of t, as elsewhere."""
    net = tiny_unet()
    t = torch.tensor([0.0021, 0.01, 1.0, 80.0])
    slope = t.reshape(4, 1, 1, 1) * images(seed=1)
    with torch.no_grad():
        _, exact = total_derivative(Denoiser(net, ConsistencyPrecond()), images() + slope, t, slope)
        net.convert_torso(dtype)
        _, v = total_derivative(Denoiser(net, ConsistencyPrecond()), images() + slope, t, slope)
    assert v.dtype == torch.float32
    assert ((v - exact).flatten(1).norm(dim=1) < tolerance * exact.flatten(1).norm(dim=1)).all()


def test_curvature_product_is_the_hessian():
    f, v = torch.randn(2, 4, DIM, generator=torch.Generator().manual_seed(2)).double()
    product = FunctionDistance(feature_distance).direction(f, v)
    for row in range(4):
        y = f[row : row + 1]
        hessian = torch.autograd.functional.hessian(lambda x, y=y: feature_distance(x, y).sum(), y)
        torch.testing.assert_close(product[row], hessian[0, :, 0] @ v[row])
    torch.testing.assert_close(FunctionDistance(make_distance("l2")).direction(f, v), 2 / DIM * v)


def test_the_exact_consistency_function_stands_still():
    x0, draw = at_levels(torch.logspace(-2.5, 1.9, 40).double())
    for role, small in ((Denoiser(Function(DATA.consistency), free), True), (teacher(), False)):
        terms = continuous_losses(
            Roles(role, teacher=teacher()),
            x0,
            draw,
            distance=make_distance("l2"),
            weight=ones,
            stop_grad=True,
        )
        assert (terms["tangent_rms"].max() < 1e-12) == small
        assert (terms["loss"].abs().max() < 1e-12) == small


# --- how the gradient is taken ---


def roles_of(student, **precond):
    return Roles(
        Denoiser(student, ConsistencyPrecond(**precond)), teacher=Denoiser(tiny_unet().eval(), EDMPrecond())
    )


def images(count=4, channels=1, size=8, seed=0):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) / 2


@pytest.mark.parametrize("options", [{}, {"use_checkpoint": True}], ids=["plain", "checkpointing"])
def test_two_passes_have_the_gradient_of_one(options):
    """The tangent without a graph and a second forward pass, with the same dropout masks, against one jvp."""
    student = tiny_unet(dropout=0.3, **options).train()
    reference = tiny_unet(dropout=0.3).train()
    reference.load_state_dict(student.state_dict())
    objective = ContinuousObjective(make_distance("l2"), ones, grid=GRID, distillation=True)
    x0, roles = images(), roles_of(student)
    draw = objective.draw(x0, 0, StepRandom(0, 0, 0, 4, 4))
    torch.manual_seed(3)
    objective.forward(roles, x0, draw, 0)["loss"].sum().backward()
    after = torch.rand(1)

    x_t = x0 + draw.noise * draw.t.reshape(-1, 1, 1, 1)
    with torch.no_grad():
        slope = x_t - roles.teacher(x_t, draw.t)
    torch.manual_seed(3)
    f, v = total_derivative(Denoiser(reference, ConsistencyPrecond()), x_t, draw.t, slope)
    assert torch.equal(torch.rand(1), after)  # the stream moved on by one pass
    (f * v.detach()).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in reference.parameters()])
    two_passes = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert (two_passes - expected).norm() < 1e-5 * expected.norm()
    # Other masks give another gradient: the test would see them.
    student.zero_grad()
    torch.manual_seed(4)
    objective.forward(roles, x0, draw, 0)["loss"].sum().backward()
    other = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert (other - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("norm", [*(n for n in DISTANCES if not n.startswith("lpips")), "curvature of l2"])
def test_differentiated_losses_move_the_student(norm):
    """A step against the gradient lowers the loss, which is never negative."""
    student = tiny_unet()
    distance = make_distance(norm) if norm in DISTANCES else FunctionDistance(make_distance("l2"))
    objective = ContinuousObjective(distance, ones, grid=GRID, distillation=True, stop_grad=False)
    x0, roles = images(), roles_of(student, time_scale=1.0)
    draw = objective.draw(x0, 0, StepRandom(0, 0, 0, 4, 4))
    before = objective.forward(roles, x0, draw, 0)["loss"]
    assert (before > 0).all() and before.shape == (4,)
    before.mean().backward()
    size = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
    with torch.no_grad():
        for p in student.parameters():
            p -= 1e-3 / size * p.grad
    drop = before.mean() - objective.forward(roles, x0, draw, 0)["loss"].mean()
    assert drop.item() == pytest.approx(1e-3 * size.item(), rel=0.2)


@pytest.mark.parametrize("stop_grad", [True, False])
@pytest.mark.parametrize("norm", ["lpips", "lpips-max"])
def test_lpips_itself(norm, stop_grad, tmp_path):
    """VGG16 and its second derivatives, from files."""
    lpips_files.write_small_files(tmp_path)
    student = tiny_unet(in_channels=3, image_size=16, channel_mult="1", attention_resolutions="16")
    distance = make_distance(norm, path=str(tmp_path), size=0)
    objective = ContinuousObjective(distance, ones, grid=GRID, distillation=True, stop_grad=stop_grad)
    x0 = images(1, 3, 16)
    roles = Roles(
        Denoiser(student, ConsistencyPrecond()), teacher=Denoiser(Function(lambda x, s: x / 2), free)
    )
    draw = objective.draw(x0, 0, StepRandom(0, 0, 0, 1, 1))
    loss = objective.forward(roles, x0, draw, 0)["loss"]
    loss.sum().backward()
    assert stop_grad or loss > 0
    assert all(p.grad.isfinite().all() for p in student.parameters()) and student.out[2].weight.grad.any()


def test_draws():
    """Uniform in t^(1/rho) over the whole range, rows of the global batch, nothing but t and noise."""
    objective = ContinuousObjective(make_distance("l2"), ones, grid=GRID, distillation=False)
    x0 = torch.zeros(4000, 1)
    whole = objective.draw(x0, 5, StepRandom(1, 5, 0, 4000, 4000))
    part = objective.draw(x0[100:300], 5, StepRandom(1, 5, 100, 300, 4000))
    assert torch.equal(whole.t[100:300], part.t) and torch.equal(whole.noise[100:300], part.noise)
    assert whole.r is None and whole.index is None and (whole.weight == 1).all()
    root = whole.t.double() ** (1 / 7)
    position = (root - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    quantiles = torch.linspace(0, 1, 4000, dtype=torch.float64)
    assert (position.sort().values - quantiles).abs().max() < 0.03  # Kolmogorov-Smirnov, 0.1 %


def test_nothing_but_the_student_learns_and_roles_must_fit():
    student, teacher_net = tiny_unet(), tiny_unet()
    roles = Roles(Denoiser(student, ConsistencyPrecond()), teacher=Denoiser(teacher_net, EDMPrecond()))
    x0 = images()
    for distillation, stop_grad in ((True, True), (True, False)):
        objective = ContinuousObjective(
            make_distance("l2"), ones, grid=GRID, distillation=distillation, stop_grad=stop_grad
        )
        draw = objective.draw(x0, 0, StepRandom(0, 0, 0, 4, 4))
        objective.forward(roles, x0, draw, 0)["loss"].sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher_net.parameters())
    with pytest.raises(ValueError, match="teacher"):
        objective.forward(Roles(roles.student), x0, draw, 0)
    assert not objective.needs_target and objective.num_scales(0) is None


# --- ranks ---

FORMS = {"stop_grad": ("l2", True, True), "training": ("l2", False, True), "plain": ("l1", True, False)}


def train(form, run_dir, microbatch=-1):
    """Weights after three steps on global batches of 5."""
    norm, distillation, stop_grad = FORMS[form]
    rows = distributed.local_rows(5)

    def batches():
        for step in range(99):
            yield images(5, seed=step)[rows.start : rows.stop], {}

    logger.configure(run_dir, ["json"])
    precond = ConsistencyPrecond(time_scale=1.0)
    trainer = Trainer(
        roles=Roles(
            Denoiser(tiny_unet(), precond),
            teacher=Denoiser(tiny_unet(), EDMPrecond()) if distillation else None,
        ),
        objective=ContinuousObjective(
            make_distance(norm), ones, grid=GRID, distillation=distillation, stop_grad=stop_grad
        ),
        data=batches(),
        batch=BatchSize(5, microbatch),
        optimization=Optimization(LearningRate(1e-3), optimizer="adam", eps=1e-2, ema_rate="0.9"),
        saver=Saver(run_dir),
        reports=Reports(log_interval=2, save_interval=-1),
        total_steps=3,
    )
    trainer.run_loop()
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).numpy()


def train_all(run_dir, microbatch=-1):
    return [train(form, run_dir, microbatch) for form in FORMS]


def test_ranks_and_microbatches_do_not_change_the_weights(tmp_path):
    alone = train_all(str(tmp_path / "1"))
    first, second = run_ranks(
        "tests.objectives.test_continuous:train_all", 2, str(tmp_path / "2"), 1, timeout=120
    )
    start = torch.cat([p.detach().flatten() for p in tiny_unet().parameters()])
    for one, two, other in zip(alone, first, second):
        assert (two == other).all()
        torch.testing.assert_close(torch.from_numpy(two), torch.from_numpy(one), rtol=0, atol=1e-5)
        assert (torch.from_numpy(one) - start).abs().max() > 1e-4


# --- bad input ---


class NoForwardMode(torch.autograd.Function):
    """An operation as old extensions write it."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_a_network_without_forward_mode_derivatives_is_named():
    class OldNetwork(nn.Module):
        def forward(self, x, t):
            return NoForwardMode.apply(x)

    x0 = images()
    objective = ContinuousObjective(make_distance("l2"), ones, grid=GRID, distillation=False)
    draw = objective.draw(x0, 0, StepRandom(0, 0, 0, 4, 4))
    with pytest.raises(
        UserError, match=r"--training_mode continuous_\*: OldNetwork has .* derivative"
    ) as error:
        objective.forward(Roles(Denoiser(OldNetwork(), free)), x0, draw, 0)
    assert "\n" not in str(error.value)

    def broken(x, t):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        objective.forward(Roles(Denoiser(Function(broken), free)), x0, draw, 0)


def test_activation_checkpointing_needs_stop_grad():
    objective = ContinuousObjective(make_distance("l1"), ones, grid=GRID, distillation=True, stop_grad=False)
    x0 = images()
    draw = objective.draw(x0, 0, StepRandom(0, 0, 0, 4, 4))
    with pytest.raises(UserError, match="--use_checkpoint True"):
        objective.forward(roles_of(tiny_unet(use_checkpoint=True)), x0, draw, 0)


CONTINUOUS = ["--loss_norm", "l2", "--weight_schedule", "uniform", "--training_mode"]


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["continuous_training", "--stop_grad", "False"], "--stop_grad False is for continuous_distillation"),
        (["continuous_distillation", "--loss_norm", "l1"], "--loss_norm l1 .* l2, l2-32, lpips, lpips-max"),
        (["continuous_training", "--loss_norm", "linf"], "--loss_norm linf"),
        (["continuous_training", "--scale_mode", "progressive"], "--scale_mode must be fixed"),
        (["continuous_training", "--boundary", "piecewise"], "--boundary skip"),
        (["continuous_distillation", "--stop_grad", "False", "--use_checkpoint", "True"], "--use_checkpoint"),
    ],
)
def test_bad_flags(argv, match):
    with pytest.raises(UserError, match=match):
        parse_config(CmTrainConfig, [*CONTINUOUS, *argv])


def test_objective_from_flags():
    c = parse_config(CmTrainConfig, [*CONTINUOUS, "continuous_distillation", "--stop_grad", "False"])
    objective = create_objective(c)
    assert objective.needs_teacher and not objective.stop_grad and isinstance(objective.distance, L2)
    c = parse_config(CmTrainConfig, [*CONTINUOUS, "continuous_training", "--sigma_max", "40", "--rho", "3"])
    objective = create_objective(c)
    assert not objective.needs_teacher and objective.stop_grad
    assert objective.grid == Grid(0.002, 40.0, 3.0)
    for name, row in DISTANCES.items():
        made = row.load()
        assert row.curved == (name not in ("l1", "linf")), made
