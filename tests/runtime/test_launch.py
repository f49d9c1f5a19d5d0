"""How jobs start and end. Most cases run in forked ranks; the real launchers run where they matter."""

import concurrent.futures
import os
import re
import subprocess

import pytest

from tests.helpers import mp

PROGRAMS = "tests.helpers.launch_programs:"
HELLO_2 = "[(0, 2, 0, 11.0, [0.0, 0.0, 0.0]), (1, 2, 1, 11.0, [0.0, 0.0, 0.0])]\n"


@pytest.mark.parametrize(
    "program, codes, output",
    [
        ("hello", [0, 0], HELLO_2),
        # All ranks fail alike: one line. One rank fails: its line, and the other does not report what follows from it.
        ("user_error_before_setup", [2, 2], "error: --data_dir is empty\n"),
        ("user_error_on_all", [2, 2], "error: --data_dir is empty\n"),
        ("user_error_on_one", [2, 2], "error: --data_dir of rank 1 is empty\n"),
        ("exit_code_on_one", [75, 75], ""),
        ("exit_code_on_one_that_others_survive", [3, 0], ""),
        # A rank that has left on purpose lets the others finish.
        ("exit_code_on_all", [75, 75], "rank 0 has finished its work\nrank 1 has finished its work\n"),
    ],
)
def test_how_two_ranks_end(program, codes, output):
    _listening, environments = mp.torchrun_like(2)
    assert mp.run_programs(PROGRAMS + program, environments) == (codes, output)


def test_a_crash_of_one_rank_ends_both_with_one_traceback():
    _listening, environments = mp.torchrun_like(2)
    codes, output = mp.run_programs(PROGRAMS + "crash_on_one", environments)
    assert codes == [1, 1] and output.count("Traceback") == 1
    assert output.startswith("rank 1 of 2 failed:") and output.endswith("ArithmeticError: deliberate\n")


def slurm_environments(job: int) -> list[dict]:
    """What srun tells two tasks on one node."""
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
    }
    return [step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]


def test_srun():
    assert mp.run_programs(PROGRAMS + "hello", slurm_environments(os.getpid())) == ([0, 0], HELLO_2)


def test_srun_with_an_error_on_all_tasks():
    environments = slurm_environments(os.getpid() + 1)
    assert mp.run_programs(PROGRAMS + "user_error_on_all", environments) == (
        [2, 2],
        "error: --data_dir is empty\n",
    )


def test_a_process_of_a_slurm_allocation_is_alone():
    batch_script = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    expected = "[(0, 1, 0, 1.0, [0.0, 0.0, 0.0])]\n"
    assert mp.run_programs(PROGRAMS + "hello", [batch_script]) == ([0], expected)


@pytest.fixture(scope="module")
def real_runs():
    """The real launches of this file, started at once: they mostly wait. (launcher, program) -> future."""
    runs = [
        ("mpiexec", "hello", 4),
        ("mpiexec", "crash_on_one", 2),
        ("mpiexec", "user_error_before_setup", 2),
        ("mpiexec", "user_error_on_one", 2),
        ("torchrun", "crash_on_one", 2),
        ("mpiexec", "finished_before_a_teardown_that_aborts", 2),
        ("torchrun", "finished_before_a_teardown_that_aborts", 2),
    ]
    with concurrent.futures.ThreadPoolExecutor(len(runs)) as pool:
        yield {(launcher, name): pool.submit(launch_program, name, n, launcher) for launcher, name, n in runs}


def launch_program(name: str, n: int, launcher: str) -> subprocess.CompletedProcess:
    # The programs wait for each other for 60 s; a run that ends sooner was ended.
    return mp.launch(["-m", "tests.helpers.launch_programs", name], n, launcher, timeout=50)


@pytest.mark.mpi
def test_mpiexec_on_four_ranks(real_runs):
    result = real_runs["mpiexec", "hello"].result()
    expected = [(rank, 4, rank, 1111.0, [0.0] * 3) for rank in range(4)]
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{expected}\n", "")


@pytest.mark.mpi
def test_a_crash_under_mpiexec_ends_all(real_runs):
    result = real_runs["mpiexec", "crash_on_one"].result()
    assert result.returncode == 1 and result.stderr.count("Traceback") == 1
    assert (
        result.stderr.startswith("rank 1 of 2 failed:") and "ArithmeticError: deliberate\n" in result.stderr
    )


@pytest.mark.mpi
def test_a_user_error_under_mpiexec(real_runs):
    result = real_runs["mpiexec", "user_error_before_setup"].result()
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "error: --data_dir is empty\n")


@pytest.mark.mpi
def test_a_user_error_of_one_rank_under_mpiexec(real_runs):
    result = real_runs["mpiexec", "user_error_on_one"].result()
    assert result.returncode == 2 and "error: --data_dir of rank 1 is empty\n" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.mpi
def test_torchrun_ends_all_ranks(real_runs):
    result = real_runs["torchrun", "crash_on_one"].result()
    ours = result.stderr.split("torch/distributed/elastic")[0]
    assert result.returncode != 0 and ours.count("Traceback") == 1
    assert "ArithmeticError: deliberate\n" in ours


@pytest.mark.mpi
@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_ranks_that_have_finished_meet_no_teardown(launcher, real_runs):
    result = real_runs[launcher, "finished_before_a_teardown_that_aborts"].result()
    assert result.returncode == 0 and "terminat" not in result.stderr.lower()
    # Lines of two processes may run into one another
    assert sorted(re.findall(r"rank \d says good bye", result.stdout)) == [
        "rank 0 says good bye",
        "rank 1 says good bye",
    ]


@pytest.mark.mpi
def test_the_helper_leaves_no_process_behind():
    code = "import time, os; print(f'<{os.getpid()}>', flush=True); time.sleep(100)"
    with pytest.raises(TimeoutError, match=r"no end after 1\.0 s") as error:
        mp.launch(["-c", code], 2, "mpiexec", timeout=1.0)
    pids = [int(pid) for pid in re.findall(r"<(\d+)>", str(error.value))]
    assert len(pids) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in pids)
