"""The cost of editing is measured as said: operators against the network, at the images' shape."""

import time

import pytest
import torch

from cm.tools.bench.sample import edit_cost


@pytest.mark.parametrize(
    ("channels", "names"), [(1, {"inpaint", "superres"}), (3, {"inpaint", "superres", "colorize"})]
)
def test_edit_cost(channels, names):
    calls = []

    def slow(x, sigma):
        calls.append((x.shape, sigma.shape))
        time.sleep(0.02)
        return x

    network, operators = edit_cost(slow, torch.zeros(2, channels, 16, 16), repeats=3)
    assert set(operators) == names
    assert calls == [((2, channels, 16, 16), (2,))] * 4
    assert network.median >= 0.02  # what sleep promises
    assert all(len(timing.seconds) == 12 for timing in operators.values())
