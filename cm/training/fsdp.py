"""--shard fsdp: networks divided among the ranks by torch's FSDP2, for those that do not fit on one device.

A rank keeps its rows of every matrix: of weights, gradients, moments, averages, target and teacher. Before a block
computes, its weights are gathered from all ranks, and forgotten after it; its gradients are averaged and cut up again.
Everything else is arithmetic number by number, which the optimizer, the averages and the target do on the rank's rows
as plain tensors. Vectors and scalars (biases, norms, gains: well below a hundredth of a network) stay whole on every
rank.

In half precision the rows are the fp32 weights themselves, and what is gathered is rounded on the way.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from cm.config.choices import PRECISIONS
from cm.objectives.forward_mode import ROUNDED
from cm.runtime import distributed
from cm.storage.saver import Snapshot
from cm.storage.weights import LOSS_MODULE
from cm.training.blocks import blocks_of
from cm.training.mixed_precision import MasterWeights
from cm.training.sharding import Partition


@cache
def _mesh(device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, (distributed.get_world_size(),))


def shard_network(network: nn.Module, dtype: torch.dtype, halved: set[nn.Parameter]) -> None:
    """Divide a network's matrices among the ranks; what is in `halved` is computed with in `dtype`. All ranks call it.

    Within a block of half precision its fp32 layers are gathered by themselves, within the fp32 rest of a network its
    half ones: FSDP wants one type a group.
    """
    device = next(network.parameters()).device
    whole = {p for name, p in network.named_parameters() if p.ndim < 2 or name.startswith(LOSS_MODULE)}
    half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    leaf = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)  # an image arrives in fp32
    shared: dict[str, Any] = {
        "mesh": _mesh(device.type),
        "reshard_after_forward": True,
        "ignored_params": whole,
    }
    done: set[nn.Module] = set()
    for unit in (*blocks_of(network), network):
        inner = [m for m in unit.modules() if m not in done and m is not unit]
        done.update(inner, [unit])
        mine = [p for m in (unit, *inner) for p in m.parameters(recurse=False) if p not in whole]
        narrow = unit is not network and any(p in halved for p in mine)
        others = [m for m in inner if any((p in halved) != narrow for p in _matrices(m, whole))]
        if others:
            fully_shard(others, mp_policy=MixedPrecisionPolicy() if narrow else leaf, **shared)
        policy = MixedPrecisionPolicy() if not narrow else half if inner else leaf
        fully_shard(unit, mp_policy=policy, **shared)


def _matrices(module: nn.Module, whole: set[nn.Parameter]) -> Iterator[nn.Parameter]:
    return (p for p in module.parameters(recurse=False) if p not in whole)


class Shards(Partition):
    """Every rank keeps its rows of each parameter, and the whole of those that are not divided."""

    def __init__(self, params: Sequence[nn.Parameter]):
        self.params = list(params)
        self.device = params[0].device
        self.parts = distributed.get_world_size()
        self.indices = list(range(len(params)))
        self.shapes = [p.shape for p in params]

    def own(self, items: Sequence[Any]) -> list[Any]:
        """All of them: the masters are this rank's rows already."""
        return list(items)

    def broadcast(self) -> None:
        """Nothing: no rank has what belongs to another."""

    def mine(self, number: int, tensor: Tensor) -> Tensor:
        """This rank's rows of a whole tensor like parameter `number`."""
        p = self.params[number]
        if not isinstance(p, DTensor) or tensor.shape != p.shape:
            return tensor
        mesh = _mesh(tensor.device.type)
        return distribute_tensor(tensor, mesh, p.placements, src_data_rank=None).to_local()

    def spread(self, number: int, tensor: Tensor) -> Tensor:
        """This rank's rows of something like parameter `number`, in place, as a part of the whole."""
        p = self.params[number]
        if not isinstance(p, DTensor) or tensor.shape != p.to_local().shape:
            return tensor.detach()
        mesh, like = _mesh(tensor.device.type), p.shape
        return DTensor.from_local(
            tensor.detach(), mesh, p.placements, run_check=False, shape=like, stride=p.stride()
        )

    @torch.no_grad()
    def gather(self, tensors: dict) -> dict | None:
        """Whole tensors in rank 0's host memory, one after the other; None on other ranks. Keys begin with a number."""
        found = {}
        for key, tensor in tensors.items():
            part = self.spread(key[0] if isinstance(key, tuple) else key, tensor)
            whole = part.full_tensor() if isinstance(part, DTensor) else part
            if distributed.is_main():
                found[key] = whole.to("cpu", copy=True)
        return found if distributed.is_main() else None


