"""A process that waits for other ranks says so, and ends in one line."""

import datetime
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from cm.errors import UserError
from cm.runtime import launch
from tests.helpers import mp

PROGRAM = """
from cm.runtime import distributed, job, launch
launch.PATIENCE, job.JOIN_TIMEOUT = 0.5, 3.0

def main():
    distributed.setup_dist()
    print(distributed.get_rank(), distributed.get_world_size())

job.run_main(main)
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(env: dict, program: str = PROGRAM) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = {"OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen([sys.executable, "-c", program], env=env, cwd=mp.ROOT, text=True, **pipes)


def end(env: dict) -> tuple[int, list[str]]:
    """(exit code, our lines on the screen) of a process that is started alone."""
    process = start(env)
    said = process.communicate(timeout=60)[1]
    assert "Traceback" not in said
    return process.returncode, re.findall(
        r"^(?:rank|error).*", said, re.MULTILINE
    )  # c10d has its own warnings


def torchrun(rank: int) -> dict:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return {"RANK": str(rank), "WORLD_SIZE": "2", **address}


SLURM = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("env", "who", "told"),
    [
        (torchrun(0), "rank 0 of 2", "1 more (RANK, WORLD_SIZE are set; unset them to run alone)"),
        (torchrun(1), "rank 1 of 2", "rank 0 at 127.0.0.1:"),
        (SLURM | {"MASTER_PORT": free_port()}, "rank 0 of 4", "3 more (SLURM_STEP_NUM_TASKS is set; unset"),
    ],
)
def test_a_rank_that_waits_in_vain(env, who, told):
    code, lines = end(env)
    assert code == 2 and len(lines) == 2, lines
    assert lines[0].startswith(f"{who} waits for {told}")
    assert lines[1].startswith(f"error: {who} has waited 3 s for {told}")


def test_a_host_without_an_address_is_an_error_at_once():
    begin = time.monotonic()
    code, lines = end(torchrun(0) | {"MASTER_ADDR": "nosuchhost.invalid"})
    assert code == 2 and len(lines) == 1 and time.monotonic() - begin < 30
    assert lines[0].startswith("error: MASTER_ADDR: host nosuchhost.invalid cannot be found")


def test_ranks_that_meet_say_nothing():
    env = torchrun(0)
    both = [start(env | {"RANK": rank}) for rank in "01"]
    assert [process.communicate(timeout=60)[0] for process in both] == ["0 2\n", "1 2\n"]


@pytest.mark.parametrize(
    ("env", "number"),
    [
        (torchrun(1), signal.SIGTERM),
        (torchrun(1) | {"TORCHELASTIC_USE_AGENT_STORE": "True"}, signal.SIGINT),
    ],
)
def test_a_rank_that_waits_hears_a_signal(env, number):
    process = start(env, PROGRAM.replace("3.0", "600.0"))
    assert " waits for " in process.stderr.readline()
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (
        128 + number,
        "interrupted\n" if number == signal.SIGINT else "ended by SIGTERM\n",
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"RANK": "2"}, "this is rank 2 of 2: ranks count from 0"),
        ({"RANK": "-1"}, "this is rank -1 of 2: ranks count from 0"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT: 99999 is no port"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT: -1 is no port"),
    ],
)
def test_variables_that_make_no_sense(change, problem, monkeypatch):
    for name, value in (torchrun(0) | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=problem):
        launch.connect(launch.detect(), datetime.timedelta(seconds=1))
