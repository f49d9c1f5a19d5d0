"""Likelihoods of the probability flow against the closed form of Gaussian data."""

import math

import pytest
import torch

from cm.errors import UserError
from cm.sampling.likelihood import bits_per_dim, dequantized, log_likelihood
from cm.sampling.noise import IndexedGenerator
from tests.helpers.analytic import Gaussian

# Correlated Gaussian data in four coordinates: a Jacobian with off-diagonal entries.
MIX = torch.tensor(
    [[1.0, 0.3, 0.0, 0.2], [0.0, 0.7, -0.4, 0.0], [0.0, 0.0, 0.5, 0.1], [0.0, 0.0, 0.0, 0.9]],
    dtype=torch.float64,
)
COVARIANCE = MIX @ MIX.T
RANGE = {"sigma_min": 0.01, "sigma_max": 200.0, "tolerance": 1e-7}


def denoise(x, sigma):
    """E[x0 | x] = C (C + sigma^2 I)^-1 x, with a level for each row."""
    v = sigma[:, None, None] ** 2
    gain = COVARIANCE @ torch.linalg.inv(COVARIANCE + v * torch.eye(4, dtype=torch.float64))
    return (gain @ x.flatten(1)[..., None]).reshape(x.shape)


def data(count):
    noise = torch.randn(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (noise @ MIX.T).reshape(count, 1, 2, 2)


def closed_form(x, sigma_min=0.01):
    covariance = COVARIANCE + sigma_min**2 * torch.eye(4, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), covariance)
    return normal.log_prob(x.flatten(1))


def test_exact_divergence_gives_the_closed_form():
    x = data(6)
    got = log_likelihood(denoise, x, probe="exact", **RANGE)
    torch.testing.assert_close(got.log_prob, closed_form(x), atol=1e-3, rtol=0)
    # The flow whitens: the latent of sigma_max is (C + sigma_max^2)^1/2 (C + sigma_min^2)^-1/2 x.
    values, vectors = torch.linalg.eigh(COVARIANCE)
    gains = ((values + 200.0**2) / (values + 0.01**2)).sqrt()
    expected = x.flatten(1) @ (vectors * gains) @ vectors.T
    torch.testing.assert_close(got.latent.flatten(1), expected, rtol=1e-4, atol=1e-2)
    assert (got.nfe > 20).all()


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_the_estimator_is_unbiased(probe):
    x = data(1).expand(600, 1, 2, 2).contiguous()
    got = log_likelihood(
        denoise, x, IndexedGenerator(0, "probe"), probe=probe, **{**RANGE, "tolerance": 1e-5}
    )
    error = got.log_prob.std() / math.sqrt(600)
    assert 0.005 < error < 1
    assert abs(got.log_prob.mean() - closed_form(x)[0]) < 4 * error


def test_rademacher_probes_are_exact_for_independent_coordinates():
    gauss = Gaussian(mean=0.0, std=0.5)
    x = gauss.sample((4, 3, 2, 2), torch.Generator().manual_seed(0))
    got = log_likelihood(gauss.denoise, x, IndexedGenerator(0), **RANGE)
    normal = torch.distributions.Normal(0.0, math.sqrt(0.25 + 0.01**2))
    torch.testing.assert_close(got.log_prob, normal.log_prob(x).flatten(1).sum(1), atol=2e-3, rtol=0)


def test_an_image_does_not_depend_on_its_batch():
    x = data(8)
    x[1:] *= 20  # far from the data: other steps
    together = log_likelihood(denoise, x, probe="exact", **RANGE)
    alone = log_likelihood(denoise, x[:1], probe="exact", **RANGE)
    torch.testing.assert_close(alone.log_prob, together.log_prob[:1], rtol=0, atol=1e-9)
    assert alone.nfe[0] == together.nfe[0] and len(set(together.nfe.tolist())) > 1


def test_float32_models_and_no_grad_mode():
    gauss = Gaussian(mean=0.0, std=0.5)
    x = gauss.sample((2, 3), torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        got = log_likelihood(gauss.denoise, x, IndexedGenerator(0))
    normal = torch.distributions.Normal(0.0, 0.5)
    torch.testing.assert_close(got.log_prob.float(), normal.log_prob(x).sum(1), atol=1e-2, rtol=0)
    assert not x.requires_grad and got.latent.dtype == torch.float32


def test_bits_per_dim_of_a_uniform_density_is_its_entropy():
    """256 equally likely grey levels, dequantised: a density of 127.5 / 256 on [-1, 1] and half a level beyond."""
    log_prob = torch.tensor([10 * math.log(127.5 / 256)])
    assert bits_per_dim(log_prob, 10).item() == pytest.approx(8.0)
    # Twice as wide a density costs one bit.
    assert bits_per_dim(log_prob - 10 * math.log(2), 10).item() == pytest.approx(9.0)
    levels = torch.arange(256) / 127.5 - 1
    low, high = (dequantized(levels, torch.full_like(levels, u)) for u in (0.0, 1.0))
    torch.testing.assert_close(high[:-1], low[1:])
    torch.testing.assert_close((low + high) / 2, levels)


def test_unknown_probe():
    with pytest.raises(UserError, match="probe must be one of rademacher, gaussian, exact"):
        log_likelihood(denoise, data(1), probe="sobol")
