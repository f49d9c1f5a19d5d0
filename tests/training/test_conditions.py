"""Hidden labels and drawn scales of guidance: functions of the row, which leave all other draws alone."""

import torch

from cm.nn import NO_CLASS
from cm.seeding import StepRandom
from cm.training.conditions import Conditions


def test_a_share_of_the_labels_is_hidden_whatever_the_ranks():
    y = torch.arange(2000) % 7
    whole = Conditions(0.25)({"y": y}, StepRandom(3, 5, 0, 2000, 2000))["y"]
    hidden = whole == NO_CLASS
    assert abs(hidden.double().mean() - 0.25) < 0.03 and torch.equal(whole[~hidden], y[~hidden])
    part = Conditions(0.25)({"y": y[700:900]}, StepRandom(3, 5, 700, 900, 2000))["y"]
    assert torch.equal(part, whole[700:900])
    assert not torch.equal(whole, Conditions(0.25)({"y": y}, StepRandom(3, 6, 0, 2000, 2000))["y"])


def test_other_draws_stay_as_they_are():
    plain, random = StepRandom(0, 0, 0, 8, 8), StepRandom(0, 0, 0, 8, 8)
    Conditions(0.5)({"y": torch.zeros(8, dtype=torch.int64)}, random)
    assert torch.equal(plain.uniform(), random.uniform())
    y = {"y": torch.arange(3)}
    assert Conditions()(y, random) == y
