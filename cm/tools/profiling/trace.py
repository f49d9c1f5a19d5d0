"""A run of tensor code on the meta device as its operations and its memory: nothing is computed, nothing allocated.

The operations are those that torch dispatches, the backward pass included; the memory is that of the tensors alive.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution, aten.convolution_backward)


@dataclass(frozen=True)
class Op:
    """An operation. kind: of its arithmetic, half, conv32 or fp32. moved: bytes that it reads and writes.

    phase: what it was done for, as the tracer was told.
    """

    kind: str
    flops: float
    moved: float
    phase: str = ""


@dataclass(frozen=True)
class Trace:
    """ops in their order; those from number `backward` on belong to the backward pass.

    peak: bytes of tensors alive at once, those before the trace apart. largest: bytes of the largest tensor.
    """

    ops: tuple[Op, ...]
    peak: float
    largest: float
    backward: int

    @property
    def flops(self) -> float:
        """Of all operations; a multiplication and an addition are two."""
        return sum(op.flops for op in self.ops)

    def flops_by_phase(self) -> dict[str, float]:
        """The same, for each phase that has any."""
        found: dict[str, float] = {}
        for op in self.ops:
            if op.flops:
                found[op.phase] = found.get(op.phase, 0.0) + op.flops
        return found

    @property
    def moved(self) -> float:
        """Bytes that all operations read and write."""
        return sum(op.moved for op in self.ops)


def between(a: Trace, b: Trace, share: float) -> Trace:
    """The trace at a + share (b - a): of another batch size, from traces of two, in which everything is linear."""
    if [op.kind for op in a.ops] != [op.kind for op in b.ops]:
        raise ValueError("the traces are not of the same operations")

    def mix(x: float, y: float) -> float:
        return x + share * (y - x)

    ops = tuple(
        Op(x.kind, mix(x.flops, y.flops), mix(x.moved, y.moved), x.phase)
        for x, y in zip(a.ops, b.ops, strict=True)
    )
    return Trace(ops, mix(a.peak, b.peak), mix(a.largest, b.largest), a.backward)


class Tracer(TorchDispatchMode):
    """Counts operations and live bytes of what runs inside."""

    def __init__(self):
        super().__init__()
        self.ops: list[Op] = []
        self.live = self.peak = self.largest = 0
        self._known: dict[int, weakref.ref] = {}
        self._backward: int | None = None
        self._phase = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        read = {t.untyped_storage()._cdata for t in inputs}
        made = [t for t in outputs if t.untyped_storage()._cdata not in read]
        for t in made:
            self._allocate(t.untyped_storage())
        in_place = func._schema.is_mutable
        if in_place or made:
            moved = sum(_nbytes(t) for t in (*inputs, *(outputs if in_place else made)))
            self.ops.append(Op(_kind(func, inputs), _flops(func, args, kwargs, out), moved, self._phase))
        return out

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)

        def free(_: weakref.ref) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, free)

    def trace(self) -> Trace:
        """What has been seen."""
        backward = len(self.ops) if self._backward is None else self._backward
        return Trace(tuple(self.ops), self.peak, self.largest, backward)

    def backward_begins(self) -> None:
        """What follows is the backward pass, which is a phase."""
        self._backward, self._phase = len(self.ops), "backward"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the body does belongs to a phase."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def follow(self, network: nn.Module, name: str) -> None:
        """Calls of a network are a phase."""
        calls = ExitStack()
        network.register_forward_pre_hook(lambda *_: calls.enter_context(self.phase(name)))
        network.register_forward_hook(lambda *_: calls.close())


def _nbytes(t: Tensor) -> int:
    """Bytes of a tensor's elements; an expanded one has no more than its storage."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def _kind(func: Any, inputs: list[Tensor]) -> str:
    floats = [t for t in inputs if t.is_floating_point()]
    if floats and floats[0].element_size() == 2:
        return "half"
    return "conv32" if func.overloadpacket in CONVOLUTIONS else "fp32"


def _flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    packet = func.overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(t.shape for t in args[:3]))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(t.shape for t in args[:4]))
    count = flop_registry.get(packet)
    return count(*args, **kwargs, out_val=out) if count else 0


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention by a fused kernel, as devices have it; the meta device would choose another. For one thread only.

    Elementary where that is asked for (cm.objectives.forward_mode).
    """
    original = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not torch.backends.cuda.flash_sdp_enabled():
            return aten._scaled_dot_product_attention_math(q, k, v)[0]
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    # A TorchFunctionMode would not do: it is off in backward passes, which recompute attention under checkpointing.
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@contextmanager
def traced() -> Iterator[Tracer]:
    """Trace the body, which works on meta tensors."""
    with fused_attention(), Tracer() as tracer:
        yield tracer
