"""Draws of training are functions of (seed, step, row of the global batch): splits over ranks do not matter."""

import threading

import numpy as np
import pytest
import torch

from cm import seeding
from cm.seeding import StepRandom, derive_seed, derive_seeds


def test_derive_seed_is_fixed_and_sensitive():
    assert derive_seed(0, "noise", 1, 2) == 5938781660159604271
    assert derive_seed(0) == 2631537505891389924
    assert derive_seed(1) == 1695107200560264221
    assert derive_seed("1") == 8650004321376049118
    assert derive_seed(0, "init") == 5621797835976536519
    assert derive_seed(-1, "noise", 0, 5) == 2859794088501950974
    assert derive_seed(0, "noise", 1, 2) != derive_seed(0, "noise", 2, 1)
    assert derive_seed("1") != derive_seed(1)


@pytest.mark.parametrize("parts", [(0,), ("it's", 3), (np.int64(7), "noise", -1, 2**40)])
def test_seeds_of_rows_are_theirs_one_by_one(parts):
    rows = range(8, 12)
    assert list(derive_seeds(*parts, rows=rows)) == [derive_seed(*parts, row) for row in rows]
    assert derive_seed(np.int64(3), "a") == derive_seed(3, "a")
    assert all(0 <= derive_seed(i) < 2**63 for i in range(200))


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


def test_step_random_streams_are_fixed():
    """The numbers of rows 2 to 4 at step 7: a run that another version began resumes bitwise."""
    rnd = StepRandom(seed=3, step=7, start=2, stop=5, global_batch=8)
    expected = {
        "uniform": [0.9877636, 0.00307864, 0.3783643],
        "noise": [[-0.3226345, -0.9655703], [-0.7853647, -0.5467049], [-0.4398395, 0.9614301]],
        "normal": [-0.5130295, 1.765608, -0.1214791],
        "randint": [149, 543, 145],
        "second noise": [[-1.955322, 0.254988], [-1.17831, -1.503297], [0.07002012, 0.01751231]],
        "second uniform": [0.06132823, 0.8555517, 0.5989028],
    }
    drawn = [
        rnd.uniform(),
        rnd.noise((2,)),
        rnd.normal(),
        rnd.randint(0, 1000),
        rnd.noise((2,)),
        rnd.uniform(),
    ]
    for (name, numbers), values in zip(expected.items(), drawn, strict=True):
        torch.testing.assert_close(values, torch.tensor(numbers), atol=1e-6, rtol=0, msg=name)
    # 16 numbers and more are drawn in blocks.
    wide = StepRandom(seed=3, step=7, start=2, stop=5, global_batch=8).noise((16,))[:, :2]
    numbers = [[0.7439054, -0.1595415], [-0.1914278, -1.781231], [2.169132, 0.8045361]]
    torch.testing.assert_close(wide, torch.tensor(numbers), atol=1e-6, rtol=0)


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


def test_noise_drawn_ahead_is_the_same(monkeypatch):
    """Two calls in each of four steps, a step that is taken again, another shape; most of it is foreseen."""
    plan = [(0, (3, 4)), (1, (3, 4)), (2, (3, 4)), (2, (3, 4)), (7, (3, 4)), (8, (2,))]
    at_once = []
    original = seeding.NoiseOf.draw

    def draw(self, pinned=False):
        if threading.current_thread() is threading.main_thread():
            at_once.append((self.step, self.call))
        return original(self, pinned)

    expected = []
    for step, shape in plan:
        random = StepRandom(5, step, 2, 6, 8)
        expected += [random.noise(shape), random.noise(shape)]
    monkeypatch.setattr(seeding.NoiseOf, "draw", draw)
    ahead, found = seeding.NoiseAhead(), []
    for step, shape in plan:
        random = StepRandom(5, step, 2, 6, 8, ahead=ahead)
        found += [random.noise(shape), random.noise(shape)]
    ahead.close()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert at_once == [(0, 0), (0, 1), (2, 0), (2, 1), (7, 0), (7, 1), (8, 0), (8, 1)]
    assert not ahead._begun


def test_noise_ahead_forgets_what_nobody_takes():
    ahead = seeding.NoiseAhead()
    for step in range(5):
        StepRandom(0, step, 0, 2, 2, ahead=ahead).noise((step + 1,))
    assert {wanted.shape for wanted in ahead._begun} == {(4,), (5,)}
    ahead.close()
