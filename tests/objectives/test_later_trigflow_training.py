"""sCT and sCD in training: precision, masks, ranks, the learned weight, checkpoints, bad input."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cm.commands.cli import parse_config
from cm.config.scripts import CmTrainConfig
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.precond import EDMPrecond
from cm.diffusion.proposals import Proposal
from cm.diffusion.trigflow import TrigFlow, time_of
from cm.errors import UserError
from cm.objectives.base import Draw, Roles, bare
from cm.objectives.trigflow import LossWeight, Tangent, TrigFlowObjective
from cm.runtime import distributed, logger
from cm.storage.saver import Saver
from cm.storage.weights import LOSS_MODULE, load_weights
from cm.training.factory import create_objective
from cm.training.learning_rate import LearningRate
from cm.training.options import BatchSize, Optimization, Reports
from cm.training.trainer import Trainer
from tests.helpers.models import tiny_unet
from tests.helpers.mp import run_ranks
from tests.objectives.test_later_trigflow import LAW, SCM, SD, ZERO, Case, near

# --- safety ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["sct", "scd"])
def test_the_tangent_of_a_half_precision_student_is_fp32(mode, dtype):
    """Weights rounded to the torso's precision, arithmetic not: the tangent of the same weights in fp32."""
    case = Case(mode, dtype=torch.float32)
    wide = Case(mode, dtype=torch.float32)
    with torch.no_grad():
        for p in wide.student.parameters():
            p.copy_(p.to(dtype))
    case.student.load_state_dict(wide.student.state_dict())
    case.student.convert_torso(dtype)
    t = time_of(case.draw.t, SD)
    x_t, slope = (SCM.tensor(f"{mode}/{name}").float() for name in ("x_t", "dxdt"))
    g, exact = (c.tangent(1.0, x_t, t, slope) for c in (case, wide))
    assert g.dtype == torch.float32
    near(g, exact, 1e-6)
    terms = case.losses(20000)
    terms["loss"].mean().backward()
    assert all(p.grad.isfinite().all() for p in case.student.parameters() if p.grad is not None)


def test_the_tangent_is_bounded_and_zero_stays_zero():
    g = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 1e6)])
    for norm in ("l2", "rms", "clip"):
        found = Tangent(norm=norm).bounded(g)
        assert not found[0].any() and found.abs().max() <= 1
    assert Tangent().bounded(g).flatten(1).norm(dim=1)[1].item() == pytest.approx(1, rel=1e-6)


def test_warm_up():
    assert [Tangent(warmup=10000).share(k) for k in (0, 2500, 10000, 10**6)] == [0, 0.25, 1, 1]
    assert Tangent(warmup=0).share(0) == 1


def test_student_and_tangent_share_their_masks(monkeypatch):
    """The passes of F and of its derivative meet the same dropout: their values are equal."""
    case = Case("sct", dtype=torch.float32)
    case.student.train()
    for module in case.student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    values = []
    original = Tangent._derivative

    def spy(self, *args):
        f, change = original(self, *args)
        values.append(f)
        return f, change

    monkeypatch.setattr(Tangent, "_derivative", spy)
    plain = TrigFlow.__call__
    monkeypatch.setattr(
        TrigFlow, "__call__", lambda self, u, t, **c: values.append(out := plain(self, u, t, **c)) or out
    )
    case.losses(20000)
    torch.testing.assert_close(values[0].detach(), values[-1], rtol=1e-4, atol=1e-5)


def test_both_levels_of_a_difference_share_their_masks():
    """Then it is near the derivative under these masks; with others it is larger by the inverse of the step."""
    case = Case("sct")
    case.student.train()
    for module in case.student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    t = time_of(case.draw.t, SD)
    x_t, slope = (SCM.tensor(f"sct/{name}") for name in ("x_t", "dxdt"))
    found = []
    for step in (0.0, 0.001):
        torch.manual_seed(0)
        found.append(case.tangent(1.0, x_t, t, slope, step=step))
    near(found[1], found[0], 0.05)


class OldNetwork(nn.Module):
    """A network with an operation as old extensions write it."""

    def forward(self, x, t):
        from tests.objectives.test_continuous import NoForwardMode

        return NoForwardMode.apply(x)


def test_a_network_without_forward_mode_is_named_and_differences_serve_it():
    roles = Roles(Denoiser(OldNetwork(), ZERO))
    x0, sigma = torch.randn(2, 1, 4, 4), torch.tensor([0.3, 2.0])
    draw = Draw(sigma, torch.randn(2, 1, 4, 4), torch.ones(2))
    objective = TrigFlowObjective(LAW, Tangent(), distillation=False, adaptive=False)
    with pytest.raises(
        UserError, match=r"--training_mode sct: OldNetwork has .*; --tangent_step 0\.02"
    ) as error:
        objective.forward(roles, x0, draw, 0)
    assert "\n" not in str(error.value)
    objective = TrigFlowObjective(LAW, Tangent(step=0.02), distillation=False, adaptive=False)
    assert objective.forward(roles, x0, draw, 0)["loss"].isfinite().all()


# --- the learned weight, the loop, the files ---


def images(count, seed=0):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 0.5


