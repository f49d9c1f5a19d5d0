"""The overlay of loss curves."""

import torch

from cm.tools.bench.precision import bench_precision, overlay
from cm.tools.bench.runs import Options


def test_overlay_compares_windows():
    exact = torch.tensor([1.0, 3.0, 4.0, 4.0])
    rough = torch.tensor([2.0, 2.0, 4.0, 6.0])  # single steps differ, the first window's mean does not
    found = overlay(exact, rough, windows=2)
    assert found == {
        "fp32_losses": [2.0, 4.0],
        "losses": [2.0, 5.0],
        "largest_gap": 0.25,
        "mean_gap": 0.125,
    }


def test_half_precision_meets_the_same_draws():
    options = Options(device="cpu", cases=("edm",), flags=("--batch_size", "2"))
    rows = bench_precision(options, steps=8)
    assert [row.name for row in rows] == ["precision/edm/fp16", "precision/edm/bf16"]
    for row in rows:
        assert 0 < row.figures["largest_gap"] < 0.02 < row.figures["gap_of_other_draws"]
