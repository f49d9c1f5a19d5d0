"""Several ranks in tests.

`run_ranks` forks them from a server that has already imported torch: 0.1 s a call after the first. For everything but
the launchers themselves. `launch` starts a real mpiexec, torchrun or python: 3 to 6 s a call.
"""

import contextlib
import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing import reduction
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
# What a launcher tells its children; a test's own processes start without it.
LAUNCHER_PREFIXES = ("PMI", "MPI_", "OMPI_", "HYDI", "SLURM_", "TORCHELASTIC_")
LAUNCHER_NAMES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo", "cm.commands.train"]
)


def run_ranks(
    target: str,
    world_size: int,
    *args,
    timeout: float = 60.0,
    env: dict | None = None,
    without: Sequence[str] = (),
) -> list:
    """Run `module:function`(*args) on `world_size` gloo ranks after `setup_dist`; the results in rank order.

    `env` adds variables to the ranks' environment, `without` removes some. Arguments and results travel by pickle.
    The first exception of a rank ends all ranks and is raised here with the rank's traceback; so is a rank that dies
    (its exit code) and the time-out (the ranks that had not finished).
    """
    _listening, environments = torchrun_like(world_size)
    pipes, processes = {}, []
    for rank, own in enumerate(environments):
        ours, theirs = _context.Pipe()
        own = {**own, **(env or {}), **dict.fromkeys(without)}
        arguments = (target, args, own, timeout, theirs)
        process = _context.Process(target=_rank_main, args=arguments)
        process.start()
        theirs.close()
        pipes[ours] = rank
        processes.append(process)
    try:
        return _collect(pipes, processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def torchrun_like(world_size: int) -> tuple[dist.TCPStore, list[dict]]:
    """A listening store and, for each rank, the environment that torchrun would give it."""
    store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # no rank opens the port itself
        "OMP_NUM_THREADS": "1",
    }
    return store, [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def run_programs(target: str, environments: list[dict], timeout: float = 30.0) -> tuple[list[int], str]:
    """Run `module:function`() through `run_main`, one process per environment: exit codes, and what all printed.

    Forked like `run_ranks`, but the ranks end as under a launcher that leaves them alone. A rank that does not end
    in time has exit code -9.
    """
    with tempfile.TemporaryFile() as output:
        arguments = [(target, environment, reduction.DupFd(output.fileno())) for environment in environments]
        processes = [_context.Process(target=_program_main, args=each) for each in arguments]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        output.seek(0)
        return [process.exitcode for process in processes], output.read().decode()


def _program_main(target: str, env: dict, output) -> None:
    descriptor = output.detach()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    _set_environment(env)
    from cm.runtime import job

    job.run_main(_function(target))


def _set_environment(env: dict) -> None:
    for name, value in env.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _function(target: str):
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def _collect(pipes: dict, processes: list, deadline: float) -> list:
    results = [None] * len(processes)
    waiting = dict(pipes)
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} did not finish in time")
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                processes[rank].join(5)
                raise RuntimeError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if not succeeded:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return results


def _rank_main(target: str, args: tuple, env: dict, timeout: float, pipe) -> None:
    _set_environment(env)
    from cm.runtime import distributed

    try:
        distributed.setup_dist(timeout=timeout)
        outcome = (True, _function(target)(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    pipe.send(outcome)
    # Stay until the parent ends all ranks (or ends itself): leaving makes the others' collectives fail too.
    with contextlib.suppress(EOFError):
        pipe.recv()
    os._exit(0)


def launch(
    argv: list,
    n: int = 2,
    launcher: str = "mpiexec",
    timeout: float = 60.0,
    env: dict | None = None,
    cwd: str | os.PathLike = ROOT,
    check: bool = False,
    options: Sequence[str] = (),
) -> subprocess.CompletedProcess:
    """Run `python *argv` (argv begins with a script, or with -m) on n ranks started by mpiexec, torchrun or python.

    options: of the launcher.

    Returns exit code, stdout and stderr as text. TimeoutError with both after `timeout` seconds; no process survives.
    With `check`, a non-zero exit code raises an AssertionError that shows both.
    """
    command = [*_launcher(launcher, n), *options, *map(str, argv)]
    kept = {k: v for k, v in os.environ.items() if not is_launcher_variable(k)}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Files, not pipes: a grandchild that outlives the launcher would keep a pipe open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=cwd,
            env=kept | {"PYTHONPATH": path} | (env or {}),
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        texts = [(file.seek(0), file.read().decode(errors="replace"))[1] for file in (out, err)]
    report = f"{' '.join(command)}\nexit code {code}\n--- stdout\n{texts[0]}\n--- stderr\n{texts[1]}"
    if code is None:
        raise TimeoutError(f"no end after {timeout} s: {report}")
    assert code == 0 or not check, report
    return subprocess.CompletedProcess(command, code, *texts)


def _launcher(name: str, n: int) -> list[str]:
    if name == "python":
        return [sys.executable]
    if name == "torchrun":
        options = ["--nproc-per-node", str(n), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        return [sys.executable, "-m", "torch.distributed.run", *options]
    if name == "mpiexec":
        beside_python = os.path.dirname(sys.executable)
        path = os.pathsep.join([beside_python, os.environ.get("PATH", "")])
        mpiexec = shutil.which("mpiexec", path=path)
        if mpiexec is None:
            pytest.skip("mpiexec is not installed (pip install '.[mpi]')")
        pytest.importorskip("mpi4py")
        return [mpiexec, "-n", str(n), sys.executable]
    raise ValueError(f"unknown launcher {name!r}")


def is_launcher_variable(name: str) -> bool:
    return name in LAUNCHER_NAMES or name.startswith(LAUNCHER_PREFIXES)


def _end(process: subprocess.Popen) -> None:
    """End a launcher and whatever is left of its session: politely first, so that it ends its ranks itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
