"""Augmentation: exact flips and shifts, known rotations and scales, labels, and what the draws may depend on."""

import math

import numpy as np
import pytest
import torch

from cm.objectives.augmentation import SYM6, Geometry, augment, draw_geometry, transform
from cm.seeding import StepRandom
from tests.helpers import edm_augmentation as reference


def geometry(rows: int = 1, **values) -> Geometry:
    """The geometry that does nothing, except for what is given."""
    zero = torch.zeros(rows)
    names = ("xflip", "yflip", "scale", "rotation", "stretch", "stretch_angle", "shift_x", "shift_y")
    flips = ("xflip", "yflip")
    tensors = {n: torch.full((rows,), float(values.get(n, 0))) for n in names}
    return Geometry(**{n: t.bool() if n in flips else t + zero for n, t in tensors.items()})


def blob(x: float, y: float, side: int = 32, width: float = 2.5, height: float = 2.5) -> torch.Tensor:
    """A smooth spot at column x and row y."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.exp(-((columns - x) ** 2) / (2 * width**2) - (rows - y) ** 2 / (2 * height**2))[None, None]


def test_the_filter_is_orthonormal():
    taps = torch.tensor(SYM6, dtype=torch.float64)
    assert taps.sum() == pytest.approx(math.sqrt(2))
    assert taps.square().sum() == pytest.approx(1)
    for shift in range(2, len(taps), 2):
        assert (taps[shift:] * taps[:-shift]).sum() == pytest.approx(0, abs=1e-7)


def test_flips_are_exact():
    images = torch.randn(2, 3, 6, 8)
    assert torch.equal(transform(images, geometry(2, xflip=True)), images.flip(3))
    assert torch.equal(transform(images, geometry(2, yflip=True)), images.flip(2))


def test_shifts_by_whole_pixels_bring_in_the_mirror_image():
    images = torch.randn(1, 3, 16, 24)
    right = transform(images, geometry(shift_x=1))  # an eighth of the width: 3 pixels
    torch.testing.assert_close(right[..., 3:], images[..., :-3], rtol=0, atol=2e-4)
    torch.testing.assert_close(right[..., :3], images[..., 1:4].flip(3), rtol=0, atol=2e-4)
    up = transform(images, geometry(shift_y=-1))  # an eighth of the height: 2 pixels
    torch.testing.assert_close(up[:, :, :-2], images[:, :, 2:], rtol=0, atol=2e-4)
    torch.testing.assert_close(up[:, :, -2:], images[:, :, -3:-1].flip(2), rtol=0, atol=2e-4)


def check(result: torch.Tensor, expected: torch.Tensor, atol: float = 0.03) -> None:
    """Compare away from the border, where the mirror image comes in."""
    torch.testing.assert_close(result[..., 6:-6, 6:-6], expected[..., 6:-6, 6:-6], rtol=0, atol=atol)


def test_rotations_by_known_angles():
    image = blob(10, 19)
    check(transform(image, geometry(rotation=math.pi / 2)), image.rot90(1, (2, 3)))  # counter-clockwise
    check(transform(image, geometry(rotation=math.pi)), image.rot90(2, (2, 3)))
    angle = 0.6
    x, y = 10 - 15.5, 19 - 15.5
    cos, sin = math.cos(angle), math.sin(angle)
    expected = blob(15.5 + cos * x + sin * y, 15.5 - sin * x + cos * y)
    check(transform(image, geometry(rotation=angle)), expected)


def test_scale_and_stretch():
    image = blob(14, 18)
    check(transform(image, geometry(scale=5)), blob(12.5, 20.5, width=5, height=5))  # 2 ** (5 / 5)
    s = math.sqrt(2)
    expected = blob(15.5 - 1.5 * s, 15.5 + 2.5 / s, width=2.5 * s, height=2.5 / s)
    check(transform(image, geometry(stretch=2.5)), expected)
    expected = blob(15.5 - 1.5 / s, 15.5 + 2.5 * s, width=2.5 / s, height=2.5 * s)
    check(transform(image, geometry(stretch=2.5, stretch_angle=math.pi / 2)), expected)


@pytest.mark.parametrize("shape", [(16, 16), (12, 20)], ids=["square", "wide"])
@pytest.mark.parametrize(
    "given",
    [
        dict(scale=1.5),
        dict(rotation=0.6),
        dict(rotation=math.pi / 2),
        dict(stretch=2.5, stretch_angle=0.4),
        dict(shift_x=0.3, shift_y=-1.1),
        dict(scale=2, rotation=-2.2, stretch=-1.5, stretch_angle=1.4, shift_x=1, shift_y=-0.5),
    ],
    ids=lambda given: " ".join(given),
)
def test_images_equal_those_of_edms_pipe(given, shape):
    height, width = shape
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    g = {
        name: given.get(name, 0.0)
        for name in ("scale", "rotation", "stretch", "stretch_angle", "shift_x", "shift_y")
    }
    scale, stretch = 2 ** (0.2 * g["scale"]), 2 ** (0.2 * g["stretch"])
    steps = [
        ("scale", scale, scale),
        ("rotate", g["rotation"]),
        ("rotate", -g["stretch_angle"]),
        ("scale", stretch, 1 / stretch),
        ("rotate", g["stretch_angle"]),
        ("shift", 0.125 * g["shift_x"] * width, 0.125 * g["shift_y"] * height),
    ]
    expected = reference.resample(images[0].double().numpy(), reference.inverse(steps))
    found = transform(images, geometry(**given))[0].double().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_order_is_scale_rotation_stretch_shift():
    g = geometry(scale=2, rotation=0.7, stretch=-1.5, stretch_angle=0.4, shift_x=1, shift_y=-0.5)
    linear, shift = g.source(16, 32)[0].split((2, 1), dim=1)

    def rotation(a):
        return torch.tensor([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])  # y points down

    stretch = rotation(0.4) @ torch.diag(torch.tensor([2**-0.3, 2**0.3])) @ rotation(-0.4)
    forward = stretch @ rotation(0.7) * 2**0.4
    torch.testing.assert_close(linear, forward.inverse())
    torch.testing.assert_close(linear @ torch.tensor([[4.0], [-1.0]]) + shift, torch.zeros(2, 1))


def test_labels():
    g = geometry(xflip=True, scale=0.5, rotation=0.3, stretch=2, stretch_angle=0.4, shift_x=-1, shift_y=3)
    expected = [1, 0, 0.5, math.cos(0.3) - 1, math.sin(0.3), 2 * math.cos(0.4), 2 * math.sin(0.4), -1, 3]
    torch.testing.assert_close(g.labels(), torch.tensor([expected]))
    assert not geometry(3).labels().any()


def test_probability_zero_changes_nothing():
    images = torch.randn(8, 3, 8, 8)
    out, labels = augment(images, StepRandom(0, 0, 0, 8, 8), 0.0)
    assert torch.equal(out, images)
    assert labels.shape == (8, 9) and not labels.any()


def test_rows_without_a_transform_are_untouched():
    images = torch.randn(64, 1, 8, 8)
    out, labels = augment(images, StepRandom(0, 0, 0, 64, 64), 0.12)
    still = ~labels.any(dim=1)
    mirrored = labels[:, 0].bool() & ~labels[:, 1:].any(dim=1)
    assert 5 < still.sum() < 35 and 5 < mirrored.sum() < 35
    assert torch.equal(out[still], images[still])
    assert torch.equal(out[mirrored], images[mirrored].flip(3))
    moved = ~(still | mirrored)
    assert ((out - images)[moved].abs().amax(dim=(1, 2, 3)) > 1e-3).all()


def test_frequencies_and_spreads_of_the_draws():
    n = 20000
    g = draw_geometry(StepRandom(1, 2, 0, n, n), 0.25)
    assert g.xflip.float().mean() == pytest.approx(0.5, abs=0.02)
    assert g.yflip.float().mean() == pytest.approx(0.125, abs=0.01)
    for name in ("scale", "rotation", "stretch", "shift_x", "shift_y"):
        assert getattr(g, name).ne(0).float().mean() == pytest.approx(0.25, abs=0.015), name
    assert torch.equal(g.shift_x.ne(0), g.shift_y.ne(0))
    assert g.stretch_angle.ne(0).float().mean() == pytest.approx(0.5, abs=0.02)
    for name in ("scale", "stretch", "shift_x", "shift_y"):
        values = getattr(g, name)
        assert values[values.ne(0)].std() == pytest.approx(1, abs=0.05), name
    angles = g.rotation[g.rotation.ne(0)]
    assert angles.std() == pytest.approx(math.pi / math.sqrt(3), abs=0.05)
    assert angles.abs().max() <= math.pi
    always = draw_geometry(StepRandom(1, 2, 0, n, n), 1.0)
    assert torch.equal(always.xflip, g.xflip)  # the draws themselves do not depend on the probability
    assert torch.equal(always.scale[g.scale.ne(0)], g.scale[g.scale.ne(0)])


def test_a_row_depends_on_its_own_draws_only():
    images = torch.randn(6, 3, 8, 8)
    whole, labels = augment(images, StepRandom(3, 7, 0, 6, 6), 0.5)
    again, _ = augment(images, StepRandom(3, 7, 0, 6, 6), 0.5)
    assert torch.equal(again, whole)
    part, part_labels = augment(images[2:5], StepRandom(3, 7, 2, 5, 6), 0.5)
    torch.testing.assert_close(part, whole[2:5], rtol=0, atol=1e-6)
    assert torch.equal(part_labels, labels[2:5])
    other, _ = augment(images, StepRandom(3, 8, 0, 6, 6), 0.5)
    assert not torch.equal(other, whole)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"lie in \[0, 1\], got 1.5"):
        draw_geometry(StepRandom(0, 0, 0, 1, 1), 1.5)
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\) for 1 geometries"):
        transform(torch.zeros(2, 3, 8, 8), geometry(1))
