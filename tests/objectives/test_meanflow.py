"""MeanFlow against golden numbers: times, derivative, target, loss, gradients, samples; and three usual mistakes."""

import pytest
import torch

from cm.diffusion.flow_maps import average_velocity
from cm.diffusion.paths import LINEAR
from cm.objectives.base import Draw, Roles
from cm.objectives.flow_map import Adaptive, FlowMapObjective, differentiated, eulerian, point
from cm.objectives.flow_times import TimeLaw
from cm.sampling.jumps import sample_jumps
from tests.helpers.flow_golden import check_gradients, close, flow_map
from tests.helpers.golden_data import later
from tests.networks.test_second_clock import published

LAWS = {"v0": "sorted", "v1": "capped"}


@pytest.mark.parametrize("table", range(6))
def test_golden_times(table):
    g = later("meanflow")
    a = g.config["time"][f"time/{table}"]
    means = (a["P_mean_t"], a["P_std_t"], a["P_mean_r"], a["P_std_r"])
    law = TimeLaw(LAWS[a["tr_sampler"]], *means, a["ratio"])
    drawn = (g.tensor(f"time/{table}/{name}") for name in ("normal_t", "normal_r", "uniform"))
    t, r = law.logit_normal(*drawn)
    torch.testing.assert_close(t, g.tensor(f"time/{table}/t"), rtol=1e-5, atol=0)
    torch.testing.assert_close(r, g.tensor(f"time/{table}/r"), rtol=1e-5, atol=0)


def case(g, name):
    """(network, objective, images, draw) of a stored case."""
    about = g.config["cases"][name]
    x, e, t, r = (g.tensor(f"case/{name}/{key}") for key in ("x", "e", "t", "r"))
    objective = FlowMapObjective(law=TimeLaw(), weight=Adaptive(about["norm_p"], about["norm_eps"]))
    return flow_map(g, "mlp/"), objective, x, Draw(t=t, r=r, noise=e, weight=torch.ones_like(t))


@pytest.mark.parametrize("name", ["a_p075", "b_p0", "c_p1", "d_p05", "e_fm", "f_v0"])
def test_golden_losses(name):
    g = later("meanflow")
    assert set(g.config["cases"]) == {"a_p075", "b_p0", "c_p1", "d_p05", "e_fm", "f_v0"}
    model, objective, x, draw = case(g, name)
    losses = objective.forward(Roles(model), x, draw, 0)
    loss = losses["loss"].mean()
    torch.testing.assert_close(loss, g.tensor(f"case/{name}/loss"), rtol=1e-3, atol=1e-7)
    close(losses["squared"] * x[0].numel(), g.tensor(f"case/{name}/squared_error"))
    loss.backward()
    check_gradients(model.net, g, f"case/{name}/grad/")
    z, v = point(LINEAR, x, draw.noise, draw.t)
    close(z, g.tensor(f"case/{name}/z"))
    close(v, g.tensor(f"case/{name}/v"))
    with torch.no_grad():
        close(average_velocity(model, z, draw.t, draw.r), g.tensor(f"case/{name}/u"))
        found = objective.target(Roles(model), z, draw.t, draw.r, v, None, 0, torch_state(), {})
    target = g.tensor(f"case/{name}/u_target")
    # The diagonal takes v itself, which the formula gives up to rounding.
    torch.testing.assert_close(found, target, rtol=1e-4, atol=1e-5 * target.abs().max().item())


def torch_state():
    return torch.get_rng_state(), None


MISTAKES = {
    "drdt_1": "r moves with t: the derivative holds r, so that h = t - r has tangent 1",
    "no_z_tangent": "z does not move: its tangent is the velocity",
    "h_tangent_0": "h is held while t moves: r must be held",
}


def test_golden_derivative_and_what_wrong_ones_would_be():
    """The message says which mistake a wrong derivative is."""
    g = later("meanflow")
    model, _, x, draw = case(g, "d_p05")
    z, v = point(LINEAR, x, draw.noise, draw.t)
    t, r = draw.t, draw.r

    def u(z, t, r):
        return average_velocity(model, z, t, r)

    changes = []

    def recorded(*arguments):
        changes.append(differentiated(model, "meanflow")(*arguments))
        return changes[0]

    target = eulerian(u, z, t, r, v, recorded)
    found, expected = changes[0][1], g.tensor("case/d_p05/dudt")
    size = expected.abs().max()
    wrong = {name: g.tensor(f"wrong/{name}") for name in MISTAKES}
    for name, value in wrong.items():
        assert (value - expected).abs().max() > 0.3 * size, f"{name} is far from the truth"
        if (found - value).abs().max() < 1e-3 * size:
            pytest.fail(f"du/dt is that of the mistake {name}: {MISTAKES[name]}")
    close(found, expected)
    close(target, g.tensor("case/d_p05/u_target"))
    # The mistakes, made on purpose, are the stored ones, so that the message above tells the truth.
    ones, zeros = torch.ones_like(t), torch.zeros_like(t)
    made = {"drdt_1": (v, ones, ones), "no_z_tangent": (0 * v, ones, zeros), "h_tangent_0": (v, ones, ones)}
    for name, direction in made.items():
        close(differentiated(model, "meanflow")(u, (z, t, r), direction)[1], wrong[name])


def test_golden_samples():
    g = later("meanflow")
    model, noise = flow_map(g, "mlp/"), g.tensor("sample/noise")
    grids = {"one_step": [1, 0], **g.config["sample_times"]}
    assert {f"sample/{name}" for name in grids} == set(g.keys("sample/")) - {"sample/noise"}
    for name, times in grids.items():
        t = torch.tensor(times, dtype=torch.float64)
        sigmas = (t / (1 - t)).clamp_max(1e6)  # t = 1 has no finite level
        found = sample_jumps(model, 1e6 * noise, sigmas)
        expected = g.tensor(f"sample/{name}")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


def test_golden_unet_loss():
    g = later("meanflow")
    net = published(g.config["unet"]["arguments"], "joined")
    net.load_state_dict(g.state_dict("unet/sd/"))
    x, e, t, r = (g.tensor(f"unet/loss/{key}") for key in ("x", "e", "t", "r"))
    model = flow_map(g, "mlp/").__class__(net, flow_map(g, "mlp/").precond)
    about = g.config["unet"].get("loss", {"norm_p": 0.75, "norm_eps": 1e-3})
    objective = FlowMapObjective(law=TimeLaw(), weight=Adaptive(about["norm_p"], about["norm_eps"]))
    loss = objective.forward(Roles(model), x, Draw(t=t, r=r, noise=e, weight=t), 0)["loss"].mean()
    torch.testing.assert_close(loss, g.tensor("unet/loss/loss"), rtol=1e-3, atol=1e-7)
    loss.backward()
    parameters = dict(net.named_parameters())
    for key in g.keys("unet/loss/grad/"):
        expected = g.tensor(key)
        found = parameters[key.removeprefix("unet/loss/grad/")].grad
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item())
