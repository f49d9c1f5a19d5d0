"""The command of the learning proof: what it runs is valid, and ends up in the table."""

import shlex
from pathlib import Path

import pytest

from cm.commands.cli import parse_config
from cm.config.scripts import SCRIPTS
from cm.config.validation import require_inputs
from cm.errors import UserError
from evaluations.reports.digits_report import TITLES
from evaluations.reports.learning_proof import commands, execute, minutes


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_command_is_valid_and_every_sample_set_has_a_title(ranks):
    trained, drawn = [], []
    for line in commands("runs/proof", ranks):
        words = shlex.split(line)
        script = next((w for w in words if w.startswith("scripts/")), "")
        assert script != "scripts/prepare_data.py" or words[:3] == [script, "digits", "runs/proof/data"]
        if Path(script).stem not in SCRIPTS:
            continue
        config = parse_config(SCRIPTS[Path(script).stem], words[words.index(script) + 1 :])
        require_inputs(config)
        if script == "scripts/image_sample.py":
            assert config.model_path in trained
            drawn.append(Path(config.out_dir).name)
        else:
            assert ("torch.distributed.run" in words) == (ranks == 2)
            assert not getattr(config, "teacher_model_path", "") or config.teacher_model_path in trained
            trained.append(config.out_dir)
    assert len(trained) == 7 and len(set(drawn)) == len(drawn) == 14 and set(drawn) <= TITLES.keys()


def test_a_failing_command_is_named():
    assert execute("-c 'print(6 * 7)'")[0] == "42\n"
    with pytest.raises(UserError, match=r"python -c .* ended with exit code 3"):
        execute("-c 'raise SystemExit(3)'")
    assert minutes(125.4) == "2:05" and minutes(119.7) == "2:00"
