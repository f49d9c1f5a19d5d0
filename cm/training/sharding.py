"""ZeRO stage 1: optimizer moments and averages divided among ranks; files that rank 0 reads for all.

Every rank has all weights and gradients, but keeps the moments and averages of its own part of the parameters only
(Rajbhandari et al. 2020). Parameters are divided tensor by tensor, so that the arithmetic on each is that of an
unsharded run to the last bit.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cm.runtime import distributed

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

# Tensors are broadcast in pieces of at most this many bytes, or one by one.
PIECE_BYTES = distributed.BUCKET_BYTES
# Bytes at whose multiples parameters begin, as in torch's allocator of GPU memory.
ALIGNMENT = 512


def assign_parts(sizes: Sequence[int], parts: int) -> list[int]:
    """The part (0 .. parts - 1) of each item: the largest first, each to the part that has least so far."""
    loads, owners = [0] * parts, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners


class Partition:
    """Which rank keeps what belongs to which parameter; unless `sharded`, every rank keeps everything.

    Sharded, the parameters of each part move into one buffer, with their strides, so that a part is broadcast without
    being packed.
    """

    def __init__(self, params: Sequence[Tensor], *, sharded: bool = False):
        self.device = params[0].device if params else torch.device("cpu")
        self.shapes = [p.shape for p in params]
        self.parts = distributed.get_world_size() if sharded else 1
        self.owners = assign_parts([p.numel() for p in params], self.parts)
        mine = distributed.get_rank() if self.parts > 1 else 0
        self.indices = [i for i, owner in enumerate(self.owners) if owner == mine]
        self._memory: list[Tensor] = []
        if self.parts > 1:
            for part in range(self.parts):
                theirs = [p for p, owner in zip(params, self.owners, strict=True) if owner == part]
                self._memory.append(move_into_one_buffer(theirs, self.device))

    def own(self, items: Sequence[T]) -> list[T]:
        """Of one item per parameter, those of this rank's part."""
        return [items[i] for i in self.indices]

    def mine(self, number: int, tensor: Tensor) -> Tensor:
        """What the owner of parameter `number` keeps of a whole tensor like it: all of it."""
        return tensor

    def broadcast(self) -> None:
        """Give every rank the parameters as their owners have them."""
        under_way = [
            dist.broadcast(memory, src=part, async_op=True)
            for part, memory in enumerate(self._memory)
            if len(memory)
        ]
        for work in under_way:
            work.wait()

    def gather(self, tensors: dict[K, Tensor]) -> dict[K, Tensor] | None:
        """The tensors of all parts in rank 0's host memory, copied; None on other ranks.

        Unsharded, the tensors themselves on every rank.
        """
        if self.parts == 1:
            return tensors
        return gather_to_main(tensors, self.device)


