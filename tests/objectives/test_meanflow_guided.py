"""Guidance inside MeanFlow's target: what it is a fixed point of, and golden targets, losses, gradients and samples."""

import pytest
import torch

from cm.commands.cli import parse_config
from cm.config.rows import OBJECTIVES
from cm.config.scripts import CmTrainConfig
from cm.diffusion.flow_maps import FlowMap, average_velocity
from cm.diffusion.paths import LINEAR
from cm.diffusion.precond import FlowPrecond
from cm.errors import UserError
from cm.nn import NO_CLASS
from cm.objectives.base import Draw, Roles
from cm.objectives.flow_map import Adaptive, point
from cm.objectives.flow_times import TimeLaw
from cm.objectives.meanflow import MeanFlowObjective, TargetGuidance
from cm.sampling.jumps import sample_jumps
from tests.helpers.flow_golden import check_gradients, close, flow_map
from tests.helpers.golden_data import later

MASKS = (torch.get_rng_state(), None)
CASES = list(later("meanflow_guided").config["cases"])


def labels(g, key):
    """Labels of a file, whose null label is the number of classes."""
    y = g.tensor(key)
    return y.masked_fill(y == g.config["null_label"], NO_CLASS)


def objective(about):
    on = about["guidance_eq"] == "cfg"
    guidance = TargetGuidance(about["omega"], about["kappa"], about["t_start"], about["t_end"])
    weight = Adaptive(about["norm_p"], about["norm_eps"])
    return MeanFlowObjective(
        law=TimeLaw(), weight=weight, guidance=guidance if on else TargetGuidance(), mode="meanflow"
    )


@pytest.mark.parametrize("name", CASES)
def test_golden_losses(name):
    g, case = later("meanflow_guided"), f"guided/case/{name}/"
    x, e, t, r = (g.tensor(case + key) for key in "xetr")
    model, loss_of = flow_map(g, "guided/mlp/"), objective(g.config["cases"][name])
    y = labels(g, case + "labels_used")
    draw = Draw(t=t, r=r, noise=e, weight=torch.ones_like(t))
    losses = loss_of.forward(Roles(model), x, draw, 0, y=y)
    loss = losses["loss"].mean()
    torch.testing.assert_close(loss, g.tensor(case + "loss"), rtol=1e-3, atol=1e-7)
    close(losses["squared"] * x[0].numel(), g.tensor(case + "squared_error"))
    loss.backward()
    check_gradients(model.net, g, case + "grad/")
    z, v = point(LINEAR, x, e, t)
    close(v, g.tensor(case + "v"))
    if not loss_of.guidance.plain:
        told = loss_of.guided(Roles(model), z, t, v, MASKS, {"y": g.tensor(case + "labels")})
        close(told, g.tensor(case + "v_guided_before_drop"))
        close(loss_of.guided(Roles(model), z, t, v, MASKS, {"y": y}), g.tensor(case + "v_used"))
    with torch.no_grad():
        close(average_velocity(model, z, t, r, y=y), g.tensor(case + "u"))
    found = loss_of.target(Roles(model), z, t, r, v, None, 0, MASKS, {"y": y})
    close(found, g.tensor(case + "u_target"))


@pytest.mark.parametrize("name", list(later("meanflow_guided").config["sample_times"]))
def test_golden_samples(name):
    g = later("meanflow_guided")
    model, y = flow_map(g, "guided/mlp/"), g.tensor("guided/sample/labels")
    t = torch.tensor(g.config["sample_times"][name], dtype=torch.float64)
    sigmas = (t / (1 - t)).clamp_max(1e6)  # t = 1 has no finite level
    noise = 1e6 * g.tensor("guided/sample/noise")
    found = sample_jumps(lambda *levels: model(*levels, y=y), noise, sigmas)
    expected = g.tensor(f"guided/sample/{name}")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("omega", "kappa"), [(2.5, 0.0), (1.0, 0.5), (0.2, 0.92)])
def test_a_guided_flow_is_its_own_target(omega, kappa):
    """u(y) = v_0 + w (v_y - v_0) with w = omega / (1 - kappa) is what v_g becomes, and v where nothing guides."""
    scale = omega / (1 - kappa)

    def flow(z, y):
        return z.sin() * (2 + y.reshape(-1, 1, 1, 1))

    def net(z, t, y=None, second=None):
        no_class = flow(z, torch.full_like(y, NO_CLASS))
        inside = ((t > 0.3) & (t < 0.8)).reshape(-1, 1, 1, 1)
        return torch.where(inside, no_class + scale * (flow(z, y) - no_class), flow(z, y))

    t = torch.tensor([0.2, 0.5, 0.7, 0.9, 0.5], dtype=torch.float64)
    y = torch.tensor([1, 0, 2, 1, NO_CLASS])
    z = torch.randn(5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = FlowMap(net, FlowPrecond())
    of = MeanFlowObjective(law=TimeLaw(), guidance=TargetGuidance(omega, kappa, 0.3, 0.8))
    found = of.target(Roles(model), z, t, t, flow(z, y), None, 0, MASKS, {"y": y})
    torch.testing.assert_close(found, net(z, t, y))
    assert (found - flow(z, y))[1:3].abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(found[[0, 3, 4]], flow(z, y)[[0, 3, 4]], rtol=0, atol=0)


def test_flags():
    def made(*flags):
        config = parse_config(CmTrainConfig, ["--preset", "digits_meanflow", "--data_dir", "d", *flags])
        return OBJECTIVES.load("meanflow")(config)

    assert made().guidance == TargetGuidance() and made().guidance.plain
    guided = ["--omega", "0.2", "--kappa", "0.92", "--guided_to", "0.75"]
    known = ["--class_cond", "True", "--label_dropout", "0.1"]
    assert made(*guided, *known).guidance == TargetGuidance(0.2, 0.92, 0.0, 0.75)
    assert made("--preset", "digits_meanflow_guided").guidance == TargetGuidance(1.0, 0.5)
    with pytest.raises(UserError, match=r"--omega 0.2 --kappa 0.92: guidance needs classes"):
        made(*guided, "--class_cond", "False")
    with pytest.raises(UserError, match=r"needs images without a class \(--label_dropout above 0\)"):
        made(*guided, "--class_cond", "True")
    with pytest.raises(UserError, match=r"--guided_from .* must be below --guided_to"):
        made(*guided, *known, "--guided_from", "0.8")
