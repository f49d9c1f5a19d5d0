"""Samplers: measured order of convergence, exact samples from the exact consistency function, golden numbers."""

import math

import numpy as np
import pytest
import torch

from cm.diffusion.denoiser import Denoiser, clamped
from cm.diffusion.grid import karras_sigmas
from cm.diffusion.precond import ConsistencyPrecond, EDMPrecond
from cm.errors import UserError
from cm.sampling.ancestral import get_ancestral_step, sample_euler_ancestral
from cm.sampling.consistency import sample_multistep, stochastic_iterative_sampler
from cm.sampling.levels import checked_ts
from cm.sampling.noise import IndexedGenerator, get_generator
from cm.sampling.ode import sample_euler, to_d
from cm.sampling.registry import SAMPLERS, run_sampler, sampler_sigmas
from tests.helpers import golden_data
from tests.helpers.analytic import Gaussian, order_of_convergence
from tests.helpers.ideal import SolvedMixture
from tests.helpers.models import golden_model

GAUSS = Gaussian(mean=0.3, std=0.5)
MIXTURE = SolvedMixture(torch.tensor([[-1.0, 0.5], [0.8, -0.3], [0.1, 1.2]], dtype=torch.float64), std=0.2)
DUMMY = get_generator("dummy")


class Counted:
    """A denoiser that counts its calls and keeps the levels it was asked for."""

    def __init__(self, denoiser):
        self.denoiser, self.levels = denoiser, []

    def __call__(self, x, sigma):
        assert sigma.shape == x.shape[:1]
        self.levels.append(sigma[0].item())
        return self.denoiser(x, sigma)


# ---- closed form ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if row.order])
@pytest.mark.parametrize("data", [GAUSS, MIXTURE], ids=["gaussian", "mixture"])
def test_order_of_convergence(name, data):
    row = SAMPLERS[name]
    order, error = order_of_convergence(row.load(), data)
    assert order == pytest.approx(row.order, abs=0.15)
    assert error < (0.05 if row.order == 1 else 1e-3)


def test_heun_solves_linear_flow_from_noise_to_data():
    """From sigma_max to 0 the Gaussian flow ends at mean + (x - mean) std / sqrt(std^2 + sigma_max^2)."""
    x = torch.linspace(-200, 200, 11, dtype=torch.float64)[:, None]
    sample = run_sampler("heun", GAUSS.denoise, x, DUMMY, steps=200)
    assert torch.allclose(sample, GAUSS.flow(x, 80.0, 0.0), atol=2e-3)


def test_churn_keeps_the_marginals():
    """With an exact denoiser, churn only exchanges noise: mean and spread of the data come out."""
    generator = IndexedGenerator(0)
    x = 80 * generator.randn(200, 100)
    churn = {"s_churn": 20, "s_tmin": 0.05, "s_tmax": 50, "s_noise": 1.0}
    sample = run_sampler("heun", GAUSS.denoise, x, generator, steps=160, options=churn)
    assert sample.mean() == pytest.approx(0.3, abs=0.02)
    assert sample.std() == pytest.approx(0.5, abs=0.02)


def test_ancestral_keeps_the_marginals():
    generator = IndexedGenerator(0)
    sample = run_sampler("ancestral", GAUSS.denoise, 80 * generator.randn(200, 100), generator, steps=150)
    assert sample.mean() == pytest.approx(0.3, abs=0.02)
    assert sample.std() == pytest.approx(0.5, abs=0.03)


def test_ancestral_step():
    for sigma_from, sigma_to in [(80.0, 0.00056), (80.0, 17.5), (1.0, 1.0), (0.002, 0.0)]:
        down, up = get_ancestral_step(sigma_from, sigma_to)
        assert down >= 0
        assert up >= 0
        assert down**2 + up**2 == pytest.approx(sigma_to**2)
        assert down == pytest.approx(sigma_to**2 / sigma_from)


@pytest.mark.parametrize("levels", [[80.0, 0.002], [80.0, 1.5, 0.002], [80.0, 20.0, 2.5, 0.3, 0.0]])
def test_multistep_with_the_exact_consistency_function_samples_exactly(levels):
    """Algorithm 1 then returns data at noise level sigma_min, for any time points (1-D mixture, KS test)."""
    from scipy.stats import kstest

    data = SolvedMixture(torch.tensor([[-1.0], [0.7]], dtype=torch.float64), std=0.1)
    generator = IndexedGenerator(1)
    n = 4000
    start = data.centres[generator.randint(0, 2, (n,))] + 0.1 * generator.randn(n, 1, dtype=torch.float64)
    x = start + 80 * generator.randn(n, 1, dtype=torch.float64)
    sample = sample_multistep(
        lambda x, sigma: data.consistency(x, float(sigma[0]), 0.002), x, torch.tensor(levels), generator
    )
    assert kstest(sample.numpy().ravel(), lambda v: data.cdf(v, 0.002)).statistic < 1.63 / math.sqrt(n)  # 1 %


