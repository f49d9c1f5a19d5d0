"""Schedule samplers against golden tables and their own mathematics."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cm.diffusion.noise_levels import (
    LogNormalSampler,
    LossSecondMomentResampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from cm.errors import UserError
from cm.seeding import StepRandom
from tests.helpers import golden_data


def diffusion(num_timesteps):
    return SimpleNamespace(num_timesteps=num_timesteps, sigma_min=0.002, sigma_max=80.0, rho=7.0)


def test_golden_second_moment():
    g = golden_data.json("resample")["loss_second_moment"]
    sampler = LossSecondMomentResampler(
        diffusion(g["num_timesteps"]), g["history_per_term"], g["uniform_prob"]
    )
    for (ts, losses), after in zip(g["updates"], g["after_each_update"], strict=True):
        sampler.update_with_local_losses(torch.tensor(ts), torch.tensor(losses))
        np.testing.assert_allclose(sampler.weights(), after["weights"], rtol=1e-6)
        assert sampler._warmed_up() == after["warmed_up"]
    expected = golden_data.json("resample")["sample_importance_weights"]
    weights = sampler.importance(torch.tensor(expected["forced_indices"]))
    np.testing.assert_allclose(weights, expected["loss_weights"], rtol=1e-6)


def test_golden_uniform():
    g = golden_data.json("resample")["uniform"]
    assert UniformSampler(diffusion(g["num_timesteps"])).weights().tolist() == g["weights"]


@pytest.mark.parametrize("case", golden_data.json("resample")["lognormal_plain"])
def test_golden_lognormal(case, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *a, **k: torch.tensor(case["normal_draws"]))
    sigmas, weights = LogNormalSampler(case["p_mean"], case["p_std"]).sample(len(case["sigmas"]), "cpu")
    np.testing.assert_allclose(sigmas, case["sigmas"], rtol=1e-6)
    assert weights.tolist() == case["weights"]


@pytest.mark.parametrize("case", golden_data.json("resample")["lognormal_even"])
def test_golden_even_lognormal(case):
    start = case["rank"] * case["batch"]
    total = case["world_size"] * case["batch"]
    sampler = LogNormalSampler(case["p_mean"], case["p_std"], even=True)
    uniforms = torch.tensor(case["uniform_draws"])
    strata = torch.arange(start, start + case["batch"])
    sigmas, _ = sampler._levels(sampler._normal_at(strata, uniforms, total))
    np.testing.assert_allclose(sigmas, case["sigmas"], rtol=2e-6)


def test_even_sampler_puts_one_level_in_every_stratum():
    sampler = LogNormalSampler(even=True)
    sigmas, _, index = sampler.draw(StepRandom(0, 3, 0, 64, 64, "cpu"))
    u = torch.special.ndtr((sigmas.double().log() + 1.2) / 1.2)
    assert torch.equal((u * 64).floor().long(), torch.arange(64)) and index is None
    part, _, _ = sampler.draw(StepRandom(0, 3, 16, 32, 64, "cpu"))
    assert torch.equal(part, sigmas[16:32])


def test_even_sampler_survives_a_draw_of_zero():
    sampler = LogNormalSampler(even=True)
    sigmas, _ = sampler._levels(sampler._normal_at(torch.arange(2), torch.zeros(2), 2))
    assert (sigmas > 0).all()


def test_importance_weights_are_unbiased():
    sampler = LossSecondMomentResampler(diffusion(4), history_per_term=1, uniform_prob=0.1)
    sampler.update_with_all_losses([0, 1, 2, 3], [1.0, 5.0, 2.0, 0.5])
    f = torch.tensor([3.0, -1.0, 7.0, 2.0])
    index, weight = sampler.at(torch.rand(200_000, generator=torch.Generator().manual_seed(0)), "cpu")
    p = sampler.weights() / sampler.weights().sum()
    np.testing.assert_allclose(torch.bincount(index) / 200_000, p, atol=4e-3)
    assert (f[index] * weight).mean().item() == pytest.approx(f.mean().item(), abs=0.03)


def test_index_samplers_draw_levels_of_the_karras_grid():
    sigmas, weights, index = UniformSampler(diffusion(18)).draw(StepRandom(0, 0, 0, 500, 500, "cpu"))
    assert index.unique().tolist() == list(range(18)) and torch.equal(weights, torch.ones(500))
    assert sigmas[index == 0].unique().item() == 80.0
    assert sigmas[index == 11][0].item() == pytest.approx(0.5853481, rel=1e-6)


def test_history_survives_a_checkpoint():
    a, b = (LossSecondMomentResampler(diffusion(3), history_per_term=2) for _ in range(2))
    a.update_with_all_losses([0, 1, 2, 0, 1, 2, 1], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    b.load_state_dict({k: v.clone() for k, v in a.state_dict().items()})
    np.testing.assert_array_equal(a.weights(), b.weights())
    a.update_with_all_losses([0], [9.0])
    assert a.weights()[0] != b.weights()[0]


def test_losses_that_are_not_finite_do_not_enter_the_history():
    sampler = LossSecondMomentResampler(diffusion(2), history_per_term=1)
    sampler.update_with_all_losses([0, 0, 1], [float("nan"), 2.0, float("inf")])
    assert sampler._loss_counts.tolist() == [1, 0]


@pytest.mark.parametrize("name", ["uniform", "loss-second-moment", "lognormal", "lognormal-even"])
def test_registry(name):
    t, weights = create_named_schedule_sampler(name, diffusion(10)).sample(5, "cpu")
    assert t.shape == weights.shape == (5,) and (weights > 0).all()


def test_unknown_name():
    with pytest.raises(UserError, match="schedule_sampler"):
        create_named_schedule_sampler("loss", diffusion(10))
