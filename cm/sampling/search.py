"""Search for the time points of multistep sampling: pure functions of a score, lower is better.

The paper finds the points of Algorithm 1 greedily, one at a time, each by ternary search (Song et al. 2023, Section 3).
"""

import math
from collections.abc import Callable, Sequence

Points = tuple[int, ...]


def ternary_search(score: Callable[[int], float], lo: int, hi: int) -> int:
    """The best integer in [lo, hi] among those evaluated; the true minimum if `score` is unimodal on [lo, hi].

    Calls `score` at most once per point, about 2 log_1.5(hi - lo) times. The smaller of two equally good points wins.
    """
    return best_point(_evaluate(score, lo, hi))


def coarse_to_fine_search(
    coarse: Callable[[int], float], fine: Callable[[int], float], lo: int, hi: int, finalists: int = 3
) -> int:
    """Search by a cheap score, then choose by the exact one among the `finalists` best points that were evaluated.

    Calls `fine` at most `finalists` times.
    """
    found = _evaluate(coarse, lo, hi)
    best = sorted(found, key=lambda p: (found[p], p))[:finalists]
    return best_point({p: _checked(fine, p) for p in best})


def greedy_search(
    search: Callable[[Callable[[int], Points], int, int], int], ranges: Sequence[tuple[int, int]]
) -> Points:
    """Points found one after the other, each with the earlier ones fixed.

    ranges: (lo, hi) of each point. search(candidate, lo, hi) returns the best p in [lo, hi] when `candidate(p)` are the
    points of a sampler. Points do not decrease: a point is searched from the one before it on.
    """
    points: Points = ()
    for lo, hi in ranges:
        lo = max([lo, *points])
        if lo > hi:
            raise ValueError(
                f"no room for point {len(points) + 1}: it must lie in [{lo}, {hi}] after {points}"
            )
        known = points
        points = (*known, search(lambda p, known=known: (*known, p), lo, hi))
    return points


def best_point(found: dict[int, float]) -> int:
    """The point of the smallest score, the smaller point among equals."""
    return min(found, key=lambda p: (found[p], p))


def _evaluate(score: Callable[[int], float], lo: int, hi: int) -> dict[int, float]:
    """Ternary search; every point it evaluated with its score."""
    if lo > hi:
        raise ValueError(f"nothing to search: {lo} > {hi}")
    found: dict[int, float] = {}

    def at(p: int) -> float:
        if p not in found:
            found[p] = _checked(score, p)
        return found[p]

    while hi - lo >= 3:
        left, right = lo + (hi - lo) // 3, hi - -(-(hi - lo) // 3)
        if at(left) < at(right):
            hi = right
        else:
            lo = left
    for p in range(lo, hi + 1):
        at(p)
    return found


def _checked(score: Callable[[int], float], p: int) -> float:
    value = float(score(p))
    if math.isnan(value):
        raise ValueError(f"the score of point {p} is not a number")
    return value
