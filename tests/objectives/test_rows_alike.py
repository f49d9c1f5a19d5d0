"""A draw is a function of (seed, step, row): the same to the last bit, however many rows a process draws at once."""

from dataclasses import fields

import pytest
import torch

from cm.commands.cli import parse_config
from cm.config.scripts import SCRIPTS
from cm.diffusion.alpha_sigma import AlphaSigma
from cm.diffusion.grid import karras_sigma
from cm.diffusion.noise_levels import ve_levels, vp_levels
from cm.diffusion.proposals import Proposal
from cm.nn import LANES, alike
from cm.objectives.flow_times import TimeLaw
from cm.objectives.improved_meanflow import ScaleLaw
from cm.objectives.pairs import lower_level
from cm.seeding import StepRandom
from cm.training.factory import create_objective

ROWS = 67
LENGTHS = (1, 3, 10, 33)
# Before they are rounded to fp32, which would hide most differences
LAWS = {
    "karras": lambda u: karras_sigma(u, 0.002, 80.0),
    "another rho": lambda u: karras_sigma(u, 0.002, 80.0, 5.5),
    "cosine": AlphaSigma("cosine").level,
    "ve schedule": AlphaSigma("ve").level,
    "ve": ve_levels(AlphaSigma("ve")).level,
    "vp": vp_levels().level,
    "cut normal": Proposal(-1.1, 2.0, -6.0, 4.0).inverse,
    "cut t": Proposal(-1.1, 2.0, -6.0, 4.0, df=2.0).inverse,
    "normal": Proposal(-1.1, 2.0).inverse,
    "ratio": lambda u: lower_level(4 * u.float(), 0.5),
    "logit-normal": lambda u: torch.stack(TimeLaw().logit_normal(6 * u - 3, 2 - 5 * u, u), 1),
    "dyadic": lambda u: torch.stack(TimeLaw(octaves=12).dyadic(u, u.square(), u), 1),
    "scales": ScaleLaw(beta=2.0).scale,
}


# One of each kind of draw
PRESETS = {
    "digits_cd": "cm_train",
    "digits_pd": "cm_train",
    "digits_cont_cd": "cm_train",
    "digits_ict": "cm_train",
    "digits_ect": "cm_train",
    "digits_tcm": "cm_train",
    "digits_sct": "cm_train",
    "digits_ctm": "cm_train",
    "digits_mcd4": "cm_train",
    "digits_meanflow": "cm_train",
    "digits_improved_meanflow": "cm_train",
    "digits_shortcut": "cm_train",
    "digits_psd": "cm_train",
    "digits_edm": "edm_train",
    "digits_ve": "edm_train",
    "digits_iddpm": "edm_train",
}


@pytest.mark.parametrize("law", LAWS)
def test_a_level_does_not_depend_on_how_many_are_computed(law):
    u = torch.rand(320, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = LAWS[law](u)
    for length in LENGTHS:
        parts = [LAWS[law](part) for part in u.split(length)]
        assert torch.equal(torch.cat(parts), whole), length


@pytest.mark.parametrize("preset", PRESETS)
def test_a_draw_does_not_depend_on_the_rows_beside_it(preset):
    objective = create_objective(parse_config(SCRIPTS[PRESETS[preset]], ["--preset", preset]))
    x0 = torch.zeros(ROWS, 1, 2, 2)

    def draw(start: int, stop: int):
        return objective.draw(x0[start:stop], 7, StepRandom(0, 7, start, stop, ROWS))

    whole = draw(0, ROWS)
    for length in LENGTHS:
        parts = [draw(k, min(k + length, ROWS)) for k in range(0, ROWS, length)]
        for field in fields(whole):
            value = getattr(whole, field.name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(torch.cat([getattr(p, field.name) for p in parts]), value), field.name
            else:
                assert all(getattr(p, field.name) == value for p in parts), field.name


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, LANES)])
def test_alike_is_the_function(shape):
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.1
    assert alike(torch.log, x).shape == x.shape
    assert torch.equal(alike(torch.log, x), torch.log(x))
    assert torch.equal(alike(torch.log, x.mT if x.ndim == 2 else x), torch.log(x.mT if x.ndim == 2 else x))
