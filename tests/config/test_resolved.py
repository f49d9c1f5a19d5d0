"""Every preset and every published command line resolves to the values that it had before the registry came.

tests/fixtures/resolved_flags.json holds, for each, the flags that differed from the script's defaults then.
"""

import json
from pathlib import Path

import pytest

from cm.commands.cli import FORMER, RENAMED, parse_config
from cm.config.scripts import SCRIPTS, resolved

KNOWN = json.loads((Path(__file__).parents[1] / "fixtures" / "resolved_flags.json").read_text())


def check(script: str, argv: list[str], differs: dict) -> None:
    """All flags of then, but those that are gone or belong to a row that this command does not choose."""
    now = resolved(parse_config(SCRIPTS[script], argv))
    then = {**KNOWN["defaults"][script], **differs}
    missing = {name for name in then if name not in now}
    assert not missing & set(differs), f"{missing & set(differs)} were set and are gone"
    assert {n: now[n] for n in then if n in now} == {n: v for n, v in then.items() if n in now}
    assert missing <= FORMER | RENAMED.keys() | OPTIONAL[script]


# What belongs to one row each now
OPTIONAL = {
    "edm_train": {"p_mean", "p_std", "num_timesteps"},
    "classifier_train": {
        *("p_mean", "p_std", "num_timesteps", "augment"),
        *("network", "precond", "class_cond", "preview_count", "preview_interval", "diffusion_schedule"),
        *("boundary", "c_out_formula", "augment_dim"),
    },
    "cm_train": {"stop_grad", "clock", "lpips_path", "lpips_size", "lpips_precision"},
    "image_sample": {
        *("noise_schedule", "state_scale", "solver_order", "solver_alpha"),
        *("sde", "predictor", "corrector", "corrector_steps", "snr", "tolerance"),
    },
    "image_edit": {
        *("factor", "sigma_start", "repeat", "sigma", "noisy_input", "between", "frames", "frame_ms"),
        *("animation", "mask", "final_project"),
    },
    "ternary_search": set(),
    "likelihood": set(),
}


@pytest.mark.parametrize("name", KNOWN["presets"])
def test_presets_resolve_as_before(name):
    script, preset, variant = name.split()
    check(script, ["--preset", preset, "--variant", variant], KNOWN["presets"][name])


@pytest.mark.parametrize("number", range(len(KNOWN["published"])))
def test_published_command_lines_resolve_as_before(number):
    command = KNOWN["published"][number]
    check(command["script"], command["argv"], command["differs"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_are_as_before(script):
    check(script, [], {})
