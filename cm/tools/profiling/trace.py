"""A run of tensor code on the meta device as its operations and its memory: nothing is computed, nothing allocated.

The operations are those that torch dispatches, the backward pass included; the memory is that of the tensors alive.
"""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution, aten.convolution_backward)
KINDS = ("half", "conv32", "fp32")
REMEMBERED = 50_000  # operations on arguments of other shapes


@dataclass(frozen=True)
class Op:
    """An operation. kind: of its arithmetic, half, conv32 or fp32. moved: bytes that it reads and writes.

    phase: what it was done for, as the tracer was told.
    """

    kind: str
    flops: float
    moved: float
    phase: str = ""


@dataclass(frozen=True, eq=False)
class Trace:
    """Operations in their order, column by column; those from number `backward` on belong to the backward pass.

    kinds: numbers of KINDS. amounts (2, n): FLOPs and bytes that they read and write. phases: what each was done for.
    peak: bytes of tensors alive at once, those before the trace apart. largest: bytes of the largest tensor.
    """

    kinds: np.ndarray
    amounts: np.ndarray
    phases: np.ndarray
    peak: float
    largest: float
    backward: int

    @property
    def flops(self) -> float:
        """Of all operations; a multiplication and an addition are two."""
        return in_order(self.amounts[0])

    def flops_by_phase(self) -> dict[str, float]:
        """The same, for each phase that has any."""
        flops, counted = self.amounts[0], self.amounts[0] > 0
        phases = dict.fromkeys(self.phases[counted])  # the first one first
        return {str(phase): in_order(flops[counted & (self.phases == phase)]) for phase in phases}

    @property
    def moved(self) -> float:
        """Bytes that all operations read and write."""
        return in_order(self.amounts[1])


def in_order(values: np.ndarray) -> float:
    """Their sum from the first to the last, so that no number depends on how numpy splits an array."""
    return float(np.cumsum(values)[-1]) if len(values) else 0.0


def between(a: Trace, b: Trace, share: float) -> Trace:
    """The trace at a + share (b - a): of another batch size, from traces of two, in which everything is linear."""
    if not np.array_equal(a.kinds, b.kinds):
        raise ValueError("the traces are not of the same operations")

    def mix(x: Any, y: Any) -> Any:
        return x + share * (y - x)

    amounts = mix(a.amounts, b.amounts)
    return Trace(a.kinds, amounts, a.phases, mix(a.peak, b.peak), mix(a.largest, b.largest), a.backward)


@dataclass(frozen=True)
class _Call:
    """What an operation costs and gives on arguments of some form. op: its costs; None for a view.

    gives: "new", tensors of the sizes, strides and dtypes `made`, alone or in a `container`; "first", its first
    argument, changed in place; None: it has to run each time.
    """

    op: Op | None
    gives: str | None = None
    made: tuple[tuple, ...] = ()
    container: type | None = None


# On the meta device torch asks Python for most shapes, a tenth of a millisecond each. Networks repeat their layers, and
# steps their passes: what a call gave is known for the next one.
_calls: dict[tuple, _Call] = {}


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
        key = (func, _form(args), _form(kwargs))
        call = _calls.get(key)
        new: list[Tensor] = []
        if call is None or call.gives is None:
            out = func(*args, **kwargs)
            if call is None or call.op is not None:
                new = _new_tensors(args, kwargs, out)
            if call is None:
                call = _learned(func, args, kwargs, out, new, key)
                if len(_calls) >= REMEMBERED:
                    _calls.clear()
                _calls[key] = call
        elif call.gives == "first":
            out = args[0]
        else:
            new = [torch.empty_strided(*sizes, dtype=dtype, device="meta") for *sizes, dtype in call.made]
            out = new[0] if call.container is None else call.container(new)
        for t in new:
            self._allocate(t.untyped_storage())
        if call.op is not None:
            self.ops.append(replace(call.op, phase=self._phase) if self._phase else call.op)
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
        kinds = np.array([KINDS.index(op.kind) for op in self.ops], np.intp)
        amounts = np.array([[op.flops for op in self.ops], [op.moved for op in self.ops]], np.float64)
        phases = np.array([op.phase for op in self.ops], np.str_)
        return Trace(kinds, amounts, phases, self.peak, self.largest, backward)

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


def _form(value: Any) -> Any:
    """All of an argument that costs and results depend on. Storages count, since an expanded tensor has little."""
    if isinstance(value, Tensor):
        where = value.is_meta, value._is_zerotensor()
        return value.shape, value.stride(), value.dtype, where, value.untyped_storage().nbytes()
    if isinstance(value, list | tuple):
        return tuple([_form(v) for v in value])
    if isinstance(value, dict):
        return tuple([(name, _form(v)) for name, v in value.items()])
    return type(value), value  # 1, 1.0 and True are equal


def _tensors(*values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _new_tensors(args: tuple, kwargs: dict, out: Any) -> list[Tensor]:
    """Results that are no views of arguments."""
    read = {t.untyped_storage()._cdata for t in _tensors(args, kwargs)}
    return [t for t in _tensors(out) if t.untyped_storage()._cdata not in read]


def _learned(func: Any, args: tuple, kwargs: dict, out: Any, new: list[Tensor], key: tuple) -> _Call:
    """What a call has shown."""
    inputs, in_place, op = _tensors(args, kwargs), func._schema.is_mutable, None
    if in_place or new:
        moved = sum(_nbytes(t) for t in (*inputs, *(_tensors(out) if in_place else new)))
        op = Op(_kind(func, inputs), _flops(func, args, kwargs, out), moved)
    if in_place:
        written = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
        same = out is args[0] and out.is_meta and sum(written) == 1 and key[1] == _form(args)
        return _Call(op, "first" if same else None)
    container = None if isinstance(out, Tensor) else type(out)
    results = [out] if container is None else list(out) if container in (list, tuple) else []
    made = tuple((t.shape, t.stride(), t.dtype) for t in new)
    plain = len(new) == len(results) and all(a is b and _is_dense(a) for a, b in zip(new, results))
    apart = len({t.untyped_storage()._cdata for t in new}) == len(new)
    return _Call(op, "new", made, container) if new and plain and apart else _Call(op)


def _is_dense(t: Tensor) -> bool:
    """Whether a tensor made by its sizes and strides takes as many bytes."""
    if not t.is_meta or t._is_zerotensor():
        return False
    other = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    return t.storage_offset() == 0 and t.untyped_storage().nbytes() == other.untyped_storage().nbytes()


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