def make_trainer(run_dir, mode="scd", microbatch=-1, steps=3, adaptive=True, **tangent):
    rows = distributed.local_rows(5)

    def batches():
        for step in range(99):
            yield images(5, seed=step)[rows.start : rows.stop], {}

    logger.configure(run_dir, ["json"])
    student = tiny_unet()
    objective = TrigFlowObjective(
        LAW, Tangent(warmup=2, mode=mode, **tangent), distillation=mode == "scd", adaptive=adaptive
    )
    objective.attach(student)
    return Trainer(
        roles=Roles(
            Denoiser(student, ZERO),
            teacher=Denoiser(tiny_unet(), EDMPrecond(SD, 1.0)) if mode == "scd" else None,
        ),
        objective=objective,
        data=batches(),
        batch=BatchSize(5, microbatch),
        optimization=Optimization(LearningRate(1e-3), optimizer="adam", eps=1e-2, ema_rate="0.9"),
        saver=Saver(run_dir),
        reports=Reports(log_interval=1, save_interval=-1),
        total_steps=steps,
    )


def weights_after(run_dir, microbatch=-1):
    found = []
    for mode in ("scd", "sct"):
        trainer = make_trainer(run_dir, mode, microbatch)
        trainer.run_loop()
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).numpy())
    return found


class Bypass(TrigFlowObjective):
    """What a loss must not do: differentiate the bare network, which DistributedDataParallel does not see."""

    def forward(self, roles, *args, **cond):
        return super().forward(replace(roles, student=bare(roles.student)), *args, **cond)


def weights_and_refusal(run_dir):
    trainer = make_trainer(run_dir)
    trainer.objective = Bypass(LAW, Tangent(warmup=2), distillation=True, adaptive=False)
    try:
        trainer.run_step(*next(trainer.data))
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    return weights_after(run_dir, 1), refusal


def test_ranks_and_microbatches_do_not_change_the_weights(tmp_path):
    """Tangents bypass DistributedDataParallel, gradients do not: of the network, and of the learned weight."""
    alone = weights_after(str(tmp_path / "1"))
    (first, refusal), (second, _) = run_ranks(
        "tests.objectives.test_later_trigflow_training:weights_and_refusal",
        2,
        str(tmp_path / "2"),
        timeout=120,
    )
    assert "gradients differ between ranks" in refusal and "Bypass" in refusal
    for one, two, other in zip(alone, first, second):
        assert (two == other).all()
        torch.testing.assert_close(torch.from_numpy(two), torch.from_numpy(one), rtol=0, atol=1e-5)
        assert abs(one[-65:]).max() > 1e-4, "the learned weight moves"


def test_the_learned_weight_finds_the_size_of_the_error():
    """At its optimum e^u is the expected squared error of each noise level."""
    torch.manual_seed(0)
    head = LossWeight(0.5)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(600):
        sigma = torch.exp(-1 + 1.4 * torch.randn(256))
        squared = 1e-3 * sigma / (1 + sigma)
        u = head(sigma)
        optimizer.zero_grad()
        (squared * (-u).exp() + u).mean().backward()
        optimizer.step()
    sigma = torch.tensor([0.05, 0.3, 1.0, 4.0])
    torch.testing.assert_close(head(sigma).detach(), (1e-3 * sigma / (1 + sigma)).log(), rtol=0, atol=0.3)
    assert not LossWeight(0.5)(sigma).any()


def test_checkpoints_hold_the_learned_weight_and_models_do_not(tmp_path):
    from cm.models.files import load_model_file
    from cm.storage.checkpoint import complete_checkpoints

    trainer = make_trainer(str(tmp_path / "run"))
    trainer.run_loop()
    (checkpoint,) = complete_checkpoints(str(tmp_path / "run"))
    state, _ = load_weights(checkpoint / "model000003.pt")
    assert f"{LOSS_MODULE}.linear.weight" in state
    for weights in ("raw", "ema:0.9"):
        plain = load_model_file(str(checkpoint), weights).state
        assert plain.keys() == tiny_unet().state_dict().keys(), "the layout of the network alone"
    again = make_trainer(str(tmp_path / "again"), steps=5)
    again.load(checkpoint)
    again.data = (b for b in [(images(5, seed=3), {}), (images(5, seed=4), {})])
    again.run_loop()
    straight = make_trainer(str(tmp_path / "straight"), steps=5)
    straight.run_loop()
    for a, b in zip(again.model.parameters(), straight.model.parameters()):
        assert torch.equal(a, b)


FLAGS = ["--training_mode"]


def test_objective_from_flags():
    argv = ["scd", "--boundary", "zero", "--tangent_norm", "clip", "--p_std", "1.6", "--truncate", "False"]
    objective = create_objective(parse_config(CmTrainConfig, [*FLAGS, *argv]))
    assert objective.needs_teacher and not objective.needs_target and objective.num_scales(0) is None
    assert objective.tangent == Tangent(0.5, 10000, "clip", 0.1, 0.0, "scd") and objective.law == Proposal(
        -1.0, 1.6
    )
    assert create_objective(parse_config(CmTrainConfig, [*FLAGS, "sct", "--boundary", "zero"])).law.cut


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["sct"], "--training_mode sct needs --boundary zero, got skip"),
        (["sct", "--boundary", "zero", "--scale_mode", "progressive"], "no grid to change"),
        (["scd", "--boundary", "zero", "--tangent_norm", "l1"], "--tangent_norm must be one of"),
        (["scd", "--boundary", "zero", "--tangent_c", "0"], "--tangent_c must be positive"),
        (["progdist", "--tangent_c", "1"], "--tangent_c is for --training_mode sct or scd"),
    ],
)
def test_bad_flags(argv, match):
    with pytest.raises(UserError, match=match):
        parse_config(CmTrainConfig, [*FLAGS, *argv])


def test_roles_must_fit():
    with pytest.raises(ValueError, match="teacher"):
        case = Case("sct")
        TrigFlowObjective(LAW, Tangent(), distillation=True).forward(
            case.roles, case.x0, case.draw, 0, **case.cond
        )
