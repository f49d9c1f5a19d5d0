"""Fréchet distance, Inception Score, precision and recall, KID: closed forms, golden numbers, brute force."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cm.errors import UserError
from evaluations import metrics
from evaluations import precision_recall as pr
from evaluations.fid import FeatureStatistics, FrechetReference, bootstrap_distance, frechet_distance
from evaluations.inception_score import inception_score
from evaluations.kid import kernel_distance, mmd_unbiased
from evaluations.precision_recall import precision_recall
from tests.helpers import golden_data
from tests.helpers.mp import run_ranks

# --- Fréchet distance ----------------------------------------------------------------------------


def test_commuting_covariances_closed_form():
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 1.0])
    mu = torch.tensor([1.0, -2.0, 0.0])
    expected = 5 + float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(mu, a.diag(), torch.zeros(3), b.diag()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    "case", ["well", "identical", "same_shape", "ill", "rank_deficient", "zero_dims", "one_dim"]
)
def test_frechet_equals_golden(case, swap):
    g = golden_data.load("evaluation")
    tolerance = next(c for c in g.config["fid"] if c["name"] == case)["rtol"]
    sides = [g[f"fid/{case}/{k}"] for k in ("mu1", "sigma1", "mu2", "sigma2")]
    value = frechet_distance(*(sides[2:] + sides[:2] if swap else sides))
    absolute = 1e-3 if case == "identical" else 0
    assert value == pytest.approx(float(g[f"fid/{case}/value"]), rel=tolerance, abs=absolute)
    assert value == pytest.approx(float(g[f"fid/{case}/value_eigh"]), rel=1e-6, abs=absolute)
    assert value >= 0


def distance_of_few(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of small sets without a d x d matrix: tr (S1 S2)^(1/2) is a nuclear norm of centred rows."""
    x, y = a - a.mean(0), b - b.mean(0)
    traces = np.square(x).sum() / (len(x) - 1) + np.square(y).sum() / (len(y) - 1)
    nuclear = np.linalg.svd(x @ y.T, compute_uv=False).sum() / np.sqrt((len(x) - 1) * (len(y) - 1))
    return float(np.square(a.mean(0) - b.mean(0)).sum() + traces - 2 * nuclear)


def test_fewer_images_than_dimensions():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 150)), rng.standard_normal((9, 150)) * 2 + 1
    sides = [(x.mean(0), np.cov(x, rowvar=False)) for x in (a, b)]
    assert frechet_distance(*sides[0], *sides[1]) == pytest.approx(distance_of_few(a, b), rel=1e-8)
    assert frechet_distance(*sides[0], *sides[0]) == pytest.approx(0, abs=1e-6)


def test_frechet_refuses_what_does_not_fit():
    eye = torch.eye(2)
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        frechet_distance(torch.zeros(2), eye, torch.zeros(3), torch.eye(3))
    with pytest.raises(ValueError, match=r"mean \(3,\) and covariance \(2, 2\)"):
        frechet_distance(torch.zeros(3), eye, torch.zeros(2), eye)
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(torch.zeros(2), eye * math.nan, torch.zeros(2), eye)


def features(n: int, d: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)) * 3 + 100)


