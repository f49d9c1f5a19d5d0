"""What the driver adds to a sampler: its signature, levels, precision, noise, progress and callback."""

import inspect
from itertools import pairwise

import pytest
import torch

from cm.sampling.driver import Step, option_names, own_options, sampler
from cm.sampling.registry import SAMPLERS, run_sampler
from tests.helpers.analytic import Gaussian

GAUSS = Gaussian(mean=0.3, std=0.5)
LEVELS = torch.tensor([8.0, 2.0, 0.5, 0.0], dtype=torch.float64)


@sampler
def sample_noisy(denoise, x, sigmas, generator, *, scale: float = 1.0):
    """To the next level by fresh noise."""
    for sigma, sigma_next in pairwise(sigmas):
        denoised = denoise(x, sigma)
        yield Step(x, sigma, denoised, 2 * sigma)
        x = denoised + scale * sigma_next * generator.randn_like(x)
    return x


def test_the_public_call():
    signature = inspect.signature(sample_noisy)
    assert list(signature.parameters) == [
        "denoiser", "x", "sigmas", "generator", "progress", "callback", "scale",
    ]  # fmt: skip
    assert signature.parameters["scale"].kind is inspect.Parameter.KEYWORD_ONLY
    assert signature.return_annotation is torch.Tensor
    assert (
        sample_noisy.__name__ == "sample_noisy"
        and sample_noisy.__doc__ == "To the next level by fresh noise."
    )
    assert option_names(sample_noisy) == {"scale"}
    assert own_options(sample_noisy, {"scale": 2.0, "other": 1}) == {"scale": 2.0}
    with pytest.raises(TypeError, match=r"sample_noisy.*'size'"):
        sample_noisy(GAUSS.denoise, torch.ones(1, 3), LEVELS, size=1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_has_the_same_call(name):
    parameters = list(inspect.signature(SAMPLERS.load(name)).parameters.values())
    assert [p.name for p in parameters[:6]] == [
        "denoiser", "x", "sigmas", "generator", "progress", "callback",
    ]  # fmt: skip
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[6:])
    assert [p.default for p in parameters[3:6]] == [None, False, None]
    assert SAMPLERS.load(name).__doc__


def test_the_callback_sees_each_step_before_it_is_taken():
    events = []

    def denoise(x, sigma):
        events.append("evaluated")
        return GAUSS.denoise(x, sigma)

    x = torch.ones(2, 3)
    sample_noisy(denoise, x, LEVELS, callback=events.append)
    infos = events[1::2]
    assert events[::2] == ["evaluated"] * 3
    assert [info["i"] for info in infos] == [0, 1, 2]
    for info, sigma in zip(infos, LEVELS):
        assert info.keys() == {"i", "x", "sigma", "sigma_hat", "denoised"}
        assert info["sigma"] == sigma and info["sigma_hat"] == 2 * sigma
    assert torch.equal(infos[0]["x"], x)
    plain = []
    run_sampler("euler", GAUSS.denoise, x, None, steps=3, sigmas=LEVELS, callback=plain.append)
    assert [float(info["sigma_hat"]) for info in plain] == LEVELS[:-1].tolist()


def test_one_level_for_the_whole_batch_in_the_states_precision():
    seen = []
    sample_noisy(lambda x, sigma: (seen.append((x, sigma)), x)[1], torch.ones(2, 3).bfloat16(), LEVELS)
    for (x, sigma), level in zip(seen, LEVELS):
        assert x.dtype == sigma.dtype == torch.float32 and sigma.tolist() == [level, level]


def test_without_a_generator_the_noise_is_torchs():
    x = torch.ones(2, 3)
    torch.manual_seed(0)
    first = sample_noisy(GAUSS.denoise, x, LEVELS)
    assert not torch.equal(first, sample_noisy(GAUSS.denoise, x, LEVELS))
    torch.manual_seed(0)
    assert torch.equal(first, sample_noisy(GAUSS.denoise, x, LEVELS))


def test_levels_that_are_none():
    x = torch.ones(2, 3)
    for levels in ([1.0, 2.0], [1.0]):
        with pytest.raises(ValueError, match="at least two levels that never increase"):
            sample_noisy(GAUSS.denoise, x, torch.tensor(levels))


def test_a_sampler_must_yield():
    def steps(denoise, x, sigmas, generator):
        return x

    with pytest.raises(TypeError, match="steps must yield"):
        sampler(steps)


def test_progress_counts_steps(capsys):
    run_sampler("heun", GAUSS.denoise, torch.ones(1, 3), None, steps=5, progress=True)
    assert "5/5" in capsys.readouterr().err
    run_sampler("heun", GAUSS.denoise, torch.ones(1, 3), None, steps=5)
    assert capsys.readouterr().err == ""


def test_an_option_that_no_sampler_has():
    with pytest.raises(TypeError, match="no sampler has an option s_chrun"):
        run_sampler("heun", GAUSS.denoise, torch.ones(1, 3), None, steps=3, options={"s_chrun": 1.0})
    run_sampler("euler", GAUSS.denoise, torch.ones(1, 3), None, steps=3, options={"s_churn": 1.0})
