"""Streamed generation: exactly the samples asked for, in order, whatever the batch size and the number of ranks."""

import numpy as np
import pytest
import torch

from cm.data.images import SampleWriter
from cm.errors import UserError
from cm.runtime import distributed
from cm.sampling.generate import Labels, blocks, generate, local_batches
from cm.sampling.noise import get_generator
from cm.sampling.registry import run_sampler
from tests.helpers.mp import run_ranks

SHAPE = (4, 4, 3)


def _draw(path, num_samples, batch_size, kind="indexed", classes=(), seed=3):
    """Images that depend on their labels and on several draws, into an npz; what every rank runs."""
    generator = get_generator(kind, num_samples, seed)

    def sample_batch(n, y):
        x = 80 * generator.randn(n, 3, 4, 4)
        mean = (y.float() / 5 - 0.5).reshape(-1, 1, 1, 1)
        return run_sampler(
            "multistep", lambda x, sigma: mean + x / (1 + x.abs()) / 3, x, generator, steps=40, ts=[0, 20, 39]
        )

    arguments = {
        "num_samples": num_samples,
        "batch_size": batch_size,
        "image_shape": SHAPE,
        "generator": generator,
        "labels": Labels(6, seed, classes),
    }
    if not distributed.is_main():
        return generate(sample_batch, **arguments, keep=5).shape
    with SampleWriter(path, (num_samples, *SHAPE), labels=True) as writer:
        return generate(sample_batch, writer=writer, **arguments, keep=5).shape


def _load(path):
    with np.load(path, allow_pickle=False) as stored:
        return stored["arr_0"], stored["arr_1"]


def test_blocks_cover_every_sample_once_in_order():
    for num_samples, batch, world in [(10, 3, 2), (7, 3, 1), (1, 4, 3), (12, 2, 3), (13, 4, 3)]:
        rounds = list(blocks(num_samples, batch, world))
        assert [i for block in rounds for rows in block for i in rows] == list(range(num_samples))
        assert all(len(block) == world and len(rows) <= batch for block in rounds for rows in block)
    with pytest.raises(UserError, match="num_samples 0"):
        list(blocks(0, 3, 1))


def test_labels():
    assert Labels(10, classes=(3, 7))([0, 1, 2, 5]).tolist() == [3, 7, 3, 7]
    drawn = Labels(10, seed=1)(range(2000))
    assert torch.equal(Labels(10, seed=1)([5, 700]), drawn[[5, 700]])
    assert not torch.equal(Labels(10, seed=2)(range(2000)), drawn)
    assert torch.bincount(drawn, minlength=10).min() > 150
    with pytest.raises(UserError, match="classes: 10"):
        Labels(10, classes=(3, 10))


@pytest.mark.parametrize("kind", ["indexed", "determ", "determ-indiv"])
def test_batch_size_does_not_matter(tmp_path, kind):
    for batch in (11, 4, 1):
        kept = _draw(tmp_path / f"{batch}.npz", 11, batch, kind)
        assert kept == (5, *SHAPE)
    first = _load(tmp_path / "11.npz")
    assert first[0].shape == (11, *SHAPE)
    assert len(np.unique(first[0].reshape(11, -1), axis=0)) == 11
    for batch in (4, 1):
        assert (tmp_path / f"{batch}.npz").read_bytes() == (tmp_path / "11.npz").read_bytes()


def test_number_of_samples_does_not_matter(tmp_path):
    _draw(tmp_path / "a.npz", 9, 4)
    _draw(tmp_path / "b.npz", 5, 4)
    long, short = _load(tmp_path / "a.npz"), _load(tmp_path / "b.npz")
    assert np.array_equal(long[0][:5], short[0])
    assert np.array_equal(long[1][:5], short[1])


@pytest.mark.parametrize(("world_size", "batch"), [(2, 2), (3, 4)])
def test_ranks_do_not_matter(tmp_path, world_size, batch):
    """The last round leaves some ranks a short block or none at all."""
    _draw(tmp_path / "one.npz", 13, 5)
    shapes = run_ranks("tests.sampling.test_generate:_draw", world_size, tmp_path / "many.npz", 13, batch)
    assert shapes == [(5, *SHAPE)] + [(0, *SHAPE)] * (world_size - 1)
    assert (tmp_path / "many.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_images_are_made_in_their_rows_and_truncated():
    generator, seen = get_generator("indexed", seed=0), []

    def sample_batch(n, y):
        assert y is None
        seen.append(generator.randn(n, 1))
        return torch.full((n, 3, 4, 4), 0.5)

    rows = [
        rows for rows, images in local_batches(sample_batch, num_samples=5, batch_size=2, generator=generator)
    ]
    assert rows == [range(2), range(2, 4), range(4, 5)]
    whole = get_generator("indexed", seed=0)
    assert torch.equal(torch.cat(seen), whole.randn(5, 1))
    _, images = next(local_batches(sample_batch, num_samples=1, batch_size=2, generator=generator))
    assert images.dtype == torch.uint8
    assert images.shape == (1, *SHAPE)
    assert (images == 191).all()


def test_dummy_generator_gives_the_count_asked_for(tmp_path):
    _draw(tmp_path / "a.npz", 7, 3, "dummy", classes=(1, 4))
    images, labels = _load(tmp_path / "a.npz")
    assert len(images) == 7
    assert labels.tolist() == [1, 4, 1, 4, 1, 4, 1]
