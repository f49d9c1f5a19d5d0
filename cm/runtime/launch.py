"""Who started this process, as which rank, and how the ranks of a job find each other.

    torchrun            RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment; MPI is never imported
    mpiexec, mpirun     PMI_SIZE or OMPI_COMM_WORLD_SIZE; mpi4py tells the ranks where rank 0 listens
    srun                SLURM_STEP_NUM_TASKS > 1 and none of the above
    anything else       one process

All three end in the same kind of key-value store; `torch.distributed` does the rest.
"""

import contextlib
import dataclasses
import os
import re
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta

import torch.distributed as dist

from cm.errors import UserError, extra

# A process that waits longer for others says so (seconds).
PATIENCE = 10.0
POLL_INTERVAL = 0.05
ATTEMPT = 5.0  # to reach a host that does not answer (seconds)
# By which variables a launcher is told
TOLD_BY = {
    "torchrun": "RANK, WORLD_SIZE are set; unset them to run alone",
    "slurm": "SLURM_STEP_NUM_TASKS is set; unset it to run alone",
    "mpi": "started by mpiexec",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """Place of this process in its job. `kind` is torchrun, mpi, slurm or single."""

    kind: str = "single"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def detect(env: Mapping[str, str] = os.environ) -> Launch:
    """Read the launcher's variables. Imports nothing and contacts nobody."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= env.keys():
        rank, world_size = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
        found = Launch(
            "torchrun",
            rank,
            world_size,
            _integer(env, "LOCAL_RANK", rank),
            _integer(env, "LOCAL_WORLD_SIZE", world_size),
        )
    elif "OMPI_COMM_WORLD_SIZE" in env:
        found = Launch(
            "mpi",
            _integer(env, "OMPI_COMM_WORLD_RANK"),
            _integer(env, "OMPI_COMM_WORLD_SIZE"),
            _integer(env, "OMPI_COMM_WORLD_LOCAL_RANK", 0),
            _integer(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 1),
        )
    elif "PMI_SIZE" in env:
        found = Launch(
            "mpi",
            _integer(env, "PMI_RANK"),
            _integer(env, "PMI_SIZE"),
            _integer(env, "MPI_LOCALRANKID", 0),
            _integer(env, "MPI_LOCALNRANKS", 1),
        )
    elif _integer(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        found = Launch(
            "slurm",
            _integer(env, "SLURM_PROCID"),
            _integer(env, "SLURM_STEP_NUM_TASKS"),
            _integer(env, "SLURM_LOCALID"),
            slurm_tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))[_integer(env, "SLURM_NODEID", 0)],
        )
    else:
        found = Launch()
    return found if found.world_size > 1 else Launch()


def connect(launch: Launch, timeout: timedelta) -> tuple[Launch, dist.Store]:
    """Meet the other ranks: the final ranks and a store that all of them reach.

    Every rank of the job must call it. Raises UserError when the launcher and the libraries do not fit.
    """
    if not 0 <= launch.rank < launch.world_size:
        raise UserError(
            f"this is rank {launch.rank} of {launch.world_size}: ranks count from 0 ({TOLD_BY[launch.kind]})"
        )
    if launch.kind == "torchrun":
        if "MASTER_PORT" not in os.environ:
            raise UserError(
                "RANK, WORLD_SIZE and MASTER_ADDR are set but MASTER_PORT is not: start with torchrun"
            )
        host, port = os.environ["MASTER_ADDR"], _integer(os.environ, "MASTER_PORT")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun has counted the ranks
            with _waiting(launch, lambda: "torchrun's store"):
                _reach(host, port, launch, f"torchrun's store at {host}:{port}", timeout)
                store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
            return launch, this_attempt(store, launch, timeout)
        return launch, _meet(host, port, launch, timeout)
    if launch.kind == "mpi":
        return _connect_mpi(launch, timeout)
    if launch.kind == "slurm":
        host, port = slurm_address(os.environ)
        return launch, _meet(host, port, launch, timeout)
    raise ValueError("a single process has nobody to connect to")


def this_attempt(store: dist.Store, launch: Launch, timeout: timedelta) -> dist.Store:
    """A part of the store that no earlier attempt has written to: torchrun keeps its store over elastic restarts.

    Rank 0 names the attempt; the others join it under names of their own, which only a living rank 0 answers. What
    torchrun itself says, the number of restarts, may differ from node to node.
    """
    own = attempt = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    if launch.rank == 0:
        store.set("cm/attempt", own)
    missing = set(range(1, launch.world_size)) if launch.rank == 0 else {0}
    with _waiting(launch, lambda: f"ranks {sorted(missing)} of this attempt"):
        while True:
            if launch.rank == 0:
                for rank in [r for r in missing if store.check([f"cm/{own}/{r}"])]:
                    store.set(f"cm/{own}/answer/{store.get(f'cm/{own}/{rank}').decode()}", "")
                    missing.remove(rank)
            elif store.check(["cm/attempt"]):
                attempt = store.get("cm/attempt").decode()
                store.set(f"cm/{attempt}/{launch.rank}", own)
                missing -= {0} if store.check([f"cm/{attempt}/answer/{own}"]) else set()
            if not missing:
                return dist.PrefixStore(f"cm/{attempt}", store)
            if time.monotonic() > deadline:
                raise _alone(launch, f"ranks {sorted(missing)}", timeout)
            time.sleep(POLL_INTERVAL)


def abort_mpi(code: int) -> None:
    """End all ranks of an MPI job at once; returns only when MPI was never started."""
    from mpi4py import MPI

    MPI.COMM_WORLD.Abort(code)


def finalize_mpi() -> None:
    """Leave MPI, if this process has started it; the interpreter's teardown would do so."""
    if (module := sys.modules.get("mpi4py.MPI")) and module.Is_initialized() and not module.Is_finalized():
        module.Finalize()


def _connect_mpi(launch: Launch, timeout: timedelta) -> tuple[Launch, dist.Store]:
    comm, node = _mpi_communicators(launch)
    launch = Launch("mpi", comm.rank, comm.size, node.rank, node.size)
    store, address = None, None
    if launch.rank == 0:
        # Port 0: the system picks a free port and the store already listens on it when its number is told.
        store = _tcp_store("0.0.0.0", 0, launch, timeout)
        one_node = node.size == comm.size
        host = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if one_node else socket.gethostname())
        address = (host, store.port)
    host, port = comm.bcast(address, root=0)
    return launch, store or _tcp_store(host, port, launch, timeout)


