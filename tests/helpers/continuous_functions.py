"""Closed-form functions and small students for the continuous-time objectives."""

import torch
from torch import nn

from cm.diffusion.denoiser import Denoiser
from cm.diffusion.grid import Grid
from cm.objectives.base import Draw
from tests.helpers.analytic import Gaussian, free

DATA = Gaussian()
GRID = Grid()
DIM = 3


class Function(nn.Module):
    """A closed-form function as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, sigma):
        return self.function(x, sigma)


class Smooth(nn.Module):
    """A student with few parameters that is no consistency function; its coordinates mix."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(DIM, DIM, generator=generator).double())
        self.shift = nn.Parameter(torch.randn(DIM, generator=generator).double())

    def forward(self, x, sigma):
        s = sigma[:, None]
        return torch.tanh(x @ self.weight / (1 + s)) + self.shift * torch.log1p(s)


FEATURES = torch.randn(DIM, 8, generator=torch.Generator().manual_seed(6)).double()


def feature_distance(a, b):
    """LPIPS in small: squared differences of unit-length non-linear features."""

    def features(x):
        return nn.functional.normalize(2 + torch.sin(x @ FEATURES / 3), dim=1)

    return (features(a) - features(b)).square().mean(1)


def teacher():
    return Denoiser(Function(DATA.denoise), free)


def pairs(count=16):
    generator = torch.Generator().manual_seed(7)
    return DATA.sample((count, DIM), generator), torch.randn(count, DIM, generator=generator).double()


def at_levels(t):
    """(x0, Draw) of all pairs of images and noise at all levels t."""
    x0, noise = pairs()
    draw = Draw(
        t=t.repeat_interleave(len(x0)), noise=noise.repeat(len(t), 1), weight=torch.ones(len(t) * len(x0))
    )
    return x0.repeat(len(t), 1), draw


def gradient(loss, network):
    grads = torch.autograd.grad(loss, tuple(network.parameters()))
    return torch.cat([g.flatten() for g in grads])
