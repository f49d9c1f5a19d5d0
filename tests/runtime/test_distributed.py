import datetime
import os
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from cm import dist_util
from cm.errors import UserError
from cm.runtime import distributed, job, launch
from cm.runtime.cpu import usable_cores
from tests.helpers import mp

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SLURM_STEP = {
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
    "SLURM_STEP_NODELIST": "gpu[007-008],cpu1",
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "2",
}


@pytest.fixture
def alone(monkeypatch):
    """No launcher in the environment, whatever started pytest."""
    for name in [name for name in os.environ if mp.is_launcher_variable(name)]:
        monkeypatch.delenv(name)
    return monkeypatch


# -- who started us ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, launch.Launch()),
        (TORCHRUN, launch.Launch("torchrun", 3, 4, 1, 2)),
        # torchrun inside an MPI or SLURM allocation is torchrun.
        (TORCHRUN | {"PMI_SIZE": "2", "PMI_RANK": "0"} | SLURM_STEP, launch.Launch("torchrun", 3, 4, 1, 2)),
        (
            {"PMI_SIZE": "4", "PMI_RANK": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"},
            launch.Launch("mpi", 2, 4, 0, 2),
        ),
        (
            {
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            launch.Launch("mpi", 3, 4, 1, 2),
        ),
        # mpiexec inside a SLURM allocation starts its helpers by srun: MPI's variables count.
        (SLURM_STEP | {"PMI_SIZE": "8", "PMI_RANK": "5"}, launch.Launch("mpi", 5, 8, 0, 1)),
        (SLURM_STEP, launch.Launch("slurm", 4, 6, 1, 3)),
        # One process of an allocation, and single-rank launches, are single processes.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, launch.Launch()),
        (SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "1"}, launch.Launch()),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, launch.Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a"}, launch.Launch()),
    ],
)
def test_detection(env, expected):
    assert launch.detect(env) == expected


def test_slurm_names_and_numbers():
    assert launch.first_slurm_host("gpu[003-007,12],cpu1") == "gpu003"
    assert launch.first_slurm_host("rack2-n[08,11]-ib,x") == "rack2-n08-ib"
    assert launch.first_slurm_host("n1,n[2-3]") == "n1"
    assert launch.slurm_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    host, port = launch.slurm_address(SLURM_STEP)
    assert host == "gpu007" and 15000 <= port < 30000
    assert launch.slurm_address(SLURM_STEP | {"SLURM_STEP_ID": "3"})[1] != port
    assert launch.slurm_address(SLURM_STEP | {"MASTER_ADDR": "h", "MASTER_PORT": "7"}) == ("h", 7)


def test_a_variable_that_is_no_number_is_named():
    with pytest.raises(UserError, match="WORLD_SIZE should be an integer, got 'x'"):
        launch.detect(TORCHRUN | {"WORLD_SIZE": "x"})


def test_torchrun_without_a_port(alone):
    with pytest.raises(UserError, match="MASTER_PORT"):
        launch.connect(launch.detect(TORCHRUN), timedelta(seconds=1))


def test_the_mpiexec_of_another_library_is_noticed(alone):
    fake = types.ModuleType("mpi4py")
    fake.MPI = types.SimpleNamespace(
        COMM_WORLD=types.SimpleNamespace(size=1, rank=0),
        Get_library_version=lambda: "Open MPI v5.0.11, package: Open MPI\0",
    )
    alone.setitem(sys.modules, "mpi4py", fake)
    place = launch.detect({"PMI_SIZE": "2", "PMI_RANK": "0"})
    with pytest.raises(
        UserError, match=r"started 2 processes.*Open MPI v5.0.11, which sees 1.*\[mpi\]'"
    ) as e:
        launch.connect(place, timedelta(seconds=1))
    assert "\n" not in str(e.value) and "srun" not in str(e.value)
    alone.setenv("SLURM_STEP_ID", "0")
    with pytest.raises(UserError, match="srun, --mpi=none"):
        launch.connect(place, timedelta(seconds=1))


def test_a_missing_mpi_is_one_line(alone):
    alone.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"pip install '.*\[mpi\]'.*, or start with torchrun") as e:
        launch.connect(launch.detect({"PMI_SIZE": "2", "PMI_RANK": "0"}), timedelta(seconds=1))
    assert "\n" not in str(e.value)


# -- one process -------------------------------------------------------------------------------------------------


