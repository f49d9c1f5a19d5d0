"""Forward-mode derivatives (torch.func.jvp) of networks: which kernels serve, and what torch would compute in vain."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from cm.errors import UserError

ROUNDED = "rounded_when_gathered"  # attribute of networks that FSDP gathers in half precision
LINEAR_IN_INPUT = (torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d, F.linear)


class FixedWeights(TorchFunctionMode):
    """Layers whose weights have no tangent: the tangent of w * x + b is w * x', and nothing more.

    torch adds w' * x with a w' of zeros, a third of the work.
    """

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function not in LINEAR_IN_INPUT or len(args) < 2:
            return function(*args, **kwargs)
        x, weight, *rest = args
        bias = rest.pop(0) if rest else kwargs.pop("bias", None)
        value, tangent = forward_ad.unpack_dual(x)
        fixed = all(w is None or forward_ad.unpack_dual(w).tangent is None for w in (weight, bias))
        if tangent is None or not fixed:
            return function(x, weight, bias, *rest, **kwargs)
        moved = function(tangent, weight, None, *rest, **kwargs)
        return forward_ad.make_dual(function(value, weight, bias, *rest, **kwargs), moved)


def along(
    function: Callable[..., Tensor],
    at: tuple[Tensor, ...],
    direction: tuple[Tensor, ...],
    *,
    net: Callable[..., Tensor],
    mode: str,
    otherwise: str = "",
) -> tuple[Tensor, Tensor]:
    """(function(*at), its derivative in a direction) in one pass through `net`, which is not distributed.

    UserError for a network without forward-mode derivatives, which names --training_mode `mode` and what helps instead.
    """
    try:
        with forward_mode():
            return torch.func.jvp(function, at, direction)
    except (NotImplementedError, RuntimeError) as error:
        if not any(word in str(error) for word in ("forward AD", "forward mode AD", "functorch")):
            raise
        reason = str(error).splitlines()[0].split(". ")[0]
        raise UserError(
            f"--training_mode {mode}: {type(net).__name__} has an operation without forward-mode derivative ({reason})"
            + otherwise
        ) from error


def in_fp32(net: nn.Module) -> Callable[..., Tensor]:
    """The network with its half-precision weights widened, if it has any: tangents overflow fp16 and fade in bf16.

    UserError for one whose weights are rounded only when FSDP gathers them.
    """
    if getattr(net, ROUNDED, False):
        raise UserError(
            "--shard fsdp in half precision has no fp32 pass for this loss's derivative: give --precision fp32 or "
            "--shard optimizer"
        )
    narrow = (
        {n: p for n, p in net.named_parameters() if p.element_size() < 4}
        if isinstance(net, nn.Module)
        else {}
    )
    if not narrow:
        return net
    wide = {name: p.float() for name, p in narrow.items()}
    return lambda *args, **kwargs: torch.func.functional_call(net, wide, args, kwargs)


@contextmanager
def forward_mode() -> Iterator[None]:
    """A context for torch.func.jvp of a network.

    Softmax attention is made of elementary operations, because the fused kernels have no forward-mode derivative.
    """
    with sdpa_kernel(SDPBackend.MATH), FixedWeights():
        yield
