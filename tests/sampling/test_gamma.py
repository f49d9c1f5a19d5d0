"""Gamma-sampling of CTM: golden samples, both ends of gamma, what is drawn."""

import math

import pytest
import torch

from cm.diffusion.flow_maps import FlowMap
from cm.diffusion.grid import karras_sigmas
from cm.diffusion.precond import EDMPrecond
from cm.sampling.consistency import sample_multistep
from cm.sampling.gamma import sample_gamma
from cm.sampling.jumps import sample_jumps
from tests.helpers.analytic import Gaussian
from tests.helpers.golden_data import later as golden
from tests.objectives.test_ctm import Mlp

CTM = golden("ctm")
GAMMA = {"exact": 0.0, "cm_multistep": 1.0}
DATA = Gaussian(0.2, 0.4)


class Stored:
    """The noise of a golden sample, in its order."""

    def __init__(self, name):
        self.draws = iter(sorted(CTM.keys(f"sample/draws/{name}/")))

    def randn_like(self, x):
        name = next(self.draws, None)  # a draw that nobody needs was not stored
        return torch.zeros_like(x) if name is None else CTM.tensor(name).to(x)


def exact(x, t, s=None):
    """x^ of the exact map; the step from t to t is the denoiser's."""
    s = torch.full_like(t, 0.002) if s is None else s
    ratio = (s / t).reshape(-1, *[1] * (x.ndim - 1))
    return (DATA.flow(x, t, s) - ratio * x) / (1 - ratio)


MODELS = {"mlp": FlowMap(Mlp("student"), EDMPrecond(time_scale=1.0)), "gauss": exact}


def levels(about):
    if about["sampler"] == "gamma":  # to the level of one index, up to that of another, and down
        grid = karras_sigmas(18, 0.002, 80.0)
        return torch.stack([grid[0], grid[about["ind_2"]], grid[-1]])
    if "ts" in about:
        return karras_sigmas(about["steps"], 0.002, 80.0)[about["ts"]]
    return karras_sigmas(about["steps"] + 1, 0.002, 80.0)


def gamma(about):
    if about["sampler"] != "gamma":
        return about.get("gamma", GAMMA.get(about["sampler"]))
    grid = karras_sigmas(18, 0.002, 80.0)
    low, high = (grid[about[name]].item() for name in ("ind_1", "ind_2"))
    return math.sqrt(1 - ((low - 0.002) / (high - 0.002)) ** 2)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CTM.config["samplers"])
def test_golden_samples(case, model):
    about, start = CTM.config["samplers"][case], 80 * CTM.tensor("sample/noise").double()
    with torch.no_grad():
        found = sample_gamma(MODELS[model], start, levels(about), Stored(case), gamma=gamma(about))
    torch.testing.assert_close(found.float(), CTM.tensor(f"sample/{model}/{case}"), rtol=1e-3, atol=3e-4)


def test_both_ends_of_gamma_are_known_samplers():
    x = 80 * torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigmas = karras_sigmas(4, 0.002, 80.0)
    plain = sample_jumps(MODELS["mlp"], x, sigmas)
    assert torch.equal(sample_gamma(MODELS["mlp"], x, sigmas), plain)

    def consistency(x, t):
        g = MODELS["mlp"](x, t, torch.full_like(t, 0.002))
        return g + (0.002 / t)[:, None, None, None] * (x - g)

    torch.manual_seed(3)
    stochastic = sample_gamma(MODELS["mlp"], x, sigmas, gamma=1.0)
    torch.manual_seed(3)
    torch.testing.assert_close(stochastic, sample_multistep(consistency, x, sigmas), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_the_exact_map_keeps_the_law_of_the_data(gamma):
    torch.manual_seed(0)
    x = math.sqrt(80**2 + 0.4**2) * torch.randn(20000, 1, dtype=torch.float64) + 0.2
    x = sample_gamma(exact, x, karras_sigmas(4, 0.002, 80.0), gamma=gamma)
    assert x.mean().item() == pytest.approx(0.2, abs=0.015) and x.std().item() == pytest.approx(0.4, abs=0.01)