def test_multistep_noise_level():
    """Between evaluations x has variance t^2 - sigma_min^2 around x0, so that its level is t."""
    seen = []
    sample_multistep(
        lambda x, sigma: (seen.append(x), torch.zeros_like(x))[1],
        torch.zeros(3000, 8),
        torch.tensor([5.0, 2.0, 1.5]),
        IndexedGenerator(0),
        sigma_min=1.5,
    )
    assert len(seen) == 2
    assert seen[1].std() == pytest.approx(math.sqrt(2.0**2 - 1.5**2), rel=0.02)


# ---- contracts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("heun", 13),
        ("dpm", 14),
        ("euler", 7),
        ("ancestral", 7),
        ("onestep", 1),
        ("progdist", 7),
        ("multistep", 2),
        ("general", 13),
        ("pc", 14),
    ],
)
def test_number_of_evaluations_and_callback(name, calls):
    denoiser, trace = Counted(GAUSS.denoise), []
    x = 80 * torch.randn(2, 3, 4, 4)
    out = run_sampler(name, denoiser, x, DUMMY, steps=7, ts=[0, 3, 6], callback=trace.append)
    assert len(denoiser.levels) == calls
    assert denoiser.levels[0] == pytest.approx(80)
    assert out.shape == x.shape
    sigmas = sampler_sigmas(name, 7, 0.002, 80.0, 7.0, [0, 3, 6])
    for i, info in enumerate(trace):
        assert info["i"] == i
        assert float(info["sigma"]) == pytest.approx(float(sigmas[i]))
        assert info["x"].shape == info["denoised"].shape == x.shape


def test_state_is_float32_for_half_precision_input():
    x = torch.randn(2, 3, 4, 4).half()
    assert sample_euler(GAUSS.denoise, x, torch.tensor([1.0, 0.5, 0.0])).dtype == torch.float32


def test_samplers_build_no_graph():
    weight = torch.ones(1, requires_grad=True)
    for name in SAMPLERS:
        x = 80 * torch.randn(2, 3)
        out = run_sampler(
            name, lambda x, s, *lower: GAUSS.denoise(x, s) * weight, x, DUMMY, steps=4, ts=[0, 3]
        )
        assert not out.requires_grad


def test_draws_follow_the_order_of_the_original():
    """Heun and DPM pass over one draw per step without churn; multistep one per interval; the ODEs none."""
    for name, draws in [
        ("heun", 5),
        ("dpm", 5),
        ("ancestral", 5),
        ("euler", 0),
        ("progdist", 0),
        ("multistep", 2),
    ]:
        generator = IndexedGenerator(0)
        x = 80 * generator.randn(2, 3)
        run_sampler(name, GAUSS.denoise, x, generator, steps=5, ts=[0, 2, 4])
        expected = IndexedGenerator(0)
        for _ in range(draws + 1):
            expected.randn(2, 3)
        assert torch.equal(generator.randn(2, 3), expected.randn(2, 3)), name


def test_to_d_broadcasts():
    x, denoised = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    d = to_d(x, torch.tensor([2.0, 4.0]), denoised)
    assert torch.allclose(d[1], (x[1] - denoised[1]) / 4)
    assert torch.allclose(to_d(x, 2.0, denoised)[0], d[0])


def test_bad_input():
    x = torch.zeros(1, 3)
    with pytest.raises(UserError, match=r"sampler must be one of .* got 'nope'"):
        run_sampler("nope", GAUSS.denoise, x, DUMMY, steps=3)
    with pytest.raises(UserError, match="steps must be at least"):
        run_sampler("heun", GAUSS.denoise, x, DUMMY, steps=0)
    for ts, word in [
        ([0, 5, 3], "decrease"),
        ([0, 40], "grid"),
        ([-1, 4], "grid"),
        ([0], "at least two"),
        (None, ""),
    ]:
        with pytest.raises(UserError, match=f"ts.*{word}"):
            checked_ts(ts, 40)
    with pytest.raises(UserError, match="begin with 0"):
        run_sampler("multistep", GAUSS.denoise, x, DUMMY, steps=40, ts=[5, 39])
    with pytest.raises(UserError, match="steps must be at least"):
        checked_ts([0, 0], 1)
    assert checked_ts((0, 7, 7, 39), 40) == [0, 7, 7, 39]  # a search evaluates its end points
    with pytest.raises(ValueError, match="never increase"):
        sample_euler(GAUSS.denoise, x, torch.tensor([1.0, 2.0]))