class ShardedWeights(MasterWeights):
    """Masters of a network that FSDP divides: this rank's rows, in the memory of the parameters themselves.

    Of vectors in half precision they are fp32 copies. keep_fp32 False: the weights never change, and stay as converted.
    """

    divided = True

    def __init__(self, module: nn.Module, precision: str = "fp32", *, keep_fp32: bool = True):
        # Weights from files and buffers are right on rank 0 only, so far.
        distributed.sync_params([*module.parameters(), *module.buffers()])
        for p in module.parameters():
            p.data = p.data.contiguous()  # rows of channels-last weights do not lie together
        self.module, self.precision = module, precision
        dtype = PRECISIONS.load(precision)
        wide = {p: p.data for p in module.parameters()}
        if dtype != torch.float32:
            self.convert(module, precision)
        halved = {p for p in wide if p.dtype != torch.float32} if keep_fp32 else set()
        for p in halved:
            if p.ndim > 1:
                p.data = wide[p]
        copies = {
            name: wide[p].clone() for name, p in module.named_parameters() if p in halved and p.ndim < 2
        }
        del wide
        shard_network(module, dtype, halved)
        setattr(module, ROUNDED, bool(halved))
        self.names = [name for name, _ in module.named_parameters()]
        self._numbers = {name: i for i, name in enumerate(self.names)}
        self.model_params = list(module.parameters())
        self.layout = Shards(self.model_params)
        with torch.no_grad():
            rows = [p.to_local().detach() if isinstance(p, DTensor) else p for p in self.model_params]
        self.master_params = [copies.get(name, row) for name, row in zip(self.names, rows, strict=True)]
        for master, p in zip(self.master_params, self.model_params, strict=True):
            master.requires_grad_(p.requires_grad)
        self._rounded = [i for i, name in enumerate(self.names) if name in copies]
        self.shared = not self._rounded

    def synchronize(self) -> None:
        """Nothing: all began from rank 0's."""

    @torch.no_grad()
    def to_model(self) -> None:
        """Round the fp32 vectors into those of the module."""
        for i in self._rounded:
            self.model_params[i].copy_(self.master_params[i])

    def own_tensors(self) -> list[Tensor]:
        """What the module keeps on this rank between passes."""
        rounded = [self.model_params[i] for i in self._rounded]
        kept = [p for i, p in enumerate(self.master_params) if i not in self._rounded]
        return [*kept, *rounded, *self.module.buffers()]

    def fp32_copies(self) -> list[Tensor]:
        """Of the vectors in half precision."""
        return [self.master_params[i] for i in self._rounded]

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Give the masters their gradients; those of what is whole are averaged over the ranks here."""
        whole = []
        for master, p in zip(self.master_params, self.model_params, strict=True):
            if p.grad is None:
                continue
            if isinstance(p, DTensor):
                if p.to_local().data_ptr() != master.data_ptr():
                    raise RuntimeError(
                        "FSDP has moved its shards: the optimizer would step on forgotten ones"
                    )
                master.grad = p.grad.to_local()
            else:
                master.grad = p.grad.to(master.dtype)
                whole.append(master.grad)
        if whole:
            flat = torch.cat([g.flatten() for g in whole])
            dist.all_reduce(flat)
            flat /= distributed.get_world_size()
            for grad, mean in zip(whole, flat.split([g.numel() for g in whole]), strict=True):
                grad.copy_(mean.view(grad.shape))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes within the body add gradients up, whole, on each rank."""
        self.module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.module.set_requires_gradient_sync(True)

    def norm(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Norm over all ranks of one tensor per parameter, or None; what every rank has counts once."""
        found = [(t, p) for t, p in zip(tensors, self.model_params, strict=True) if t is not None]
        squares = torch.stack(torch._foreach_norm([t for t, _ in found])).square()
        once = [1.0 if isinstance(p, DTensor) else 1 / distributed.get_world_size() for _, p in found]
        return distributed.all_reduce_sum((squares * squares.new_tensor(once)).sum()).sqrt()

    def mine(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's rows of a whole tensor of the module's state dict."""
        number = self._numbers.get(name)
        return tensor if number is None else self.layout.mine(number, tensor)

    def state_dict(self, params: list[Tensor] | None = None) -> dict[str, Tensor]:
        """Whole, in rank 0's host memory; empty on other ranks. All ranks must call it."""
        if params is None:
            found = self.layout.gather(dict(enumerate(self.master_params)))
            params = found and [found[i] for i in range(len(found))]
        return Snapshot({} if params is None else super().state_dict(params))

    def shards(self, params: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """This rank's part of what `state_dict` holds, in place, by name."""
        params = self.master_params if params is None else params
        state = {
            name: buffer for name, buffer in self.module.state_dict().items() if name not in self._numbers
        }
        return state | {name: self.layout.spread(i, params[i]) for i, name in enumerate(self.names)}
