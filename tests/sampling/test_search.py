"""Ternary and greedy search: against brute force on thousands of curves, and the original's cases with its errors."""

import math
import random

import pytest

from cm.sampling.search import best_point, coarse_to_fine_search, greedy_search, ternary_search
from tests.helpers import golden_data


def unimodal(rng: random.Random, n: int) -> list[float]:
    """A curve that falls strictly to a random point, the ends included, and rises strictly after it."""
    best = rng.randrange(n)
    left = sorted((rng.random() + 0.01 for _ in range(best)), reverse=True)
    right = sorted(rng.random() + 0.01 for _ in range(n - 1 - best))
    scale = rng.choice([1e-6, 1.0, 1e6])
    return [scale * v for v in (*left, 0.0, *right)]


class Counted:
    """A score that counts its calls and refuses points outside the interval."""

    def __init__(self, values, first: int = 0):
        self.values, self.first, self.calls = values, first, []

    def __call__(self, p: int) -> float:
        assert isinstance(p, int) and self.first <= p < self.first + len(self.values)
        self.calls.append(p)
        return self.values[p - self.first]


def test_equals_brute_force_on_random_unimodal_curves():
    rng = random.Random(0)
    for _ in range(5000):
        n, first = rng.randint(1, 60), rng.randint(0, 20)
        score = Counted(unimodal(rng, n), first)
        found = ternary_search(score, first, first + n - 1)
        assert found == first + score.values.index(min(score.values))
        assert len(score.calls) == len(set(score.calls))


@pytest.mark.parametrize("n", range(1, 12))
def test_every_optimum_of_every_short_interval(n):
    for best in range(n):
        assert ternary_search(lambda p, best=best: abs(p - best), 0, n - 1) == best


def test_the_number_of_evaluations_is_logarithmic():
    for n in (10, 100, 1000, 10_000):
        score = Counted([abs(p - n // 3) for p in range(n)])
        ternary_search(score, 0, n - 1)
        assert len(score.calls) <= 2 * math.log(n, 1.5) + 3


def test_any_curve_gives_the_best_evaluated_point():
    rng = random.Random(1)
    for _ in range(2000):
        score = Counted([rng.choice([0.0, 0.5, rng.random()]) for _ in range(rng.randint(1, 40))])
        found = ternary_search(score, 0, len(score.values) - 1)
        best = min(score.values[p] for p in score.calls)
        assert found == min(p for p in score.calls if score.values[p] == best)


def test_golden_cases():
    cases = golden_data.json("ternary")["cases"]
    assert len(cases) == 79
    for case in cases:
        score = Counted(case["fid"], case["first_index"])
        # --begin and --end list the points before and after the one that is searched
        found = ternary_search(score, case["begin"][-1], case["end"][0])
        assert found == case["best_among_evaluated"], case["name"]
        assert sorted(score.calls) == sorted(case["reference_distinct_points"])
        if not case["reference_bug"] and not case["name"].startswith(("noisy", "flat")):
            assert found == case["reference_result"]


def test_what_cannot_be_searched():
    with pytest.raises(ValueError, match="5 > 4"):
        ternary_search(lambda p: p, 5, 4)
    with pytest.raises(ValueError, match="point 0 is not a number"):
        ternary_search(lambda p: math.nan, 0, 2)


def test_coarse_to_fine_corrects_the_coarse_score():
    fine = Counted([abs(p - 11) for p in range(20)])
    found = coarse_to_fine_search(lambda p: abs(p - 10) + 0.01 * p, fine, 0, 19, finalists=3)
    assert found == 11 and len(fine.calls) == len(set(fine.calls)) == 3


def test_best_point_takes_the_smaller_of_equals():
    assert best_point({7: 1.0, 3: 1.0, 5: 2.0}) == 3


def greedy(score, ranges):
    return greedy_search(lambda at, lo, hi: ternary_search(lambda p: score(at(p)), lo, hi), ranges)


def test_greedy_search_fixes_one_point_after_the_other():
    """Each point has its own optimum: the greedy result is known, and the points stay in order."""
    targets = (5, 12, 14)
    calls = []

    def score(points):
        calls.append(points)
        return sum(abs(p - t) for p, t in zip(points, targets))

    assert greedy(score, [(0, 17)] * 3) == targets
    assert len(calls) == len(set(calls))
    assert all(points[:-1] == targets[: len(points) - 1] for points in calls)


def test_greedy_search_stays_in_its_ranges():
    assert greedy(lambda points: -sum(points), [(0, 9), (2, 7)][::-1]) == (7, 9)
    assert greedy(lambda points: sum(points), [(4, 9), (0, 9)]) == (4, 4)
    with pytest.raises(ValueError, match="no room for point 2"):
        greedy(lambda points: -sum(points), [(0, 9), (0, 5)])