def _mpi_communicators(launch: Launch):
    """COMM_WORLD and the communicator of this node's ranks."""
    try:
        with warnings.catch_warnings():
            # mpi4py warns of a wrong launcher; the check below says what to do about it.
            warnings.simplefilter("ignore")
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        cause = str(error).strip().split("\n")[0]
        raise UserError(
            f"starting with mpiexec needs mpi4py and an MPI library: {extra('mpi')}, "
            f"or start with torchrun ({cause}){_srun_hint()}"
        ) from error
    comm = MPI.COMM_WORLD
    if comm.size != launch.world_size:
        library = MPI.Get_library_version().strip("\0").split("\n")[0].split(",")[0]
        raise UserError(
            f"the launcher started {launch.world_size} processes but mpi4py uses {library}, which sees {comm.size}: "
            f"start with the mpiexec of that library, or {extra('mpi')} and use "
            f"the mpiexec it brings{_srun_hint()}"
        )
    return comm, comm.Split_type(MPI.COMM_TYPE_SHARED)


def _srun_hint() -> str:
    return "; under srun, --mpi=none needs no MPI" if "SLURM_STEP_ID" in os.environ else ""


def _meet(host: str, port: int, launch: Launch, timeout: timedelta) -> dist.Store:
    """The store at host:port, once rank 0 is there; on rank 0, once all are. UserError after the time-out."""
    deadline = time.monotonic() + timeout.total_seconds()
    store = _tcp_store(host, port, launch, timeout)
    here = store.add("cm/here", 1)
    if launch.rank > 0:
        return store
    with _waiting(launch, lambda: f"{launch.world_size - here} more"):
        while (here := store.add("cm/here", 0)) < launch.world_size:
            if time.monotonic() > deadline:
                raise _alone(launch, f"{launch.world_size - here} more", timeout)
            time.sleep(POLL_INTERVAL)
    return store