def assert_is_numpys(stats: FeatureStatistics, x: torch.Tensor) -> None:
    np.testing.assert_allclose(stats.mean, x.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(stats.covariance(), np.cov(x.numpy(), rowvar=False), rtol=1e-9, atol=1e-11)


def test_streamed_statistics_are_numpys():
    x, stats = features(103), FeatureStatistics(5)
    for part in x.split(10):
        stats.update(part)
    assert stats.count == 103
    assert_is_numpys(stats, x)


def test_statistics_survive_a_large_mean_in_float32_features():
    x = (features(2000) + 1e4).float()
    stats = FeatureStatistics(5)
    for part in x.split(64):
        stats.update(part)
    np.testing.assert_allclose(
        stats.covariance(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-9
    )


def test_statistics_of_parts_are_those_of_the_whole():
    x = features(50)
    stats = FeatureStatistics(5)
    for rows in (x[:7], x[7:7], x[7:]):
        stats.update(rows)
    assert_is_numpys(stats, x)


def test_counts_repeat_rows():
    x, counts = features(6), torch.tensor([0, 3, 1, 0, 2, 1])
    stats = FeatureStatistics(5)
    stats.update(x, counts)
    assert_is_numpys(stats, x.repeat_interleave(counts, 0))


def test_statistics_errors():
    stats = FeatureStatistics(5)
    with pytest.raises(ValueError, match=r"\(2, 4\), expected \(n, 5\)"):
        stats.update(torch.zeros(2, 4))
    stats.update(features(1))
    with pytest.raises(ValueError, match="at least 2"):
        stats.covariance()
    assert stats.is_finite()
    stats.update(torch.full((1, 5), math.nan))
    assert not stats.is_finite()


def bootstrap_of_rank() -> tuple:
    from cm.runtime import distributed

    x = features(101)
    rows = distributed.local_rows(101)
    reference = FrechetReference(torch.full((5,), 100.0), 9 * torch.eye(5))
    stats = FeatureStatistics(5)
    stats.update(x[rows.start : rows.stop])
    stats.reduce()
    value = reference.distance(stats.mean, stats.covariance())
    interval = bootstrap_distance(x[rows.start : rows.stop], rows, 101, reference, value, replicates=5)
    return stats.count, value, interval.std, interval.low, interval.high


def test_ranks_share_statistics_and_bootstrap():
    alone = bootstrap_of_rank()
    assert alone[0] == 101
    for result in run_ranks("tests.evaluations.test_metrics:bootstrap_of_rank", 3):
        assert result == pytest.approx(alone, rel=1e-9)


def test_bootstrap_finds_the_standard_error():
    """FID to a far mean is about |x-bar - mu|^2: its standard error follows from that of the mean."""
    n, shift = 400, 5.0
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((n, 1)))
    reference = FrechetReference(torch.tensor([shift]), torch.eye(1))
    stats = FeatureStatistics(1)
    stats.update(x)
    value = reference.distance(stats.mean, stats.covariance())
    interval = bootstrap_distance(x, range(n), n, reference, value, replicates=200)
    assert interval.std == pytest.approx(2 * shift / math.sqrt(n), rel=0.2)
    assert interval.low < value < interval.high and interval.replicates == 200


# --- Inception Score -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["a", "b", "c", "peaky"])
def test_inception_score_equals_golden(case):
    g = golden_data.load("evaluation")
    size = next(c for c in g.config["inception_score"] if c["name"] == case)["split_size"]
    value = inception_score(g[f"is/{case}/activations"], g[f"is/{case}/weight"], size)
    assert value == pytest.approx(float(g[f"is/{case}/value"]), rel=1e-5)


def test_inception_score_limits():
    sure = 1e4 * torch.eye(4)  # every probability but one underflows
    assert inception_score(sure, torch.eye(4)) == pytest.approx(4)
    assert inception_score(torch.zeros(4, 4), torch.eye(4)) == pytest.approx(1)
    assert inception_score(sure, torch.eye(4), split_size=2) == pytest.approx(2)


def test_inception_score_shapes():
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        inception_score(torch.zeros(4, 3), torch.eye(4))
    with pytest.raises(ValueError, match="split size"):
        inception_score(torch.zeros(4, 4), torch.eye(4), 0)


# --- precision and recall ------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["a", "b", "far", "k5"])
def test_precision_recall_equals_golden(case):
    g = golden_data.load("evaluation")
    k = next(c for c in g.config["precision_recall"] if c["name"] == case)["k"]
    found = precision_recall(g[f"pr/{case}/ref"], g[f"pr/{case}/sample"], k)
    assert found == (float(g[f"pr/{case}/precision"]), float(g[f"pr/{case}/recall"]))
    for side in ("ref", "sample"):
        points = pr._Points(g.tensor(f"pr/{case}/{side}"), torch.zeros(1).double())
        np.testing.assert_allclose(points.radii_sq(k), g[f"pr/{case}/radii_sq_{side}"], rtol=1e-12)


def brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    def squared(a, b):
        return np.square(a[:, None].astype(np.float64) - b[None].astype(np.float64)).sum(2)

    ref_radii, sam_radii = (np.sort(squared(x, x), 1)[:, k] for x in (reference, samples))
    between = squared(samples, reference)
    precision = (between <= ref_radii[None]).any(1).mean()
    return float(precision), float((between <= sam_radii[:, None]).any(0).mean())


@pytest.mark.parametrize("offset", [0, 3000])
@pytest.mark.parametrize("seed", range(4))
def test_precision_recall_equals_brute_force_in_float64(seed, offset):
    """Points on a coarse grid far from the origin: many exact ties, and much cancellation in float32."""
    rng = np.random.default_rng(seed)
    reference = (rng.integers(0, 4, (70, 6)) + offset).astype(np.float32)
    samples = (rng.integers(0, 5, (60, 6)) + offset).astype(np.float32)
    samples[:5] = reference[:5]
    assert precision_recall(reference, samples, 3) == brute_force(reference, samples, 3)


def test_precision_recall_in_small_blocks(monkeypatch):
    monkeypatch.setattr(pr, "_BLOCK_ELEMENTS", 1)
    rng = np.random.default_rng(0)
    reference, samples = (rng.standard_normal((n, 7)).astype(np.float32) for n in (100, 75))
    assert precision_recall(reference, samples, 2) == brute_force(reference, samples, 2)


@pytest.mark.parametrize("samples_collapsed", [True, False])
def test_collapsed_sets(samples_collapsed):
    """All samples the same image: radius 0, inside only where they coincide."""
    spread = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    point = np.repeat(spread[:1], 30, 0)
    pair = (spread, point) if samples_collapsed else (point, spread)
    assert precision_recall(*pair) == brute_force(*pair, 3)
    assert precision_recall(point, point) == (1, 1)


def test_precision_recall_errors():
    with pytest.raises(ValueError, match="k = 3 needs more than 3"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match=r"\(9, 2\) and \(9, 3\)"):
        precision_recall(torch.zeros(9, 2), torch.zeros(9, 3))


# --- KID -----------------------------------------------------------------------------------------


def test_mmd_by_its_definition():
    x, y = features(5, 3) - 100, features(4, 3, seed=1) - 100

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    xx = np.mean([k(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(4) for j in range(4) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert mmd_unbiased(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-10)


def test_kid_is_unbiased_and_seeded():
    x, y = (features(300, 4, seed=s) / 3 - 100 / 3 for s in (0, 1))
    mean, std = kernel_distance(x, y, subsets=50, subset_size=100)
    assert abs(mean) < std  # equal distributions: around zero, of either sign
    assert kernel_distance(x, y, subsets=50, subset_size=100) == (mean, std)
    assert kernel_distance(x, y + 2, subsets=5, subset_size=100)[0] > 10 * std
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(x[:1], y)


def test_a_kernel_distance_of_whole_sets_has_no_spread():
    """Every subset of 20 images is all of them."""
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).numpy()
    measured = SimpleNamespace(reference=x, pool=x + 1, options=SimpleNamespace(seed=0))
    value, interval = metrics.kid(measured)
    assert interval is None and value == pytest.approx(kernel_distance(x, x + 1, subsets=1)[0])


def test_statistics_that_overflow_give_no_distance():
    with pytest.raises(UserError, match="no finite number: the statistics are too large"):
        frechet_distance(np.full(3, 1e200), np.eye(3), np.zeros(3), np.eye(3))
