"""Forward-mode derivatives without torch's products with zero tangents."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cm.objectives.forward_mode import forward_mode

LAYERS = {
    "conv2d": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.SiLU(), nn.Conv2d(4, 2, 1)),
    "conv1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 2, 1, bias=False)),
    "linear": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)),
}


def case(name):
    torch.manual_seed(0)
    return LAYERS[name]().double(), *torch.randn(2, 2, 3, 6, 6).double()


@pytest.mark.parametrize("name", LAYERS)
def test_values_derivatives_and_their_gradients_are_torchs(name):
    network, x, direction = case(name)
    found = []
    for context in (forward_mode(), torch.enable_grad()):
        with context:
            y, slope = torch.func.jvp(network, (x,), (direction,))
        grads = torch.autograd.grad(
            (y * slope).sum() + slope.square().sum(), [p for p in network.parameters()], allow_unused=True
        )
        found.append((y, slope, *grads))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", LAYERS)
def test_a_derivative_is_two_forward_passes(name):
    network, x, direction = case(name)
    flops = []
    for run in (lambda: network(x), lambda: torch.func.jvp(network, (x,), (direction,))):
        with torch.no_grad(), forward_mode(), FlopCounterMode(display=False) as counter:
            run()
        flops.append(counter.get_total_flops())
    assert flops[1] == 2 * flops[0] > 0


def test_weights_that_move_too_are_not_forgotten():
    weight, x = torch.randn(2, 2, 3).double()
    with forward_mode():
        _, slope = torch.func.jvp(lambda w: torch.nn.functional.linear(x, w), (weight,), (2 * weight,))
        _, both = torch.func.jvp(torch.nn.functional.linear, (x, weight), (x, weight))
    torch.testing.assert_close(slope, 2 * x @ weight.T)
    torch.testing.assert_close(both, 2 * x @ weight.T)
