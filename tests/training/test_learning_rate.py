"""Inverse-square-root decay of the learning rate: EDM2's golden numbers."""

import re

import pytest

from cm.training.learning_rate import LearningRate
from tests.helpers.golden_data import later


def test_golden_inverse_square_root():
    """Keys say reference rate, length in batches, images per batch and images of warm-up.

    EDM2 warms up by the images seen before the step, we by those with it: the first step is not lost.
    """
    g = later("edm2_net")
    images = g["lr/nimg"]
    keys = [k for k in g.keys("lr/") if k != "lr/nimg"]
    assert keys
    for key in keys:
        mantissa, exponent, length, batch = map(
            int, re.match(r"lr/ref(\d)e(\d)_decay(\d+)_batch(\d+)", key).groups()
        )
        ramp = 1e6 * int(match[1]) / batch if (match := re.search(r"ramp(\d+)M", key)) else 0
        rate = LearningRate(mantissa * 10.0**-exponent, "inverse_sqrt", length, ramp)
        for seen, expected in zip(images, g[key], strict=True):
            step = seen / batch
            assert rate(step - 1 if step < ramp else step) == pytest.approx(expected, rel=1e-9, abs=1e-15)
