"""Forward-mode derivatives (torch.func.jvp) of networks: which kernels serve, and what torch would compute in vain."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

LINEAR_IN_INPUT = (torch.conv1d, torch.conv2d, torch.conv3d, F.linear)


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


@contextmanager
def forward_mode() -> Iterator[None]:
    """A context for torch.func.jvp of a network.

    Softmax attention is made of elementary operations, because the fused kernels have no forward-mode derivative.
    """
    with sdpa_kernel(SDPBackend.MATH), FixedWeights():
        yield