@torch.no_grad()
def move_into_one_buffer(params: Sequence[Tensor], device: torch.device) -> Tensor:
    """Move parameters into one new buffer, which is returned as bytes; values and layouts stay."""
    starts = [0]
    for p in params:
        starts.append(starts[-1] + -(-p.nbytes // ALIGNMENT) * ALIGNMENT)
    memory = torch.zeros(starts[-1], dtype=torch.uint8, device=device)
    for p, start in zip(params, starts[:-1], strict=True):
        values = memory[start : start + p.nbytes].view(p.dtype)
        moved = values.as_strided(p.shape, torch.empty_like(p, device="meta").stride())
        p.data = moved.copy_(p)
    return memory


class ShardedOptimizer:
    """An optimizer of this rank's part of the parameters; every step ends with the broadcast of the new weights.

    `make` builds an ordinary optimizer from parameter groups. torch's ZeroRedundancyOptimizer does as much, but its
    fast form takes the parameters' channels-last layout away, and its state dict is gathered through pickle.
    """

    def __init__(
        self,
        make: Callable[[list[dict]], torch.optim.Optimizer],
        params: list[Tensor],
        partition: Partition,
    ):
        self.partition = partition
        # A group, because a bare list must not be empty and there may be more ranks than parameters.
        self.own = make([{"params": partition.own(params)}])

    @property
    def param_groups(self) -> list[dict]:
        """Options of the optimizer, with this rank's parameters."""
        return self.own.param_groups

    @property
    def state(self) -> dict[Tensor, dict]:
        """Moments of this rank's parameters."""
        return self.own.state

    def step(self) -> None:
        """A step on this rank's parameters; then all ranks have all new weights."""
        self.own.step()
        self.partition.broadcast()


def optimizer_state(optimizer: torch.optim.Optimizer | ShardedOptimizer) -> dict:
    """The state dict of a whole optimizer; sharded, all ranks must call it, and those but rank 0 get {}."""
    if not isinstance(optimizer, ShardedOptimizer):
        return optimizer.state_dict()
    own, partition = optimizer.own.state_dict(), optimizer.partition
    found = partition.gather(
        {
            (partition.indices[i], key): torch.as_tensor(value)
            for i, moments in own["state"].items()
            for key, value in moments.items()
        }
    )
    if found is None:
        return {}
    state: dict[int, dict[str, Tensor]] = {i: {} for i in sorted({i for i, _ in found})}
    for (i, key), value in found.items():
        state[i][key] = value
    [group] = own["param_groups"]
    return {"state": state, "param_groups": [group | {"params": list(range(len(partition.shapes)))}]}


def load_moments(
    optimizer: torch.optim.Optimizer | ShardedOptimizer, items: Iterator[tuple[tuple[int, str], Any]]
) -> None:
    """Restore moments from ((parameter number, name), value) pairs; a sharded optimizer keeps its part of them.

    Options are left as they are: flags rule, not what was saved.
    """
    sharded = isinstance(optimizer, ShardedOptimizer)
    own = optimizer.own if sharded else optimizer
    numbers = optimizer.partition.indices if sharded else range(len(own.param_groups[0]["params"]))
    position = {number: i for i, number in enumerate(numbers)}
    state: dict[int, dict] = {}
    for (number, key), value in items:
        if number in position:
            # Step counters belong on the host, unless the optimizer itself moves them.
            if isinstance(value, Tensor):
                if value.ndim == 0:
                    value = value.cpu()
                elif sharded:
                    value = optimizer.partition.mine(number, value)
            state.setdefault(position[number], {})[key] = value
    own.load_state_dict({"state": state, "param_groups": own.state_dict()["param_groups"]})


def gather_to_main(tensors: dict[K, Tensor], device: torch.device) -> dict[K, Tensor] | None:
    """The named tensors of all ranks, copied to rank 0's host memory; None elsewhere. They are sent over `device`."""
    own = [(key, t.shape, t.dtype) for key, t in tensors.items()]
    layouts = distributed.all_gather_object(own if not distributed.is_main() else [])
    found = {}
    for rank, layout in enumerate(layouts):
        source = dict(tensors) if rank == distributed.get_rank() else None
        for key, tensor in _broadcast_pieces(layout, source, rank, device):
            if distributed.is_main():
                found[key] = tensor.cpu()
    if not distributed.is_main():
        return None
    return found | {key: t.detach().to("cpu", copy=True) for key, t in tensors.items()}


def broadcast_items(read: Callable[[], dict[K, Any]], device: torch.device) -> Iterator[tuple[K, Any]]:
    """(key, value) of what read() returns on rank 0, on every rank; tensors and plain values, tensors over `device`.

    Every rank must take all of them. A UserError of read() is raised on all ranks. No rank but 0 holds more than a
    piece of it at a time.
    """
    items: dict[K, Any] = {}

    def prepare() -> list[tuple]:
        items.update(read())
        return [(k, v.shape, v.dtype) if isinstance(v, Tensor) else (k, None, v) for k, v in items.items()]

    layout = distributed.on_main(prepare)
    plain = [(key, value) for key, shape, value in layout if shape is None]
    tensors = [entry for entry in layout if entry[1] is not None]
    yield from plain
    if distributed.get_world_size() > 1:
        source = items if distributed.is_main() else None
        yield from _broadcast_pieces(tensors, source, 0, device)
    else:
        for key, _, _ in tensors:
            yield key, items.pop(key)


def _broadcast_pieces(
    layout: list[tuple[K, torch.Size, torch.dtype]],
    source: dict[K, Tensor] | None,
    rank: int,
    device: torch.device,
) -> Iterator[tuple[K, Tensor]]:
    """Broadcast a rank's tensors piece by piece; yields copies on `device`, on the rank itself its own tensors."""
    for piece in _in_pieces(layout):
        if source is not None:
            sent = [source[key].detach().to(device).reshape(-1).view(torch.uint8) for key, _, _ in piece]
            flat = torch.cat(sent)
            del sent
        else:
            flat = torch.empty(sum(map(_bytes, piece)), dtype=torch.uint8, device=device)
        dist.broadcast(flat, src=rank)
        for (key, shape, dtype), part in zip(piece, flat.split([_bytes(e) for e in piece]), strict=True):
            # The clone begins where its type may begin, and outlives the others of the piece.
            yield key, part.clone().view(dtype).view(shape) if source is None else source.pop(key)


def _in_pieces(layout: list[tuple]) -> Iterator[list[tuple]]:
    """Consecutive entries of at most PIECE_BYTES together, or one."""
    piece: list[tuple] = []
    for entry in layout:
        if piece and sum(map(_bytes, piece)) + _bytes(entry) > PIECE_BYTES:
            yield piece
            piece = []
        piece.append(entry)
    if piece:
        yield piece


def _bytes(entry: tuple[Any, torch.Size, torch.dtype]) -> int:
    _, shape, dtype = entry
    return shape.numel() * dtype.itemsize
