"""The batch of a step is a function of (data, seed, step): not of workers, ranks or the point of resumption."""

import pickle
import re
import subprocess
import sys
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cm.data import open_dataset
from cm.data import stream as data_stream
from cm.data.stream import TrainStream
from cm.errors import UserError
from cm.runtime import logger, platform
from cm.seeding import derive_seed

N = 10


@pytest.fixture
def numbered(tmp_path):
    """Ten 8x8 colour images as an npz; image i has value i at its left edge and 100 + i at its right, label i."""
    images = np.zeros((N, 8, 8, 3), dtype=np.uint8)
    images[:, :, 0], images[:, :, -1] = np.arange(N)[:, None, None], 100 + np.arange(N)[:, None, None]
    np.savez(tmp_path / "data.npz", arr_0=images, arr_1=np.arange(N))
    return str(tmp_path / "data.npz")


def stream(path, *, global_batch_size=4, seed=5, random_flip=False, **options):
    dataset = open_dataset(path, image_size=8, class_cond=True, random_flip=random_flip)
    return TrainStream(dataset, global_batch_size=global_batch_size, seed=seed, **options)


def take(batches, count):
    images, cond = zip(*islice(batches, count))
    return torch.stack(images), torch.stack([c["y"] for c in cond])


def test_values_shapes_and_types(numbered):
    images, cond = next(iter(stream(numbered, shuffle=False)))
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.float32 and images.is_contiguous()
    assert cond["y"].tolist() == [0, 1, 2, 3] and cond["y"].dtype == torch.int64
    assert torch.equal(images[2, 1, 5], torch.tensor([2, *[0] * 6, 102]) / 127.5 - 1)
    plain = open_dataset(numbered, image_size=8)
    assert next(iter(TrainStream(plain, global_batch_size=2)))[1] == {}


