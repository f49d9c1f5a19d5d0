"""Every objective, trained by the real loop for seconds, reaches a stated distance to the data in the plane."""

import pytest

from tests.helpers.learning import COUNT, data, distance, gaussian_fit, learn, on_spots

# (method, network evaluations) -> (largest sliced Wasserstein distance, smallest share of points on the spots)
BARS = {
    ("EDM", 35): (0.035, 0.97),
    ("CD", 1): (0.06, 0.86),
    ("CD", 2): (0.06, 0.86),
    ("CT", 1): (0.06, 0.86),
    ("CT", 2): (0.06, 0.86),
    ("PD", 1): (0.06, 0.94),
    ("continuous CD", 1): (0.06, 0.86),
    ("continuous CD", 2): (0.06, 0.86),
    ("continuous CD, no stop-gradient", 1): (0.06, 0.9),
    ("continuous CD, no stop-gradient", 2): (0.06, 0.9),
    ("continuous CT", 1): (0.06, 0.86),
    ("continuous CT", 2): (0.06, 0.86),
    **{(method, n): (0.06, 0.86) for method in ("iCT", "ECT", "TCM", "sCT", "sCD") for n in (1, 2)},
}


@pytest.fixture(scope="module")
def rows():
    return {(row.method, row.evaluations): row for row in learn()}


def test_the_measures_tell_the_data_from_a_gaussian_fit():
    fresh, fit = data(COUNT, -2), gaussian_fit(COUNT)
    assert distance(fresh) < 0.02 and on_spots(fresh) == pytest.approx(0.989, abs=0.01)
    assert distance(fit) > 0.075 and on_spots(fit) < 0.8


@pytest.mark.slow
@pytest.mark.parametrize(("method", "evaluations"), BARS)
def test_learned(method, evaluations, rows):
    far, near = BARS[method, evaluations]
    row = rows[method, evaluations]
    assert row.distance < far and row.on_spots > near, row


@pytest.mark.slow
def test_few_evaluations_are_what_distillation_buys(rows):
    """The teacher itself is worse with 9 evaluations than every student with one."""
    assert set(rows) == {*BARS, ("EDM", 9)}
    teacher = rows["EDM", 9]
    assert teacher.distance > 0.1 and teacher.on_spots < 0.75
