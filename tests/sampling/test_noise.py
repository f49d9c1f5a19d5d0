"""Draws of sampling are functions of (seed, sample index): batch sizes and ranks do not matter."""

import pytest
import torch

from cm.errors import UserError
from cm.sampling.noise import (
    DeterministicGenerator,
    DeterministicIndividualGenerator,
    DummyGenerator,
    IndexedGenerator,
    get_generator,
    skip_draw,
)
from tests.helpers import golden_data

# ---- the original's generators ----------------------------------------------------------------

KINDS = {"determ": DeterministicGenerator, "determ-indiv": DeterministicIndividualGenerator}


def test_golden_streams_exactly():
    golden = golden_data.load("rng")
    for case in golden.config["cases"]:
        generator = KINDS[case["kind"]](
            case["num_samples"], case["seed"], rank=case["rank"], world_size=case["world_size"]
        )
        for j, (op, args) in enumerate(case["ops"]):
            key = f"{case['id']}/{j:02d}_{op}"
            if op == "randn":
                value = generator.randn(*args)
            elif op == "randn_like":
                value = generator.randn_like(torch.empty(args))
            elif op == "randint":
                value = generator.randint(args[0], args[1], args[2])
            else:
                getattr(generator, op)(args[0])
                continue
            assert torch.equal(value, golden.tensor(key)), key


@pytest.mark.parametrize("kind", KINDS)
def test_original_generators_advance_by_batch(kind):
    """With set_done_samples before every batch, exact rows and any batch size give the same samples."""

    def run(batch):
        generator, out = get_generator(kind, num_samples=7, seed=2), []
        for done in range(0, 7, batch):
            generator.set_done_samples(done)
            rows = min(batch, 7 - done)
            out.append(torch.cat([generator.randn(rows, 5), generator.randn_like(torch.empty(rows, 5))], 1))
        return torch.cat(out)

    assert torch.equal(run(7), run(3))
    assert torch.equal(run(7), run(1))
    assert run(7).unique().numel() == 70


@pytest.mark.parametrize("kind", KINDS)
def test_original_generators_take_explicit_rows(kind):
    whole = get_generator(kind, num_samples=7, seed=2)
    expected = torch.cat([whole.randn(7, 5), whole.randn(7, 5)], 1)
    part = get_generator(kind, num_samples=7, seed=2)
    for rows in ([0, 1], [2, 5], [2, 6], [6]):
        part.set_rows(rows)
        got = torch.cat([part.randn(len(rows), 5), part.randn(len(rows), 5)], 1)
        assert torch.equal(got, expected[rows])
    with pytest.raises(ValueError, match="2 rows, but 1"):
        part.randn(2, 5)


# ---- indexed ----------------------------------------------------------------------------------


def _indexed(rows, seed=5, **kwargs):
    generator = IndexedGenerator(seed, **kwargs)
    generator.set_rows(rows)
    return generator


def test_indexed_rows_depend_on_their_index_only():
    whole = _indexed(range(10))
    a, b, c = whole.randn(10, 2, 3), whole.randint(0, 1000, (10,)), whole.randn_like(torch.empty(10, 4))
    part = _indexed([7, 2])
    assert torch.equal(part.randn(2, 2, 3), a[[7, 2]])
    assert torch.equal(part.randint(0, 1000, (2,)), b[[7, 2]])
    assert torch.equal(part.randn_like(torch.empty(2, 4)), c[[7, 2]])
    assert a.unique().numel() == a.numel()
    assert not torch.equal(_indexed(range(10), seed=6).randn(10, 2, 3), a)
    assert not torch.equal(_indexed(range(10), purpose="label").randn(10, 2, 3), a)


