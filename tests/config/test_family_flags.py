"""Flags of the family's systems: what columns and samplers bring with them, what contradicts them, registries."""

import math
from itertools import pairwise

import pytest
import torch

from cm.commands.cli import parse_config
from cm.commands.sample import noise_levels
from cm.config.rows import NOISE_LEVELS, PRECONDS
from cm.config.scripts import CmTrainConfig, EdmTrainConfig, SampleConfig
from cm.diffusion.noise_schedules import VPSchedule, ddpm_levels, iddpm_levels
from cm.diffusion.precond import (
    BoundaryPrecond,
    ConsistencyPrecond,
    DDPMPrecond,
    IDDPMPrecond,
    VEPrecond,
    VPPrecond,
)
from cm.models.factory import create_precond
from tests.helpers.small_runs import refuses


def test_a_column_brings_its_noise_and_weighting_unless_they_are_given():
    vp = parse_config(EdmTrainConfig, ["--precond", "vp"])
    assert (vp.schedule_sampler, vp.weight_schedule, vp.sigma_max) == ("vp", "snr", 80.0)
    ve = parse_config(EdmTrainConfig, ["--precond", "ve", "--weight_schedule", "karras", "--sigma_max", "50"])
    assert (ve.schedule_sampler, ve.weight_schedule) == ("ve", "karras")
    assert (ve.sigma_min, ve.sigma_max) == (0.02, 50.0)
    # A flag beats the column, the column the preset that it was added to.
    digits = parse_config(EdmTrainConfig, ["--preset", "digits_edm", "--precond", "vp"])
    assert (digits.schedule_sampler, digits.weight_schedule, digits.lr) == ("vp", "snr", 2e-3)
    assert parse_config(CmTrainConfig, ["--precond", "ve"]).weight_schedule == "karras"


def test_spans_of_the_columns():
    low, high = VPSchedule().sigma(torch.tensor([1e-5, 1.0], dtype=torch.float64)).tolist()
    assert PRECONDS["vp"].span == (pytest.approx(low, rel=1e-3), pytest.approx(high, rel=1e-4))
    u = iddpm_levels()
    assert PRECONDS["iddpm"].span == (
        pytest.approx(u[-1].item(), rel=5e-3),
        pytest.approx(u[0].item(), rel=1e-5),
    )
    for name, levels in {"iddpm": iddpm_levels(), "ddpm": ddpm_levels()}.items():
        low, high = PRECONDS[name].span
        assert low <= levels[-1] and levels[0] <= high
        config = parse_config(EdmTrainConfig, ["--precond", name])
        assert config.schedule_sampler == name
        assert config.sigma_min == pytest.approx(levels[-1].item(), rel=1e-12)  # the lowest level itself
    refuses(
        "--sigma_max 80.0 leave .* --precond iddpm",
        lambda: parse_config(SampleConfig, ["--precond", "iddpm"]),
    )
    refuses(
        "--boundary piecewise",
        lambda: parse_config(CmTrainConfig, ["--precond", "vp", "--boundary", "piecewise"]),
    )
    refuses("--precond must be one of", lambda: parse_config(EdmTrainConfig, ["--precond", "cosine"]))


def test_the_factory_builds_the_columns():
    vp = EdmTrainConfig(precond="vp", schedule_sampler="vp")
    assert isinstance(create_precond(vp, consistency=False), VPPrecond)
    assert isinstance(create_precond(EdmTrainConfig(precond="iddpm"), consistency=False), IDDPMPrecond)
    ve = [
        create_precond(EdmTrainConfig(precond="ve", network=n), consistency=False) for n in ("adm", "ncsnpp")
    ]
    assert ve == [VEPrecond(250.0), VEPrecond(1.0)]
    student = create_precond(CmTrainConfig(precond="vp"), consistency=True)
    assert student == BoundaryPrecond(VPPrecond(), ConsistencyPrecond())
    assert create_precond(EdmTrainConfig(precond="ddpm"), consistency=False) == DDPMPrecond()
    for name in ("vp", "ve", "iddpm", "ddpm"):
        assert hasattr(NOISE_LEVELS.load(name)(EdmTrainConfig()), "level")


def test_levels_of_the_samplers():
    def levels(*flags):
        return noise_levels(parse_config(SampleConfig, ["--steps", "5", "--sampler", *flags])).tolist()

    ve = levels("pc", "--sde", "ve")
    ratios = [a / b for a, b in pairwise(ve[:-1])]
    assert ve[0] == pytest.approx(80) and ve[-1] == 0 and ratios == pytest.approx([ratios[0]] * 4)
    vp = levels("euler", "--time_steps", "vp")
    assert vp[0] == pytest.approx(80) and vp[-2:] == [pytest.approx(0.002), 0]
    assert levels("heun") != vp
    cosine = levels("progdist", "--training_mode", "progdist", "--diffusion_schedule", "cosine")
    low, high = (2 / math.pi * math.atan(s) for s in (0.002, 80))
    expected = [math.tan(math.pi / 2 * (low + (high - low) * i / 5)) for i in range(5, -1, -1)]
    assert cosine == pytest.approx([*expected, 0], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--sampler pc --predictor heun", "--predictor must be one of reverse_diffusion"),
        ("--sampler pc --corrector mala", "--corrector must be one of langevin"),
        ("--sampler pc --sde vpp", "--sde must be one of ve"),
        ("--sampler heun --predictor ancestral", "--predictor is for --sampler pc, not for heun"),
        ("--sampler pc --time_steps vp", "--time_steps is for"),
        ("--sampler general --time_steps ddpm", "--time_steps must be one of"),
        ("--sampler general --solver_order 3", "--solver_order must be at most 2"),
        ("--sampler general --solver_alpha 0", "--solver_alpha must be positive"),
        ("--sampler rk45 --tolerance 0", "--tolerance must be positive"),
        ("--classifier_scale 2", "--classifier_scale is called --guidance now"),
        (
            "--training_mode consistency_training --sampler onestep --guidance 2",
            "--guidance is for --sampler heun",
        ),
        ("--guidance 1:4", "samples have one scale"),
        ("--guidance 2,5,1", "noise levels must increase"),
        ("--sampler onestep --guide x", "--guide is for --sampler heun"),
    ],
)
def test_bad_sampler_flags(flags, match):
    refuses(match, lambda: parse_config(SampleConfig, flags.split()))


@pytest.mark.parametrize(
    ("cls", "flags", "match"),
    [
        (
            EdmTrainConfig,
            "--diffusion_schedule cosine --schedule_sampler uniform",
            "--schedule_sampler uniform",
        ),
        (CmTrainConfig, "--diffusion_schedule cosine", "--diffusion_schedule cosine is for"),
        (CmTrainConfig, "--guide x", "--guide x does nothing at --guidance 1"),
        (CmTrainConfig, "--training_mode tcm --boundary zero --guidance 2", "not of tcm"),
        (
            CmTrainConfig,
            "--training_mode progdist --scale_mode progdist --start_scales 4 --guidance 2",
            "not of progdist",
        ),
        (EdmTrainConfig, "--label_dropout 0.1", "--label_dropout 0.1 needs --class_cond True"),
        (EdmTrainConfig, "--label_dropout 1 --class_cond True", "--label_dropout must be below 1"),
        (EdmTrainConfig, "--diffusion_schedule quadratic", "--diffusion_schedule must be one of"),
    ],
)
def test_bad_schedules(cls, flags, match):
    refuses(match, lambda: parse_config(cls, flags.split()))
