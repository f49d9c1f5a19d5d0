"""The SLURM template, with stand-ins for srun and scontrol."""

import os
import subprocess

import pytest

from cm.runtime.liveness import EXIT_UNFINISHED
from tests.helpers.mp import ROOT

SCRIPT = ROOT / "scripts" / "slurm_train.sh"


@pytest.fixture
def submit(tmp_path):
    """Run the template with an srun that ends with a code; (exit code, output, calls of the stand-ins)."""

    def run(code, *argv, signals=False):
        calls = tmp_path / "calls"
        for name, end in (("srun", code), ("scontrol", 0)):
            kill = "kill -TERM $PPID; kill -USR1 $PPID; sleep 0.1\n" if signals and name == "srun" else ""
            (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n{kill}exit {end}\n')
            (tmp_path / name).chmod(0o755)
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
        done = subprocess.run([SCRIPT, *argv], env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, calls.read_text() if calls.exists() else ""

    return run


def test_an_unfinished_run_goes_back_to_the_queue(submit):
    code, output, calls = submit(EXIT_UNFINISHED, "scripts/cm_train.py", "--preset", "tiny", signals=True)
    assert code == EXIT_UNFINISHED and "job 77 goes back to the queue" in output
    assert "scontrol requeue 77" in calls and "python scripts/cm_train.py --preset tiny" in calls
    assert "--kill-on-bad-exit=0" in calls


@pytest.mark.parametrize("end", [0, 1, 2])
def test_any_other_end_is_the_end(submit, end):
    code, _, calls = submit(end, "x.py")
    assert code == end and "scontrol" not in calls


def test_usage(submit):
    code, output, calls = submit(0)
    assert code == 2 and "usage" in output and not calls


def test_the_signal_comes_before_the_limit_and_the_job_may_be_requeued():
    lines = SCRIPT.read_text().splitlines()
    options = [line.split()[1].split("=")[0] for line in lines if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal", "--open-mode", "--ntasks-per-node"} <= set(options)
    # sbatch stops reading options at the first command.
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
