"""--preset auto: what it chooses is a valid configuration for any images, and leaves alone what was given."""

import math

import pytest

from cm.config.auto import ARCHITECTURE, architecture, averaging, open_flags, patches, sides, training
from cm.config.fields import flags_of
from cm.config.parsing import parse_attention, parse_channel_mult
from cm.config.rows import OBJECTIVES
from cm.config.scripts import SCRIPTS, configure
from cm.config.validation import validate


@pytest.mark.parametrize("side", [4, 7, 8, 16, 27, 28, 32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_choice_is_valid(objective, side, gpu):
    row = OBJECTIVES[objective]
    found = architecture(side, gpu, patches(side, gpu))
    found |= training(
        objective, side=side, channels=1, count=500, width=found["num_channels"], gpu=gpu, ranks=3
    )
    if row.boundary:
        found["boundary"] = row.boundary
    mode = {"training_mode": objective} if row.script == "cm_train" else {}
    cls = SCRIPTS[row.script]
    own = {n: v for n, v in found.items() if n in flags_of(cls)}
    validate(configure(cls, image_size=side, **own, **mode))
    assert found["global_batch_size"] % 3 == 0 and found["global_batch_size"] <= 500
    inner = side // found["patch_size"]
    mult = parse_channel_mult(found["channel_mult"], inner)
    assert inner > 32 or parse_attention(found["attention_resolutions"], inner, len(mult))


def test_a_cpu_sees_patches_where_they_fit():
    assert [patches(side, False) for side in (8, 23, 24, 27, 28, 64)] == [1, 1, 2, 1, 2, 2]
    assert patches(64, True) == 1
    assert architecture(28, False, 2)["channel_mult"] == "1,2" == architecture(14, False)["channel_mult"]


def test_levels_stop_at_odd_sides_and_at_four_pixels():
    assert sides(28) == [28, 14, 7] and sides(32) == [32, 16, 8, 4] and sides(8) == [8, 4] and sides(9) == [9]


@pytest.mark.parametrize("steps", [10, 300, 1500, 6000, 10**7])
def test_the_average_reaches_over_a_small_part_of_the_run(steps):
    rate = float(averaging(steps))
    assert rate == min(max(round(1 - 15 / steps, 4), 0.9), 0.9999)
    assert math.isclose(1 / (1 - rate), steps / 15, rel_tol=0.01) or steps < 150 or steps > 150_000


def test_a_longer_run_averages_over_more_of_it_and_a_colour_image_is_mirrored():
    known = dict(side=28, channels=3, count=60_000, width=32, gpu=False, ranks=1)
    assert training("edm", **known, steps=3000)["ema_rate"] == "0.995"
    assert (
        training("edm", **known)["random_flip"]
        and not training("edm", **{**known, "channels": 1})["random_flip"]
    )


def test_what_is_given_stays_and_so_does_what_would_not_fit_it():
    found = {**architecture(28, False), "lr": 1.0, "class_cond": True}
    assert open_flags(frozenset({"lr"}), found) == {n: v for n, v in found.items() if n != "lr"}
    assert set(open_flags(frozenset({"network"}), found)) == set(found) - set(ARCHITECTURE)
    left = set(found) - set(open_flags(frozenset({"channel_mult"}), found))
    assert left == {"channel_mult", "attention_resolutions", "patch_size"}
