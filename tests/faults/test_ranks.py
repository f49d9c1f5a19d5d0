"""One rank dies, fails, hangs or gets a signal: the whole job ends at once and says why; then it goes on."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from cm.runtime import liveness
from cm.storage.checkpoint import complete_checkpoints
from cm.storage.weights import load_weights
from cm.tools.torture import compare
from tests.helpers import mp

PROGRAM = "tests.helpers.fault_programs:main"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, arr_0=np.random.RandomState(0).randint(0, 256, (12, 8, 8, 1), dtype=np.uint8))
    return path


def run(data, folder, world, fault="none:0:0", flags="", timeout=60):
    """Exit codes of the ranks, what they printed, seconds."""
    _store, environments = mp.torchrun_like(world)
    own = {"RUN": str(folder), "DATA": str(data), "FAULT": fault, "FLAGS": flags}
    start = time.monotonic()
    codes, printed = mp.run_programs(PROGRAM, [{**env, **own} for env in environments], timeout)
    return codes, printed, time.monotonic() - start


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    codes, printed, _ = run(data, folder, 2)
    assert codes == [0, 0], printed
    return folder


def lines(printed, word):
    return [line for line in printed.splitlines() if word in line]


def test_nothing_is_left_of_a_job_in_good_order(undisturbed):
    assert liveness.read_status(undisturbed)["ended"] == "finished"
    assert [beat.ended for beat in liveness.read_beats(undisturbed)] == ["finished", "finished"]


@pytest.mark.parametrize(("kind", "code"), [("kill", -9), ("leave", 0)])
def test_a_rank_that_dies_ends_the_job_and_is_named(data, tmp_path, kind, code):
    codes, printed, _ = run(data, tmp_path / "run", 2, f"{kind}:1:3")
    assert codes[0] not in (0, None, -9) and codes[1] == code
    found = liveness.read_status(tmp_path / "run")
    assert (found["ended"], found["rank"], found["exit_code"]) == ("lost rank", 1, 1)
    assert (
        found["message"].startswith("lost rank 1 of 2 on ") and "training step at step 3" in found["message"]
    )
    assert len(lines(printed, "error: ")) == 1 and "Traceback" not in printed
    assert f"lost rank: {found['message']}" in liveness.describe_last_run(tmp_path / "run")


def test_an_exception_on_one_rank_ends_all_with_one_traceback(data, tmp_path):
    codes, printed, _ = run(data, tmp_path / "run", 2, "raise:1:3")
    assert codes == [1, 1] and printed.count("Traceback (most recent call last)") == 1
    assert lines(printed, "ArithmeticError: deliberate") and "rank 1 of 2 failed" in printed
    found = liveness.read_status(tmp_path / "run")
    assert (found["ended"], found["message"], found["rank"]) == ("error", "ArithmeticError: deliberate", 1)


def test_an_exit_code_on_one_rank_ends_all(data, tmp_path):
    codes, printed, _ = run(data, tmp_path / "run", 2, "exit:1:3")
    assert codes == [7, 7] and lines(printed, "error: ") == ["error: rank 1 left training with exit code 7"]
    assert "Traceback" not in printed


def test_a_stuck_rank_ends_the_job_after_the_time_out_and_is_named(data, tmp_path):
    codes, printed, _ = run(data, tmp_path / "run", 2, "stuck:1:3", "--step_timeout 0.05")
    assert codes == [1, 1]
    found = liveness.read_status(tmp_path / "run")
    assert (found["ended"], found["rank"], found["step"]) == ("stuck rank", 1, 3)
    assert "no progress for 3 s (--step_timeout)" in found["message"]
    assert "rank 1 of 2" in found["message"] and "fault_programs.py" in found["message"]
    assert "stuck_for_ever" in found["message"]
    assert lines(printed, "error: ") == [f"error: {found['message']}"] and "Traceback" not in printed


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_the_run_goes_on(data, undisturbed, tmp_path):
    folder = tmp_path / "run"
    codes, printed, _ = run(data, folder, 2, "signal:1:2")
    assert codes == [liveness.EXIT_UNFINISHED] * 2, printed
    found = liveness.read_status(folder)
    assert (found["ended"], found["exit_code"]) == ("preempted", liveness.EXIT_UNFINISHED)
    assert found["step"] in (3, 4)
    assert [p.name for p in complete_checkpoints(folder)] == [f"step_{found['step']:06d}"]
    assert "Traceback" not in printed and "the same command goes on" in printed
    codes, printed, _ = run(data, folder, 2)
    assert codes == [0, 0] and "the latest start of this run: preempted" in printed
    compare(folder, undisturbed)


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(data, undisturbed, tmp_path, before, after):
    folder = tmp_path / "run"
    codes, printed, _ = run(data, folder, before, f"signal:{before - 1}:2")
    assert codes == [liveness.EXIT_UNFINISHED] * before, printed
    codes, printed, _ = run(data, folder, after)
    assert codes == [0] * after, printed
    for name in ("model000006.pt", "ema_0.9_000006.pt", "target_model000006.pt"):
        a, b = (load_weights(complete_checkpoints(r)[-1] / name)[0] for r in (folder, undisturbed))
        for key in b:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=2e-5)
    rows = [(r / "progress.jsonl").read_text().splitlines() for r in (folder, undisturbed)]
    assert len(rows[0]) == len(rows[1]) == 3


def launched(data, folder, fault, flags=""):
    """mpiexec with two ranks, once they train."""
    command = [*mp._launcher("mpiexec", 2), "-m", "tests.helpers.fault_programs"]
    env = {k: v for k, v in os.environ.items() if not mp.is_launcher_variable(k)}
    env |= {"RUN": str(folder), "DATA": str(data), "FAULT": fault, "FLAGS": flags, "OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=mp.ROOT, env=env, start_new_session=True, **pipe)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.mpi
def test_kill_9_under_mpiexec_leaves_nothing_behind_and_the_rank_is_named(data, tmp_path):
    process = launched(data, tmp_path / "run", "kill:1:3")
    try:
        process.communicate(timeout=60)
        assert process.returncode != 0
        wait_for(lambda: liveness.read_status(tmp_path / "run"), 10)
        found = liveness.read_status(tmp_path / "run")
        assert (found["ended"], found["rank"]) == ("lost rank", 1)
        ranks = liveness.read_beats(tmp_path / "run")
        assert len(ranks) == 2
        wait_for(lambda: not any(liveness.is_alive(rank) for rank in ranks), 10)
    finally:
        mp._end(process)


@pytest.mark.mpi
@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_rank_ends_the_job_under_mpiexec(data, tmp_path, rank):
    """Rank 0 keeps the store by which ranks agree on an error: the other one must not wait for it."""
    folder = tmp_path / "run"
    began = time.monotonic()
    process = launched(data, folder, f"freeze:{rank}:3", "--step_timeout 0.05 --startup_timeout 1")
    try:
        printed, _ = process.communicate(timeout=150)
        assert process.returncode != 0
        found = liveness.read_status(folder)
        assert (found["ended"], found["rank"]) == ("stuck rank", rank) and "no progress for 3 s" in printed
        ranks = liveness.read_beats(folder)
        wait_for(lambda: not any(liveness.is_alive(beat) for beat in ranks), 10)
    finally:
        mp._end(process)
    print(time.monotonic() - began)


@pytest.mark.mpi
def test_a_signal_to_mpiexec_reaches_the_ranks(data, tmp_path):
    folder = tmp_path / "run"
    process = launched(data, folder, "slow:0:0", "--total_training_steps 1000")
    try:
        wait_for(lambda: any(beat.step > 1 for beat in liveness.read_beats(folder)))
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == liveness.EXIT_UNFINISHED, printed
        assert liveness.read_status(folder)["ended"] == "preempted" and "stopped by SIGTERM" in printed
        assert len(complete_checkpoints(folder)) == 1
    finally:
        mp._end(process)


KEEPER = """
import sys, time, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(120)
"""
LEAVER = """
import sys, torch.distributed as dist
from cm.runtime import distributed, job
distributed._store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), 2, False, wait_for_workers=False)
print("connected", flush=True)
sys.stdin.readline()
job.end_job(1, "error: no progress\\n")
"""


def test_a_rank_ends_though_the_process_with_the_store_is_frozen():
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER], **pipes)
    try:
        port = keeper.stdout.readline().strip()
        with subprocess.Popen([sys.executable, "-c", LEAVER, port], cwd=mp.ROOT, **pipes) as leaver:
            try:
                assert leaver.stdout.readline() == "connected\n"
                keeper.send_signal(signal.SIGSTOP)
                _, printed = leaver.communicate("go\n", timeout=30)
            finally:
                leaver.kill()
    finally:
        keeper.kill()
        keeper.communicate()
    assert leaver.returncode == 1 and printed.endswith("error: no progress\n")