def test_one_process_needs_no_group_and_no_mpi(alone):
    alone.setitem(sys.modules, "mpi4py", None)
    threads = torch.get_num_threads()
    distributed.setup_dist()
    assert not torch.distributed.is_initialized() and torch.get_num_threads() == threads
    assert (distributed.get_rank(), distributed.get_world_size(), distributed.get_local_rank()) == (0, 1, 0)
    assert distributed.is_main() and distributed.backend_name() == "none"
    distributed.barrier()
    distributed.set_timeout(1.0)
    assert distributed.broadcast_object("x") == "x" and distributed.all_gather_object("x") == ["x"]
    tensor = torch.ones(2)
    distributed.sync_params([tensor])
    assert distributed.all_reduce_sum(tensor) is tensor and tensor.tolist() == [1, 1]
    with distributed.node_first():
        pass
    distributed.cleanup()
    assert distributed.dev() == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def test_the_main_rank_is_known_before_setup(alone):
    for name, value in TORCHRUN.items():
        alone.setenv(name, value)
    assert not distributed.is_main()
    alone.setenv("RANK", "0")
    assert distributed.is_main()


@pytest.mark.parametrize("total, world", [(0, 1), (7, 3), (2, 4), (2048, 64), (10, 1)])
def test_local_rows_cut_the_batch_into_even_neighbours(total, world):
    parts = [distributed.local_rows(total, rank, world) for rank in range(world)]
    assert [row for part in parts for row in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert distributed.local_rows(5) == range(5)


def test_load_state_dict_reads_tensors_only(tmp_path):
    torch.save({"w": torch.arange(3)}, tmp_path / "w.pt")
    assert dist_util.load_state_dict(tmp_path / "w.pt", map_location="cpu")["w"].tolist() == [0, 1, 2]
    torch.save({"w": os.system}, tmp_path / "code.pt")
    with pytest.raises(UserError, match=r"code\.pt"):
        dist_util.load_state_dict(tmp_path / "code.pt")


def fail(error):
    raise error


@pytest.mark.parametrize(
    "error, code, text",
    [
        (UserError("--lr is\nnegative"), 2, "error: --lr is negative\n"),
        (SystemExit(75), 75, ""),
        (SystemExit("stopped"), 1, "stopped\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_run_main_of_one_process(alone, capsys, error, code, text):
    with pytest.raises(SystemExit) as stop:
        job.run_main(lambda: fail(error))
    assert stop.value.code == code and capsys.readouterr().err == text


@pytest.mark.parametrize("caught, code", [(KeyboardInterrupt(), 130), (job.Terminated(15), 143)])
def test_a_signal_while_a_class_is_made(alone, capsys, caught, code):
    """Python 3.11 raises a RuntimeError from it; half a second after its start a program imports such classes."""

    class Field:
        def __set_name__(self, owner, name):
            raise caught

    with pytest.raises(SystemExit) as stop:
        job.run_main(lambda: type("Owner", (), {"field": Field()}))
    assert stop.value.code == code and "Traceback" not in capsys.readouterr().err


def test_run_main_shows_the_traceback_of_a_programming_error(alone, capsys):
    with pytest.raises(SystemExit) as stop:
        job.run_main(lambda: fail(ArithmeticError("deliberate")))
    err = capsys.readouterr().err
    assert (
        stop.value.code == 1 and err.count("Traceback") == 1 and err.endswith("ArithmeticError: deliberate\n")
    )


def test_run_main_returns_after_success_and_after_exit_code_0(alone):
    job.run_main(lambda: None)
    with pytest.raises(SystemExit) as stop:
        job.run_main(lambda: sys.exit(0))
    assert stop.value.code == 0


# -- several ranks -----------------------------------------------------------------------------------------------


def collectives(folder: str) -> dict:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    distributed.BUCKET_BYTES = 40
    # Three buckets of floats (one tensor larger than a bucket), one of halves, a scalar, a transposed view.
    tensors = [
        torch.full((4,), rank + 0.5),
        torch.full((20,), float(rank)),
        torch.full((2, 3), float(rank)).t(),
        torch.nn.Parameter(torch.tensor(float(rank + 1))),
        torch.full((3,), rank, dtype=torch.float16),
        torch.empty(0),
    ]
    distributed.sync_params(tensors)
    with distributed.node_first():
        open(f"{folder}/{rank}", "w").close()
        before = len(os.listdir(folder))
    distributed.barrier()
    return {
        "place": (rank, world, distributed.get_local_rank(), distributed.is_main(), str(distributed.dev())),
        "sum": distributed.all_reduce_sum(torch.tensor([2.0**rank])).item(),
        "broadcast": distributed.broadcast_object({"from": rank}),
        "gathered": distributed.all_gather_object(rank * 10),
        "synced": [tensor.tolist() for tensor in tensors],
        "before": before,
        "rows": distributed.local_rows(world * 2 + 1),
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("world", [1, 2, 4])
def test_collectives(world, tmp_path):
    results = mp.run_ranks("tests.runtime.test_distributed:collectives", world, str(tmp_path))
    assert [r["place"] for r in results] == [
        (rank, world, rank, rank == 0, str(distributed.dev())) for rank in range(world)
    ]
    assert {r["sum"] for r in results} == {2.0**world - 1}
    assert all(r["broadcast"] == {"from": 0} for r in results)
    assert all(r["gathered"] == [10 * rank for rank in range(world)] for r in results)
    assert all(r["synced"] == [[0.5] * 4, [0.0] * 20, [[0.0] * 2] * 3, 1.0, [0.0] * 3, []] for r in results)
    assert results[0]["before"] == 1 and all(r["before"] > 1 for r in results[1:])
    assert [row for r in results for row in r["rows"]] == list(range(world * 2 + 1))
    assert {r["threads"] for r in results} == {1}


def own_gpus(gpus: dict[str, list[str]]) -> list[bool]:
    return [
        distributed._all_differ(distributed._store, k, g[distributed.get_rank()]) for k, g in gpus.items()
    ]


def test_ranks_with_gpus_of_their_own():
    """What each rank sees does not matter: under SLURM each may see one GPU, always number 0."""
    gpus = {"own": ["A", "B"], "shared": ["A", "A"], "none": ["", ""], "uneven": ["A", ""]}
    assert (
        mp.run_ranks("tests.runtime.test_distributed:own_gpus", 2, gpus) == [[True, False, False, False]] * 2
    )


def first_rank_fails_first() -> str:
    try:
        with distributed.node_first():
            if distributed.get_rank() == 0:
                raise OSError("no network")
    except OSError as error:
        return str(error)
    return "done"


def test_node_first_does_not_hang_when_the_first_rank_fails():
    assert mp.run_ranks("tests.runtime.test_distributed:first_rank_fails_first", 2) == ["no network", "done"]


def wait_for_a_stuck_rank() -> float:
    distributed.barrier()
    distributed.set_timeout(0.5)
    if distributed.get_rank() == 1:
        time.sleep(2)
        return 0.0
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
        distributed.all_reduce_sum(torch.zeros(1))
    return time.monotonic() - start


def test_a_stuck_rank_is_an_error_after_the_timeout():
    assert 0.4 < mp.run_ranks("tests.runtime.test_distributed:wait_for_a_stuck_rank", 2)[0] < 1.9


def threads() -> int:
    return torch.get_num_threads()


def test_ranks_share_the_cores_of_their_node():
    expected = max(1, usable_cores() // 2)
    assert (
        mp.run_ranks("tests.runtime.test_distributed:threads", 2, without=["OMP_NUM_THREADS"])
        == [expected] * 2
    )


def fail_on_one() -> None:
    if distributed.get_rank() == 1:
        raise ArithmeticError("deliberate")
    distributed.barrier()


def die_on_one() -> None:
    if distributed.get_rank() == 1:
        os._exit(7)
    time.sleep(30)


def test_the_test_helper_reports_errors_deaths_and_hangs():
    with pytest.raises(RuntimeError, match=r"rank 1 failed:\n(.|\n)*in fail_on_one\n(.|\n)*deliberate"):
        mp.run_ranks("tests.runtime.test_distributed:fail_on_one", 2)
    with pytest.raises(RuntimeError, match="rank 1 died with exit code 7"):
        mp.run_ranks("tests.runtime.test_distributed:die_on_one", 2)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]"):
        mp.run_ranks("time:sleep", 2, 30, timeout=0.5)


def test_an_elastic_restart_sees_nothing_of_the_attempt_before():
    """torchrun keeps its store: what a dead attempt wrote there must not be taken for the living one's."""
    server = dist.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)
    timeout = datetime.timedelta(seconds=20)

    def attempt(order):
        def meet(rank):
            time.sleep(0.05 * order.index(rank))
            client = dist.TCPStore("127.0.0.1", server.port, 3, is_master=False, wait_for_workers=False)
            return launch.this_attempt(client, launch.Launch("torchrun", rank, 3, rank, 3), timeout)

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(meet, range(3)))

    first = attempt([0, 1, 2])
    first[0].set("address", "of a dead rank")
    assert first[2].get("address") == b"of a dead rank"
    second = attempt([1, 2, 0])  # the others come before rank 0 has named the attempt
    assert not any(part.check(["address"]) for part in second)
    second[1].set("address", "alive")
    assert second[0].get("address") == second[2].get("address") == b"alive"
    assert first[0].get("address") == b"of a dead rank"
