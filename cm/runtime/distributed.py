"""Processes and devices: set-up under any launcher, a few collectives, and an orderly end of every job.

Without `setup_dist`, or in a single process, every helper still works: rank 0 of 1.
"""

import contextlib
import datetime
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cm.errors import UserError
from cm.runtime import launch
from cm.runtime.cpu import usable_cores

T = TypeVar("T")

# Parameters are broadcast in flat pieces of at most this many bytes.
BUCKET_BYTES = 64 * 2**20
# How long ranks wait for each other to start (seconds): interpreters and imports on a slow file system.
JOIN_TIMEOUT = 600.0
# How long a failing rank waits for the others to fail too before it ends the job (seconds). A rank that
# leaves by sys.exit(code) did so on purpose, so the others may still have something to write.
ERROR_GRACE, EXIT_GRACE = 1.0, 60.0
POLL_INTERVAL = 0.02

_place = launch.Launch()
_store: dist.Store | None = None


def setup_dist(timeout: float = 1800.0) -> None:
    """Choose the device and join the process group of the job; a second call does nothing.

    The node-local rank chooses the GPU among the visible ones. Ranks on GPUs of their own talk through NCCL, with
    gloo for CPU tensors; otherwise through gloo alone. A collective that takes more than `timeout` seconds is an
    error. Unless OMP_NUM_THREADS is set, the ranks of a node share the cores that they may use.
    """
    if dist.is_initialized():
        return
    store = _join(timeout)
    if store is not None:
        store.set_timeout(datetime.timedelta(seconds=timeout))
    local_rank, local_world = _place.local_rank, _place.local_world_size
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(local_rank % gpus)
    if "OMP_NUM_THREADS" not in os.environ:
        # Unasked, each rank would start a thread per core of the machine; they then wait for each other's.
        share = max(1, usable_cores() // local_world)
        torch.set_num_threads(min(torch.get_num_threads(), share))
    if store is None:
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if _all_differ(store, "cm/gpu", _gpu_uuid() if gpus else "") else "gloo",
        store=store,
        rank=_place.rank,
        world_size=_place.world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )


def _gpu_uuid() -> str:
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def _all_differ(store: dist.Store, key: str, gpu: str) -> bool:
    """Whether every rank of the job has a GPU of its own: NCCL refuses two ranks on one. All ranks call it.

    Counting visible GPUs would not tell: SLURM and others may show each rank its own one only. gpu: empty for none.
    """
    store.set(f"{key}/{_place.rank}", gpu)
    gpus = store.multi_get([f"{key}/{rank}" for rank in range(_place.world_size)])
    return b"" not in gpus and len(set(gpus)) == len(gpus)


def _join(timeout: float) -> dist.Store | None:
    """Find this process's place in the job, and the store that all ranks share (None for one process)."""
    global _place, _store
    if _store is None:
        _place = launch.detect()
        if _place.world_size > 1:
            _place, _store = launch.connect(_place, datetime.timedelta(seconds=timeout))
    return _store


def set_timeout(seconds: float) -> None:
    """Change the time after which a collective that has not finished is an error. All ranks call it."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds))


def cleanup() -> None:
    """Leave the process group. Ranks that still wait for this one in a gloo collective get an error."""
    if dist.is_initialized():
        dist.destroy_process_group()


def dev() -> torch.device:
    """This rank's device: its GPU, or the CPU. For factories and scripts; library code asks its tensors."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def get_rank() -> int:
    """Rank in the process group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """Number of ranks in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def get_local_rank() -> int:
    """Rank among the processes of this node; 0 without a process group."""
    return _place.local_rank if dist.is_initialized() else 0


def is_main() -> bool:
    """True on the rank that prints and writes. Right even before `setup_dist`, by the launcher's variables."""
    return (dist.get_rank() if dist.is_initialized() else launch.detect().rank) == 0


def backend_name() -> str:
    """What the ranks talk through: "gloo" or "cpu:gloo,cuda:nccl"; "none" without a process group."""
    return str(dist.get_backend_config()) if dist.is_initialized() else "none"


def barrier() -> None:
    """Wait until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(obj: T) -> T:
    """Rank 0's object, on every rank (small Python values, through pickle between our own processes)."""
    if get_world_size() == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(function: Callable[[], T]) -> T:
    """Call a function on rank 0 only; every rank gets its result, or raises the UserError that it raised."""
    outcome = None
    if is_main():
        try:
            outcome = (function(), None)
        except UserError as error:
            outcome = (None, error)
    result, problem = broadcast_object(outcome)
    if problem is not None:
        raise problem
    return result


