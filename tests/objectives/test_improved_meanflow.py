"""Improved MeanFlow: golden draws, derivatives, losses, gradients and samples; and what its losses are zero for."""

import math
from dataclasses import replace

import pytest
import torch

from cm.commands.cli import parse_config
from cm.config.parsing import parse_guidance
from cm.config.rows import OBJECTIVES
from cm.config.scripts import CmTrainConfig
from cm.diffusion.flow_maps import FlowMap
from cm.diffusion.guidance import told
from cm.diffusion.paths import LINEAR
from cm.diffusion.precond import FlowPrecond
from cm.errors import UserError
from cm.nn import NO_CLASS
from cm.objectives.base import Roles
from cm.objectives.flow_map import Adaptive, point
from cm.objectives.flow_times import TimeLaw
from cm.objectives.improved_meanflow import GuidedDraw, ImprovedMeanFlowObjective, ScaleLaw, both
from cm.sampling.jumps import sample_jumps
from cm.seeding import StepRandom
from tests.helpers.flow_golden import check_gradients, close, flow_map
from tests.helpers.golden_data import later
from tests.networks.test_second_clock import published
from tests.objectives.test_flow_map import gaussian_u

MASKS = (torch.get_rng_state(), None)


def test_golden_scales():
    g = later("imf")
    for beta in (1, 2):
        found = ScaleLaw(8.0, beta).scale(g.tensor("omega_law/uniform"))
        torch.testing.assert_close(found, g.tensor(f"omega_law/{beta}"), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", list(later("imf").config["cases"]))
def test_golden_losses(name):
    g, case = later("imf"), f"case/{name}/"
    about, model = g.config["cases"][name], flow_map(g, "mlp/")
    keys = ("x", "e", "t", "r", "omega", "t_min", "t_max", "labels", "labels_used")
    x, e, t, r, omega, t_min, t_max, y, used = (g.tensor(case + key) for key in keys)
    hidden = used == g.config["null_label"]
    guidance = {"omega": omega, "t_min": t_min, "t_max": t_max, "hidden": hidden}
    draw = GuidedDraw(t=t, r=r, noise=e, weight=torch.ones_like(t), **guidance)
    objective = ImprovedMeanFlowObjective(law=TimeLaw(), weight=Adaptive(about["norm_p"], about["norm_eps"]))
    losses = objective.forward(Roles(model), x, draw, 0, y=y)
    loss = losses["loss"].mean()
    torch.testing.assert_close(loss, g.tensor(case + "loss"), rtol=1e-3, atol=1e-7)
    close(losses["squared"] * x[0].numel(), g.tensor(case + "loss_u"))
    close(losses["squared_head"] * x[0].numel(), g.tensor(case + "loss_v"))
    loss.backward()
    check_gradients(model.net, g, case + "grad/")

    told_y = {"y": y.masked_fill(hidden, NO_CLASS)}
    z, v = point(LINEAR, x, e, t)
    close(z, g.tensor(case + "z"))
    with torch.no_grad():
        direction, guided = objective.velocities(Roles(model), z, v, draw, MASKS, {"y": y})
        change = objective.change(Roles(model), z, direction, draw, MASKS, told_y)
        u, head = both(model, z, t, r, draw.inputs, **told_y)
    average = u + (t - r).reshape(-1, 1, 1, 1) * change
    found = {"v_tangent": direction, "v_target_used": guided, "dudt": change, "u": u, "v_head": head}
    for key, value in {**found, "V": average}.items():
        close(value, g.tensor(case + key))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_golden_samples(steps):
    """--guidance is told to the network, and its noise levels become times."""
    g = later("imf")
    about = g.config["sample"]
    low, high = (t / (1 - t) for t in (about["t_min"], about["t_max"]))
    model = told(flow_map(g, "mlp/"), parse_guidance(f"{about['omega']},{low},{high}"))
    y, t = torch.tensor(about["labels"]), torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    noise = 1e6 * g.tensor("sample/noise")
    found = sample_jumps(lambda *levels: model(*levels, y=y), noise, (t / (1 - t)).clamp_max(1e6))
    expected = g.tensor(f"sample/{steps}")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


def test_the_exact_map_has_no_loss():
    """Of a Gaussian without classes: V and the head are the flow's velocity, whatever the guidance."""

    def net(z, t, y=None, second=None, guidance_inputs=None):
        head = gaussian_u(z, t, second=torch.zeros_like(t))
        return torch.cat([gaussian_u(z, t, second=second), head], dim=1)

    model = FlowMap(net, FlowPrecond())
    objective = ImprovedMeanFlowObjective(law=TimeLaw(share=0.75), weight=Adaptive())
    drawn = objective.draw(torch.zeros(16, 1, 2, 2), 0, StepRandom(0, 0, 0, 16, 16))
    wide = {k: v.double() if v.is_floating_point() else v for k, v in vars(drawn).items() if v is not None}
    draw = GuidedDraw(**wide)
    y, z = torch.arange(16) % 3, torch.randn(16, 1, 2, 2, dtype=torch.float64)
    v = gaussian_u(z, draw.t, second=torch.zeros_like(draw.t))
    direction, guided = objective.velocities(Roles(model), z, v, draw, MASKS, {"y": y})
    change = objective.change(Roles(model), z, direction, draw, MASKS, {"y": y})
    u, head = both(model, z, draw.t, draw.r, draw.inputs, y=y)
    average = u + (draw.t - draw.r).reshape(-1, 1, 1, 1) * change
    assert (draw.r < draw.t).sum() > 3
    for found in (guided, head, average):
        torch.testing.assert_close(found, v, rtol=1e-8, atol=1e-8)


def test_draws_belong_to_rows_and_follow_their_laws():
    objective = ImprovedMeanFlowObjective(law=TimeLaw(share=0.5), weight=Adaptive(), hidden=0.25)
    x0 = torch.zeros(512, 1, 1, 1)
    whole = objective.draw(x0, 3, StepRandom(0, 3, 0, 512, 512))
    for beta in (1.0, 2.0):
        scales = replace(objective, scales=ScaleLaw(beta=beta))
        whole = scales.draw(x0, 3, StepRandom(0, 3, 0, 512, 512))
        for start, size in ((4, 3), (9, 1), (100, 37)):
            part = scales.draw(x0[:size], 3, StepRandom(0, 3, start, start + size, 512))
            for name in ("t", "r", "noise", "omega", "t_min", "t_max", "hidden"):
                assert torch.equal(getattr(whole, name)[start : start + size], getattr(part, name)), name
    whole = objective.draw(x0, 3, StepRandom(0, 3, 0, 512, 512))
    same = whole.r == whole.t
    assert (whole.t_min[same] == 0).all() and (whole.t_max[same] == 1).all()
    assert (whole.t_min[~same] <= 0.5).all() and (whole.t_max[~same] >= 0.5).all()
    assert 0.15 < whole.hidden.float().mean() < 0.35
    assert whole.omega.min() >= 1 and whole.omega.max() <= 8
    assert whole.omega.log().mean().item() == pytest.approx(math.log(8) / 2, rel=0.1)
    assert whole[:3].inputs.shape == (3, 3)


def test_a_network_that_is_told_a_guidance():
    arguments = dict(later("meanflow").config["unet"]["arguments"])
    net = published(arguments, "joined", told_guidance=True)
    x, t = torch.randn(2, net.in_channels, 16, 16), torch.tensor([0.3, 0.9])
    plain = net(x, t, second=t)
    inputs = torch.tensor([[1.0, 0.0, 1.0], [0.2, 0.1, 0.9]])
    guided = net(x, t, second=t, guidance_inputs=inputs)
    torch.testing.assert_close(guided[0], plain[0])
    assert (guided[1] - plain[1]).abs().max() > 0
    with pytest.raises(ValueError, match="guidance_inputs have shape"):
        net(x, t, second=t, guidance_inputs=inputs[:1])
    with pytest.raises(ValueError, match="is not told a guidance"):
        published(arguments, "joined")(x, t, second=t, guidance_inputs=inputs)


def test_flags():
    def made(*flags):
        argv = ["--preset", "digits_improved_meanflow", "--data_dir", "d", *flags]
        return OBJECTIVES.load("improved_meanflow")(parse_config(CmTrainConfig, argv))

    assert (made().hidden, made().weight, made().scales) == (0.1, Adaptive(1.0, 0.01), ScaleLaw())
    assert made("--omega_max", "4", "--omega_beta", "2").scales == ScaleLaw(4.0, 2.0)
    with pytest.raises(UserError, match="it needs --class_cond True and --label_dropout above 0"):
        made("--label_dropout", "0")
    with pytest.raises(UserError, match="it needs --precond flow"):
        made("--precond", "edm")
