"""Draws are functions of (seed, step or sample index): splits, batch sizes and ranks do not matter."""

import numpy as np
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
from cm.seeding import StepRandom, derive_seed
from tests.helpers import golden_data


def test_derive_seed_is_fixed_and_sensitive():
    assert derive_seed(0, "noise", 1, 2) == 5938781660159604271
    assert derive_seed(0, "noise", 1, 2) != derive_seed(0, "noise", 2, 1)
    assert derive_seed("1") != derive_seed(1)
    assert derive_seed(np.int64(3), "a") == derive_seed(3, "a")
    assert all(0 <= derive_seed(i) < 2**63 for i in range(200))


# ---- StepRandom -------------------------------------------------------------------------------


def _draws(start, stop, seed=3, step=7):
    rnd = StepRandom(seed, step, start, stop, 8)
    return [
        rnd.uniform(),
        rnd.noise((3, 4)),
        rnd.normal(),
        rnd.randint(2, 50),
        rnd.noise((3, 4)),
        rnd.uniform(),
    ]


def test_step_random_does_not_depend_on_the_split():
    whole = _draws(0, 8)
    for splits in ([(0, 8)], [(0, 4), (4, 8)], [(0, 2), (2, 5), (5, 8)]):
        parts = [_draws(a, b) for a, b in splits]
        for i, value in enumerate(whole):
            assert torch.equal(torch.cat([p[i] for p in parts]), value)


def test_step_random_streams_are_distinct():
    first, other_step, other_seed = _draws(0, 8), _draws(0, 8, step=8), _draws(0, 8, seed=4)
    for a, b, c in zip(first, other_step, other_seed):
        assert not torch.equal(a, b)
        assert not torch.equal(a, c)
    assert not torch.equal(first[1], first[4])  # second call, new stream
    assert not torch.equal(first[0], first[5])
    assert first[1].unique().numel() == first[1].numel()  # no two rows share a stream
    assert first[3].dtype == torch.int64
    assert first[3].min() >= 2
    assert first[3].max() < 50


def test_step_random_moments():
    rnd = StepRandom(0, 0, 0, 20000, 20000)
    u, n = rnd.uniform(), rnd.normal()
    assert 0 <= u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(n.mean()) < 0.03
    assert abs(n.std() - 1) < 0.02
    noise = StepRandom(0, 1, 10, 20, 64).noise((50, 50))
    assert noise.shape == (10, 50, 50)
    assert abs(noise.std() - 1) < 0.02


def test_step_random_rows():
    assert StepRandom(0, 0, 2, 5, 8).rows().tolist() == [2, 3, 4]


def test_step_random_rejects_rows_outside_the_batch():
    with pytest.raises(ValueError, match="global batch of 4"):
        StepRandom(0, 0, 2, 5, 4)


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
    with pytest.raises(UserError, match="--generator 'nope'"):
        get_generator("nope")
    with pytest.raises(UserError, match="--num_samples"):
        get_generator("determ")
