"""The cost of editing is measured as said: operators against the network, at the images' shape."""

import time

import pytest
import torch

from cm.bench.editing import edit_cost, median_seconds

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("channels", "names"), [(1, {"inpaint", "superres"}), (3, {"inpaint", "superres", "colorize"})]
)
def test_edit_cost(channels, names):
    calls = []

    def slow(x, sigma):
        calls.append((x.shape, sigma.shape))
        time.sleep(0.02)
        return x

    cost = edit_cost(slow, torch.zeros(2, channels, 16, 16), repeats=3)
    assert set(cost.operators) == names
    assert calls == [((2, channels, 16, 16), (2,))] * 4
    assert 0.02 <= cost.network < 0.2
    assert all(0 < cost.share(name) < 1 for name in names)
    assert cost.share("inpaint") == cost.operators["inpaint"] / cost.network


def test_median_leaves_the_first_call_out():
    durations = iter([0.1, 0.0, 0.0, 0.1])
    assert median_seconds(lambda: time.sleep(next(durations)), CPU, 3) < 0.05


def test_the_command_prints_a_share_for_every_operator(capsys):
    from cm.bench.editing import main

    main(["tiny"])
    printed = capsys.readouterr().out
    assert (
        all(f"{name}: " in printed for name in ("inpaint", "superres", "colorize"))
        and "% of the network" in printed
    )
