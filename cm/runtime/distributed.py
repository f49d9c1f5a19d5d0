"""Processes and devices: set-up under any launcher, and a few collectives.

Without `setup_dist`, or in a single process, every helper still works: rank 0 of 1.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cm.errors import UserError
from cm.runtime import launch
from cm.runtime.cpu import usable_cores

T = TypeVar("T")

# Parameters are broadcast in flat pieces of at most this many bytes.
BUCKET_BYTES = 64 * 2**20

_launch = launch.Launch()
_store: dist.Store | None = None


def setup_dist(timeout: float = 1800.0) -> None:
    """Choose the device and join the process group of the job; a second call does nothing.

    The node-local rank chooses the GPU among the visible ones. Ranks on GPUs of their own talk through NCCL, with
    gloo for CPU tensors; otherwise through gloo alone. A collective that takes more than `timeout` seconds is an
    error. Unless OMP_NUM_THREADS is set, the ranks of a node share the cores that they may use.
    """
    if dist.is_initialized():
        return
    store = join(timeout)
    if store is not None:
        store.set_timeout(datetime.timedelta(seconds=timeout))
    local_rank, local_world = _launch.local_rank, _launch.local_world_size
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
        rank=_launch.rank,
        world_size=_launch.world_size,
        timeout=datetime.timedelta(seconds=timeout),
    )


def _gpu_uuid() -> str:
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def _all_differ(store: dist.Store, key: str, gpu: str) -> bool:
    """Whether every rank of the job has a GPU of its own: NCCL refuses two ranks on one. All ranks call it.

    Counting visible GPUs would not tell: SLURM and others may show each rank its own one only. gpu: empty for none.
    """
    store.set(f"{key}/{_launch.rank}", gpu)
    gpus = store.multi_get([f"{key}/{rank}" for rank in range(_launch.world_size)])
    return b"" not in gpus and len(set(gpus)) == len(gpus)


def join(timeout: float) -> dist.Store | None:
    """Find this process's place in the job, and the store that all ranks share (None for one process)."""
    global _launch, _store
    if _store is None:
        _launch = launch.detect()
        if _launch.world_size > 1:
            _launch, _store = launch.connect(_launch, datetime.timedelta(seconds=timeout))
    return _store


def current_launch() -> launch.Launch:
    """This process's place in its job, as far as `join` has found it."""
    return _launch


def store() -> dist.Store | None:
    """The store that the ranks of the job share; None in one process, and before `join`."""
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
    return _launch.local_rank if dist.is_initialized() else 0


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
