"""The closed-form networks of the flow maps' golden files, as flow maps of this library, and the exact maps."""

import torch
from torch import Tensor, nn

from cm.diffusion.flow_maps import FlowMap
from cm.diffusion.precond import FlowPrecond
from tests.helpers.golden_data import GoldenFile


class Mlp(nn.Module):
    """u = W3 tanh(W2 tanh(W1 a + b1 + E[y]) + b2) + b3 of a = (z, t, h, more); with a head, its channels behind."""

    def __init__(self, g: GoldenFile, prefix: str, dtype: torch.dtype = torch.float32):
        super().__init__()
        for name, value in g.state_dict(prefix).items():
            self.register_parameter(name, nn.Parameter(value.to(dtype)))

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        second: Tensor | None = None,
        guidance_inputs: Tensor | None = None,
    ) -> Tensor:
        columns = [
            z.flatten(1),
            t[:, None],
            second[:, None],
            *([] if guidance_inputs is None else [guidance_inputs]),
        ]
        a = torch.cat(columns, 1) @ self.W1.T + self.b1
        q = torch.tanh(a if y is None else a + self.E[y])
        q = torch.tanh(q @ self.W2.T + self.b2)
        u = (q @ self.W3.T + self.b3).view_as(z)
        return torch.cat([u, (q @ self.W4.T + self.b4).view_as(z)], 1) if hasattr(self, "W4") else u


def flow_map(g: GoldenFile, prefix: str) -> FlowMap:
    """The stored network on the linear path."""
    return FlowMap(Mlp(g, prefix), FlowPrecond())


def close(found: Tensor, expected: Tensor) -> None:
    """As the file's README asks of values in float32."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(1e-6, expected.abs().max().item()))


def check_gradients(net: nn.Module, g: GoldenFile, prefix: str) -> None:
    """Every stored gradient, within 1e-4 of its largest number."""
    assert g.keys(prefix)
    for key in g.keys(prefix):
        expected, found = g.tensor(key), getattr(net, key.rpartition("/")[2]).grad
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