def _tcp_store(host: str, port: int, launch: Launch, timeout: timedelta) -> dist.TCPStore:
    is_host = launch.rank == 0
    missing = f"rank 0 at {host}:{port}"
    if not 0 <= port < 1 << 16:
        raise UserError(f"MASTER_PORT: {port} is no port")
    _check_name(host)
    try:
        with _waiting(launch, lambda: missing):
            if not is_host:
                _reach(host, port, launch, missing, timeout)
            return dist.TCPStore(
                host, port, launch.world_size, is_master=is_host, timeout=timeout, wait_for_workers=False
            )
    except dist.DistError as error:
        if not is_host:
            raise _alone(launch, missing, timeout) from None
        cause = str(error).strip().splitlines()[0][:200]
        raise UserError(f"rank 0 cannot listen at port {port} (MASTER_PORT): {cause}") from None


def _reach(host: str, port: int, launch: Launch, missing: str, timeout: timedelta) -> None:
    """Wait until somebody listens there: here, where signals are heard. c10d would wait deaf to them."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((host, port), timeout=ATTEMPT).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise _alone(launch, missing, timeout) from None
            time.sleep(POLL_INTERVAL)


def _check_name(host: str) -> None:
    """UserError where rank 0's host has no address: c10d would ask again and again."""
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        raise UserError(f"MASTER_ADDR: host {host} cannot be found ({error})") from None


def _alone(launch: Launch, missing: str, timeout: timedelta) -> UserError:
    told, seconds = TOLD_BY[launch.kind], timeout.total_seconds()
    return UserError(
        f"rank {launch.rank} of {launch.world_size} has waited {seconds:g} s for {missing} ({told})"
    )


@contextlib.contextmanager
def _waiting(launch: Launch, missing: Callable[[], str]) -> Iterator[None]:
    """Say what this rank waits for when the body takes more than PATIENCE seconds."""
    done = threading.Event()

    def tell() -> None:
        if not done.wait(PATIENCE):
            who = f"rank {launch.rank} of {launch.world_size}"
            sys.stderr.write(f"{who} waits for {missing()} ({TOLD_BY[launch.kind]})\n")
            sys.stderr.flush()

    threading.Thread(target=tell, daemon=True, name="waiting").start()
    try:
        yield
    finally:
        done.set()


def reports(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this process prints the errors of its node before the ranks have met."""
    return detect(env).local_rank == 0 or ("LOCAL_RANK" not in env and "RANK" in env)


def slurm_address(env: Mapping[str, str]) -> tuple[str, int]:
    """Host and port of rank 0 in a SLURM step; MASTER_ADDR and MASTER_PORT override them.

    The port follows from the job and step numbers, so that steps on one node do not meet, and lies
    below the range from which systems give out ports by themselves.
    """
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "localhost"
    job, step = _integer(env, "SLURM_JOB_ID", 0), _integer(env, "SLURM_STEP_ID", 0)
    port = 15000 + (31 * job + step) % 15000
    return env.get("MASTER_ADDR") or first_slurm_host(nodes), _integer(env, "MASTER_PORT", port)


def first_slurm_host(nodes: str) -> str:
    """First name of a SLURM host list: `gpu[003-007,12],cpu1` -> `gpu003`."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)[0])


def slurm_tasks_per_node(text: str) -> list[int]:
    """Tasks of each node: `2(x3),1` -> [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        tasks, _, repeat = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(repeat or 1)
    return counts


def _integer(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment variable {name} should be an integer, got {text!r}") from None
