"""What presets of flow maps learn of points in the plane in a second: rows of the map itself do not drown the data."""

import pytest
import torch
from torch import nn

from cm.commands.cli import parse_config
from cm.config.rows import OBJECTIVES
from cm.config.scripts import CmTrainConfig
from cm.diffusion.flow_maps import FlowMap, average_velocity
from cm.diffusion.precond import FlowPrecond
from cm.objectives.base import Roles
from cm.seeding import StepRandom
from tests.helpers.learning import COUNT, data

BATCH, STEPS = 128, 120


class Map(nn.Module):
    """u(z, t, t - r) of points (B, 2)."""

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, z, t, second):
        return self.layers(torch.cat([z, t[:, None], second[:, None]], dim=1))


def learned(preset):
    """The average of the map that the objective of a preset has trained."""
    config = parse_config(CmTrainConfig, ["--preset", preset, "--data_dir", "d"])
    objective = OBJECTIVES.load(config.training_mode)(config)
    torch.manual_seed(0)
    net, average = Map(), Map()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for step in range(STEPS):
        x0 = data(BATCH, step)
        draw = objective.draw(x0, step, StepRandom(0, step, 0, BATCH, BATCH))
        loss = objective.forward(Roles(FlowMap(net, FlowPrecond())), x0, draw, step)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, 2 - 2 * step / STEPS)
        with torch.no_grad():
            rate = min(0.98, (1 + step) / (10 + step))
            for a, p in zip(average.parameters(), net.parameters()):
                a.lerp_(p, 1 - rate)
    return FlowMap(average, FlowPrecond())


@torch.no_grad()
def unexplained(model):
    """Squared error of the velocity at r = t, over that of the best constant."""
    x0, noise = data(COUNT, -3), torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(1))
    t = torch.linspace(0.05, 0.95, COUNT)
    v = noise - x0
    u = average_velocity(model, (1 - t[:, None]) * x0 + t[:, None] * noise, t, t)
    return ((u - v).square().mean() / (v - v.mean(0)).square().mean()).item()


@pytest.mark.parametrize("method", ["meanflow", "esd", "lsd", "psd", "shortcut"])
def test_a_preset_learns_the_velocity(method):
    """0.66 is what no network can explain; with MeanFlow's weight and share, maps of themselves reach 0.69 to 0.81."""
    assert 0.64 < unexplained(learned(f"digits_{method}")) < 0.68