def test_every_epoch_is_a_permutation_of_its_own(numbered):
    _, labels = take(stream(numbered), 3 * N // 2)
    epochs = labels.reshape(-1)[: 6 * N].reshape(6, N)
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6
    _, other = take(stream(numbered, seed=6), 3)
    assert not torch.equal(labels[:3], other)


def test_order_is_frozen(numbered):
    """A resumed run must see the order of the run that it continues, also under later versions of numpy."""
    _, labels = take(stream(numbered, seed=0), 3)
    assert labels.reshape(-1).tolist() == [3, 9, 8, 6, 1, 0, 7, 4, 5, 2, 8, 7]


def test_workers_change_nothing(numbered):
    expected = take(stream(numbered, random_flip=True), 7)
    state = torch.get_rng_state()
    found = take(stream(numbered, random_flip=True, num_workers=2), 7)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    assert torch.equal(state, torch.get_rng_state())  # starting workers draws from no global generator


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_split_the_global_batch(numbered, world_size):
    whole = take(stream(numbered, global_batch_size=7, random_flip=True), 4)
    parts = [
        take(stream(numbered, global_batch_size=7, random_flip=True, rank=rank, world_size=world_size), 4)
        for rank in range(world_size)
    ]
    assert sum(part[0].shape[1] for part in parts) == 7
    for kind in (0, 1):
        assert torch.equal(whole[kind], torch.cat([part[kind] for part in parts], dim=1))


def test_resumed_stream_is_the_tail(numbered):
    images, labels = take(stream(numbered, random_flip=True), 9)
    tail = take(stream(numbered, random_flip=True, start_step=4), 5)
    assert torch.equal(tail[0], images[4:]) and torch.equal(tail[1], labels[4:])


def test_flips_belong_to_seed_step_and_row(numbered):
    images, labels = take(stream(numbered, random_flip=True, seed=3), 25)
    flipped = ((images[:, :, 0, 0, 0] + 1) * 127.5).round() >= 100
    for step in range(25):
        for row in range(4):
            assert bool(flipped[step, row]) == bool(derive_seed(3, "augment", step, row) & 1)
    assert 30 < flipped.sum() < 70
    edge = torch.where(flipped, images[:, :, 0, 0, -1], images[:, :, 0, 0, 0])
    assert torch.equal(((edge + 1) * 127.5).round().long(), labels)


def test_random_crops_belong_to_seed_step_and_row(tmp_path):
    for number in range(4):
        pixels = np.random.RandomState(number).randint(0, 256, (24, 20, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    dataset = open_dataset(str(tmp_path), image_size=8, random_crop=True)

    def first_epochs(**options):
        return torch.cat(
            [images for images, _ in islice(TrainStream(dataset, global_batch_size=4, **options), 3)]
        )

    whole = first_epochs(seed=1)
    assert torch.equal(whole, first_epochs(seed=1)) and not torch.equal(whole, first_epochs(seed=2))
    halves = [first_epochs(seed=1, rank=rank, world_size=2).reshape(3, 2, 3, 8, 8) for rank in (0, 1)]
    assert torch.equal(whole.reshape(3, 4, 3, 8, 8), torch.cat(halves, dim=1))
    assert (
        len({image.numpy().tobytes() for image in whole}) == 12
    )  # the same image is cropped anew each epoch


def test_more_ranks_than_rows_leaves_some_without(numbered):
    shapes = [
        take(stream(numbered, global_batch_size=2, rank=r, world_size=3), 1)[0].shape[1] for r in range(3)
    ]
    assert sorted(shapes) == [0, 1, 1]


def test_bad_sizes(numbered):
    with pytest.raises(UserError, match=r"data\.npz: 10 images are fewer than the batch of 11"):
        stream(numbered, global_batch_size=11)
    stream(numbered, global_batch_size=10)
    with pytest.raises(UserError, match="batch size must be positive"):
        stream(numbered, global_batch_size=0)
    with pytest.raises(UserError, match="--num_workers"):
        stream(numbered, num_workers=-1)


@pytest.fixture
def partly_damaged(tmp_path):
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[:-30])  # the header is fine, the pixels are cut off
    return str(tmp_path)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_is_one_clear_line(partly_damaged, num_workers):
    dataset = open_dataset(partly_damaged, image_size=8, random_flip=False)
    with pytest.raises(UserError) as info:
        list(islice(TrainStream(dataset, global_batch_size=4, num_workers=num_workers), 1))
    message = str(info.value)
    assert "2.png: cannot be read" in message and "\n" not in message and "Traceback" not in message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images_can_be_skipped(partly_damaged, num_workers, monkeypatch):
    warned = []
    monkeypatch.setattr(logger, "warn", warned.append)
    dataset = open_dataset(partly_damaged, image_size=8, random_flip=False, skip_unreadable=True)
    batches = TrainStream(dataset, global_batch_size=4, num_workers=num_workers, shuffle=False)
    images, _ = zip(*islice(batches, 3))
    assert len(warned) == 1 and "skipped an unreadable image" in warned[0] and "2.png" in warned[0]
    assert batches.num_skipped == 3  # reported once, counted each time
    red = ((images[0][:, 0, 0, 0] + 1) * 127.5).round().tolist()
    assert red == [0, 1, 3, 3]  # the next readable image stands in


def test_nothing_readable_ends(partly_damaged, tmp_path):
    for path in tmp_path.iterdir():
        path.write_bytes((tmp_path / "2.png").read_bytes())
    dataset = open_dataset(partly_damaged, image_size=8, skip_unreadable=True)
    with pytest.raises(UserError, match="4 unreadable images in a row"):
        next(iter(TrainStream(dataset, global_batch_size=2)))


def test_little_shared_memory_is_told_and_read_by_fewer_workers(numbered, monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warn", said.append)
    whole = take(stream(numbered), 3)
    batch = whole[0][0].nbytes
    for free, workers in ((0, 0), (2 * batch, 1), (5 * batch, 2), (100 * batch, 3)):
        monkeypatch.setattr(platform, "shared_memory", lambda free=free: (free, 64 << 20))
        assert data_stream.affordable_workers(3, batch) == workers
    assert len(said) == 3 and "/dev/shm has 64.0 MiB, 0.0 free: --num_workers 3" in said[0]
    monkeypatch.setattr(platform, "shared_memory", lambda: (0, 64 << 20))
    torch.testing.assert_close(take(stream(numbered, num_workers=2), 3), whole, rtol=0, atol=0)


KILLED = """
import os, signal, sys, time
import torch
from cm.data import open_dataset, stream
from cm.runtime import job

def main():
    batches = iter(stream.TrainStream(open_dataset(sys.argv[1], image_size=4), global_batch_size=2, num_workers=1))
    next(batches)
    (worker,) = torch.multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    if sys.argv[2] == "outside":
        time.sleep(1)
    for batch in batches:
        pass

job.run_main(main)
"""


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_worker_that_is_killed_is_one_line(tmp_path, where):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((4, 4, 4, 3), np.uint8))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "x.npz"), where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert re.match(r"error: a data worker has ended.*/dev/shm has .* MiB.*--num_workers 0", done.stderr)


class Handover:
    """Batches of a loader whose worker, a process, breaks off at the second one."""

    def __init__(self, sign: Exception, worker: subprocess.Popen):
        self._workers = [SimpleNamespace(sentinel=worker.stdout)]
        self._sign = sign

    def __iter__(self):
        yield 1
        raise self._sign


SIGNS = [
    ConnectionResetError(104, "Connection reset by peer"),
    EOFError(),
    FileNotFoundError(2, "No such file"),
    pickle.UnpicklingError("pickle data was truncated"),
    OSError("got end of file during message"),
]


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: type(sign).__name__)
def test_a_worker_that_is_killed_while_it_hands_over_is_one_line(sign):
    with subprocess.Popen(["true"], stdout=subprocess.PIPE) as worker:
        batches = Handover(sign, worker)
        delivered = data_stream._delivered(batches)
        with pytest.raises(UserError, match=re.escape(str(sign) or "EOFError")) as caught:
            list(delivered)
    assert str(caught.value).startswith("a data worker has ended")


def test_what_a_living_worker_reports_stays_what_it_is():
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        remote = ConnectionError("Caught ConnectionError in DataLoader worker process 0.")
        for sign in (remote, OSError("too many files")):
            with pytest.raises(OSError, match=r"Caught|too many"):
                list(data_stream._delivered(Handover(sign, worker)))


FULL = """
import sys
from cm.data import open_dataset, stream
from cm.runtime import job
stream.affordable_workers = lambda wanted, size: wanted  # others have filled it since
job.run_main(lambda: next(iter(stream.TrainStream(
    open_dataset(sys.argv[1], image_size=256), global_batch_size=2, num_workers=1))))
"""


def test_a_worker_without_shared_memory_ends_instead_of_hanging(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((4, 256, 256, 3), np.uint8))
    small = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", small], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    command = ["unshare", "-m", "sh", "-c", f'{small}; exec "$0" -c "$1" "$2"', sys.executable, FULL]
    done = subprocess.run([*command, str(tmp_path / "x.npz")], capture_output=True, text=True, timeout=60)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: a data worker has ended")
    assert "/dev/shm has 0.1 MiB" in last and "--num_workers 0" in last