def test_indexed_streams_are_fixed():
    """Numbers of samples 0 and 7: published samples can be drawn again by later versions."""
    generator = _indexed([0, 7])
    expected = [
        [0.141358, -0.7677291, -0.4737159],
        [-0.5906345, 0.1639393, 1.491511],
    ]
    torch.testing.assert_close(generator.randn(2, 3), torch.tensor(expected), atol=1e-6, rtol=0)
    assert generator.randint(0, 1000, (2, 3)).tolist() == [[943, 42, 524], [226, 761, 694]]
    generator.skip()
    torch.testing.assert_close(
        generator.randn_like(torch.empty(2)), torch.tensor([0.4837789, 1.103037]), atol=1e-6, rtol=0
    )
    # 16 numbers and more are drawn in blocks.
    wide = [[-1.701011, -0.7195096, 1.745001], [0.2978983, 0.6635646, 1.162929]]
    drawn = _indexed([0, 7]).randn(2, 16)[:, :3]
    torch.testing.assert_close(drawn, torch.tensor(wide), atol=1e-6, rtol=0)
    labels = _indexed([0, 7, 1_000_000], purpose="label").randint(0, 1000, (3, 2))
    assert labels.tolist() == [[849, 243], [719, 635], [191, 647]]


def test_indexed_streams_continue_and_start_anew():
    generator = _indexed([3, 4])
    first, second = generator.randn(2, 20), generator.randn(2, 20)
    assert not torch.equal(first, second)
    generator.set_rows([4])
    assert torch.equal(generator.randn(1, 20), first[1:])
    assert torch.equal(generator.randn(1, 20), second[1:])


def test_skip_draw_keeps_the_order_of_draws():
    x = torch.empty(2, 6)
    for make in (lambda: _indexed([3, 4]), lambda: DeterministicGenerator(5, 1), lambda: DummyGenerator()):
        torch.manual_seed(0)
        drawn, skipped = make(), make()
        drawn.randn_like(x)
        expected = drawn.randn_like(x)
        torch.manual_seed(0)
        skip_draw(skipped, x)
        assert torch.equal(skipped.randn_like(x), expected)


def test_indexed_interleaves_ranks_as_the_original_does():
    a = _indexed(range(8)).randn(8, 3)
    for rank in range(2):
        generator = IndexedGenerator(5, rank=rank, world_size=2)
        generator.set_done_samples(2)
        assert torch.equal(generator.randn(3, 3), a[2 + rank : 8 : 2])


def test_indexed_seeds_never_collide():
    """torch's CPU generator truncates seeds to 32 bits; a hash would collide among many samples."""
    assert len(set(_indexed(range(200_000))._seeds(200_000))) == 200_000


def test_indexed_types_and_errors():
    generator = _indexed(range(2))
    assert generator.randn(2, 3, dtype=torch.float64).dtype == torch.float64
    half = _indexed(range(2)).randn_like(torch.empty(2, 3, dtype=torch.float16))
    assert torch.equal(half, _indexed(range(2)).randn(2, 3).half())
    with pytest.raises(ValueError, match="3 rows, but 2"):
        generator.randn(3, 3)


def test_indexed_is_normal_across_samples():
    """Neighbouring indices give independent streams: pixel 0 over samples is standard normal, uncorrelated."""
    x = _indexed(range(4000)).randn(4000, 16)
    assert abs(x[:, 0].mean()) < 0.06
    assert abs(x[:, 0].std() - 1) < 0.05
    assert abs((x[1:, 0] * x[:-1, 0]).mean()) < 0.06


def test_get_generator():
    assert isinstance(get_generator("dummy"), DummyGenerator)
    assert isinstance(get_generator("indexed", seed=3), IndexedGenerator)
    torch.manual_seed(0)
    expected = torch.randn(2, 3)
    torch.manual_seed(0)
    assert torch.equal(get_generator("dummy").randn(2, 3), expected)
    with pytest.raises(UserError, match=r"generator must be one of .* got 'nope'"):
        get_generator("nope")
    with pytest.raises(UserError, match="num_samples"):
        get_generator("determ")
