"""Values that are not finite are noticed where they arise, and named."""

import pytest
import torch

from cm.data.images import to_uint8
from cm.errors import UserError
from cm.sampling.finite import FiniteWatch
from cm.sampling.ode import sample_heun

LEVELS = torch.tensor([80.0, 5.0, 0.5, 0.0])


def broken(row: int, level: float, value: float):
    """Halves its input, but at one level one value of one row is something else."""

    def denoise(x, sigma):
        out = x / 2
        if float(sigma[0]) == level:
            out[row, 0, 1, 1] = value
        return out

    return denoise


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("level", [80.0, 5.0, 0.5])
def test_the_first_level_and_the_row_are_named(value, level):
    watch = FiniteWatch()
    x = sample_heun(watch.wrap(broken(2, level, value)), torch.ones(4, 3, 2, 2), LEVELS)
    with pytest.raises(UserError, match=rf"^c: the model's output at noise level {level:g} is not finite"):
        watch.check(x, "abcd")


def test_a_finite_batch_passes_and_later_batches_begin_anew():
    watch = FiniteWatch()
    x = sample_heun(watch.wrap(broken(0, -1.0, 0.0)), torch.ones(2, 3, 2, 2), LEVELS)
    assert watch.check(x, "ab") is x
    x[1, 0, 0, 0] = torch.inf  # the sampler's own doing
    with pytest.raises(UserError, match=r"^b: its values are not finite"):
        watch.check(x, "ab")
    assert watch.check(torch.zeros(1, 3, 2, 2), "c") is not None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_pixels_without_a_number(value):
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 0, 1] = value
    with pytest.raises(UserError, match="image 1 of 3 has values that are not finite"):
        to_uint8(images)
