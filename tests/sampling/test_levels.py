"""Grids by name: levels decrease from sigma_max to where the sample ends, and each grid takes its own options."""

import pytest
import torch

from cm.diffusion.alpha_sigma import AlphaSigma
from cm.diffusion.grid import karras_sigmas
from cm.diffusion.sde import VESDE, VPSDE
from cm.errors import UserError
from cm.sampling.levels import GRIDS, grid_levels, karras, spread
from cm.sampling.registry import SAMPLERS, run_sampler, sampler_sigmas
from tests.helpers.analytic import Gaussian


@pytest.mark.parametrize("name", GRIDS)
def test_levels_decrease_from_sigma_max_to_the_end(name):
    levels = grid_levels(name, 6, 0.02, 80.0, 7.0, {"ts": [0, 2, 5]})
    assert (levels[1:] < levels[:-1]).all() and not levels.is_cuda
    assert len(levels) == {"ts": 3, "intervals": 8}.get(name, 7)
    assert levels[-1].item() == (pytest.approx(0.02) if name in ("ts", "to_lowest") else 0)
    assert levels[0].item() == pytest.approx(71.291 if name == "iddpm" else 80.0, rel=1e-5)


def test_published_and_exact_grid():
    """float32 as the original's: 79.999985 for 80."""
    exact = karras_sigmas(18, 0.002, 80.0)
    rounded = karras(18, 0.002, 80.0, 7.0)
    assert rounded.dtype == torch.float32 and rounded[0].item() == pytest.approx(79.999985, abs=1e-6)
    torch.testing.assert_close(rounded[:-1].double(), exact, rtol=1e-5, atol=0)
    assert torch.equal(grid_levels("edm", 18, 0.002, 80.0)[:-1], exact)


@pytest.mark.parametrize("spacing", ["linear", "trigonometric"])
def test_jumps_are_equally_long_in_the_time_of_a_path(spacing):
    levels = grid_levels("jumps", 4, 0.002, 80.0, options={"spacing": spacing})
    time = levels / (1 + levels) if spacing == "linear" else torch.atan(levels / 0.5)
    torch.testing.assert_close(time[:-1] - time[1:], (time[0] / 4).expand(4))


def test_own_options():
    schedule = {"diffusion_schedule": "cosine", "ts": None, "sde": VPSDE()}
    cosine = grid_levels("intervals", 4, 0.002, 80.0, options=schedule)
    assert torch.equal(cosine, AlphaSigma("cosine").steps(4).double())
    assert torch.equal(grid_levels("intervals", 4, 0.002, 80.0), karras(5, 0.002, 80.0, 7.0))
    vp = grid_levels("sde", 5, 0.002, 80.0, options=schedule)
    assert torch.equal(vp[:-1], VPSDE().levels(5, 0.002, 80.0))
    assert torch.equal(grid_levels("sde", 5, 0.002, 80.0)[:-1], karras_sigmas(5, 0.002, 80.0))


def test_a_sampler_walks_along_its_grid():
    ve = VESDE(0.002, 80.0)
    seen = []

    def denoise(x, sigma):
        seen.append(sigma[0].item())
        return Gaussian().denoise(x, sigma)

    x = torch.ones(1, 3, dtype=torch.float64)
    run_sampler("pc", denoise, x, None, steps=3, options={"sde": ve, "corrector": "none"})
    assert seen == pytest.approx([80.0, 0.4, 0.002], rel=2e-4)
    assert len(sampler_sigmas("progdist", 4, 0.002, 80.0, 7.0)) == 6
    assert all(row.grid in GRIDS for row in SAMPLERS.values())


def test_messages_name_the_argument():
    for match, arguments in (
        ("grid must be one of karras, .* got .nope", ("nope", 3)),
        ("steps must be at least 1, got 0", ("karras", 0)),
        ("steps must be at least 2 where ts", ("ts", 1)),
        ("ts needs at least two", ("ts", 3)),
    ):
        with pytest.raises(UserError, match=match) as error:
            grid_levels(*arguments, 0.002, 80.0)
        assert "--" not in str(error.value)


def test_evaluations_spread_over_what_a_model_knows():
    assert spread(3, 10, 9) == [0, 3, 6, 9], "the last is where the sample ends"
    assert spread(3, 10, 6) == [0, 3, 6, 9] and spread(3, 10, 4) == [0, 2, 4, 9]
    assert spread(1, 10, 0) == [0, 9] and spread(50, 4, 3) == [0, 1, 2, 3] and spread(50, 4, 1) == [0, 1, 3]