def all_gather_object(obj: T) -> list[T]:
    """The objects of all ranks, in rank order."""
    if get_world_size() == 1:
        return [obj]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; returns the tensor."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def sync_params(params: Iterable[Tensor]) -> None:
    """Overwrite tensors (parameters, buffers) by those of rank 0, in few large broadcasts."""
    if get_world_size() == 1:
        return
    for bucket in _buckets(params):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.broadcast(flat.view(torch.uint8), src=0)  # bytes: gloo does not know every type
        for tensor, piece in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(piece.view(tensor.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors of one type and device into lists of at most BUCKET_BYTES (or one tensor)."""
    groups: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        group = groups.setdefault((tensor.dtype, tensor.device), [])
        if group and sum(t.nbytes for t in group) + tensor.nbytes > BUCKET_BYTES:
            yield group[:]
            group.clear()
        group.append(tensor)
    yield from (group for group in groups.values() if group)


def local_rows(total: int, rank: int | None = None, world_size: int | None = None) -> range:
    """The rows of a global batch of `total` that a rank owns: contiguous, in rank order, even to one row."""
    rank = get_rank() if rank is None else rank
    world_size = get_world_size() if world_size is None else world_size
    return range(rank * total // world_size, (rank + 1) * total // world_size)


@contextlib.contextmanager
def node_first() -> Iterator[None]:
    """Run the body on the first rank of each node, then on its other ranks: who comes first fills the node's cache.

    All ranks of the job must enter it. When the first rank fails, the others still try for themselves.
    """
    if get_local_rank() == 0:
        try:
            yield
        finally:
            barrier()
    else:
        barrier()
        yield


def load_state_dict(path: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
    """Load a weights file, local or remote, without running code from it; keywords of `load_weights`.

    Each rank that calls it reads the file itself: no communication, so that one rank alone may call it.
    """
    from cm.storage.checkpoint import load_weights

    return load_weights(path, **kwargs)[0]


def run_main(main: Callable[[], object]) -> None:
    """Run a program's main function and end the whole job in an orderly way, whatever happens. All ranks call it.

    - UserError: the line `error: ...`, once for the job, and exit code 2;
    - SystemExit: its code is kept;
    - any other exception on any rank: one traceback, exit code 1, and all ranks end even when they wait for each other.
    """
    try:
        # Before anything can fail: an error must be able to reach the other ranks.
        _join(JOIN_TIMEOUT)
        main()
        cleanup()
    except BaseException as error:
        code, text = _verdict(error)
        if _store is None:
            # One process; or no way to reach the others, for a reason that all ranks of a node share.
            if launch.detect().local_rank == 0:
                _write_error(text)
            raise SystemExit(code) from None
        if code != 0:
            _end_job(code, text, patient=isinstance(error, SystemExit))
        cleanup()
    if _store is not None:
        with contextlib.suppress(RuntimeError, OSError):
            _store.add("cm/ended", 1)
        if _keeps_store():
            _all_ended(EXIT_GRACE)


def _verdict(error: BaseException) -> tuple[int, str]:
    """Exit code of the job, and what is to be printed once."""
    if isinstance(error, UserError):
        return 2, "error: " + " ".join(str(error).splitlines()) + "\n"
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0, ""
        return 1, f"{error.code}\n"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted\n"
    where = f"rank {_place.rank} of {_place.world_size} failed:\n" if _place.world_size > 1 else ""
    return 1, where + "".join(traceback.format_exception(error))


def _end_job(code: int, text: str, patient: bool) -> NoReturn:
    """Report an exception once for all ranks, then end them all with the same code.

    The ranks agree through the job's key-value store: a collective would hang where the others are busy. The first
    rank that reports an error prints it: what other ranks meet later mostly follows from it.
    """
    grace = EXIT_GRACE if patient else ERROR_GRACE
    try:
        if _store.add("cm/failed", 1) == 1:
            _write_error(text)
            _store.set("cm/code", str(code))
        else:
            code = int(_store.get("cm/code"))
            grace += 2.0  # the first rank is the one to end the job
        _store.add("cm/ended", 1)
    except (RuntimeError, OSError):  # rank 0, which keeps the store, is gone
        _write_error(text)
    if patient:
        cleanup()
    if _all_ended(grace):
        raise SystemExit(code) from None
    sys.stdout.flush()
    if _place.kind == "mpi":
        launch.abort_mpi(code)
    # Not sys.exit: the interpreter would wait for threads that wait for the other ranks. The launcher ends those.
    os._exit(code)


def end_job(code: int, text: str) -> NoReturn:
    """End this process and with it the whole job at once, printing `text` if no rank has reported an error yet.

    From any thread, whatever the main thread does: for a rank that sees that the job cannot go on.
    """
    if _store is None:
        _write_error(text)
    else:
        with contextlib.suppress(SystemExit):
            _end_job(code, text, patient=False)
    os._exit(code)


def _all_ended(grace: float) -> bool:
    """Wait at most `grace` seconds until every rank has finished or failed."""
    deadline = time.monotonic() + grace
    try:
        while _store.add("cm/ended", 0) < _place.world_size:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_INTERVAL)
        if _keeps_store():
            time.sleep(5 * POLL_INTERVAL)  # until the others have asked for the last time
    except (RuntimeError, OSError):
        # The rank that keeps the store has gone, which it does only when all have ended or the job is lost.
        return False
    return True


def _keeps_store() -> bool:
    """Whether the store ends with this process. Under torchrun another process has it; MPI ends all ranks together."""
    return _place.kind == "slurm" and _place.rank == 0


def _write_error(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text)
    sys.stderr.flush()
