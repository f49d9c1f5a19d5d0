"""Networks of which only the names and shapes count: to compare a file with them, or to count their parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FILLS = {getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and name[0] != "_"}
FILLS |= {Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_}
DRAWS = (torch.randn, torch.rand)


class _WithoutValues(TorchFunctionMode):
    """Leaves values out. On the meta device torch loads its compiler to find the shape of what it fills: a second."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in FILLS:
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if function in DRAWS else function)(*args, **kwargs)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules made in the body are on the meta device: they have no values and take no memory."""
    with torch.device("meta"), _WithoutValues():
        yield