# ---- golden -----------------------------------------------------------------------------------


class Recorded:
    """A generator that hands out stored noise in call order."""

    def __init__(self, noise):
        self.noise, self.used = noise, 0

    def randn_like(self, x):
        assert x.shape == self.noise[self.used].shape
        self.used += 1
        return self.noise[self.used - 1]


@pytest.fixture(scope="module")
def golden():
    return golden_data.load("samplers")


@pytest.fixture(scope="module")
def network(golden):
    return golden_model(golden)


def _denoiser(golden, network, case):
    if case["denoiser"] == "gauss":
        denoiser = Gaussian(golden.tensor("gauss/mu"), golden.config["gauss"]["std"]).denoise
    elif case["denoiser"] == "unet_edm":
        denoiser = Denoiser(network, EDMPrecond(golden.config["sigma_data"]))
    else:
        denoiser = Denoiser(network, ConsistencyPrecond(golden.config["sigma_data"], case["sigma_min"]))
    return clamped(denoiser) if case.get("clip_denoised") else denoiser


def _check_case(golden, network, case):
    generator, trace = Recorded(golden.tensor("noise")), []
    x = generator.randn_like(golden.tensor("noise")[0]) * case["sigma_max"]
    options = {k: case[k] for k in ("s_churn", "s_tmin", "s_tmax", "s_noise") if k in case}
    out = run_sampler(
        case["sampler"],
        _denoiser(golden, network, case),
        x,
        generator,
        steps=case["steps"],
        sigma_min=case["sigma_min"],
        sigma_max=case["sigma_max"],
        rho=case["rho"],
        ts=case.get("ts"),
        callback=trace.append,
        options=options,
    ).clamp(-1, 1)
    assert generator.used == case["noise_used"], case["id"]
    atol = 1e-5
    if case["denoiser"] != "gauss":
        atol = 2e-3 if case["sampler"] in ("heun", "dpm") and case["steps"] <= 3 else 1e-4
    np.testing.assert_allclose(
        out.numpy(), golden[f"out/{case['id']}"], rtol=0, atol=atol, err_msg=case["id"]
    )
    prefix = f"trace/{case['id']}/"
    for key in golden.keys(prefix):
        field = key.removeprefix(prefix)
        if field == "x_sample0_mean_std":
            got = [[info["x"][0].mean(), info["x"][0].std()] for info in trace]
            tolerance = {"rtol": 2e-3, "atol": 2e-3}
        elif field in ("x", "denoised"):
            got = [info[field].numpy() for info in trace]
            tolerance = {"rtol": 1e-5, "atol": 2e-5}
        else:
            got = [float(info[field]) for info in trace]
            tolerance = {"rtol": 1e-5}
        np.testing.assert_allclose(np.array(got), golden[key], err_msg=key, **tolerance)


@pytest.mark.parametrize(
    "sampler", [s for s in SAMPLERS if s not in ("general", "pc", "rk45", "addim", "jumps", "gamma")]
)
def test_golden_samples(golden, network, sampler):
    cases = [case for case in golden.config["cases"] if case["sampler"] == sampler]
    assert cases
    for case in cases:
        _check_case(golden, network, case)


def test_golden_sigma_tables(golden):
    for table in golden.config["sigma_tables"]:
        sigmas = sampler_sigmas("heun", table["n"], table["sigma_min"], table["sigma_max"], table["rho"])
        np.testing.assert_allclose(sigmas.numpy(), golden[table["key"]], rtol=1e-5)


def test_index_adapter_equals_levels():
    x = 80 * torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    levels = torch.stack([karras_sigmas(40, 0.002, 80.0)[i] for i in (0, 22, 39)])
    by_index = stochastic_iterative_sampler(GAUSS.denoise, x, None, IndexedGenerator(3), ts=(0, 22, 39))
    assert torch.equal(by_index, sample_multistep(GAUSS.denoise, x, levels, IndexedGenerator(3)))
    assert not torch.equal(by_index, sample_euler_ancestral(GAUSS.denoise, x, levels, IndexedGenerator(3)))
