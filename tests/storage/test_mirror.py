"""The second copy of a run: what it holds, when it is taken, what happens when it fails."""

import shutil
import sys

import numpy as np
import pytest
import torch

from cm.commands.cli import parse
from cm.commands.train import run_train
from cm.config.scripts import EdmTrainConfig
from cm.errors import UserError
from cm.runtime import logger
from cm.storage import checkpoint as ck
from cm.storage.mirror import Mirror
from cm.storage.saver import Saver
from cm.tools.torture import compare
from tests.storage.test_filesystem import FakeBlobfile

BUCKET = "gs://bucket/run"


@pytest.fixture
def bucket(monkeypatch):
    fake = FakeBlobfile()
    monkeypatch.setitem(sys.modules, "blobfile", fake)
    return fake


def write(run, step):
    return ck.write_checkpoint(
        run, step, {f"model{step:06d}.pt": {"w": torch.ones(step)}}, {"step": step}, {}
    )


def test_a_checkpoint_goes_there_and_back_with_its_manifest_last(tmp_path, bucket):
    run = tmp_path / "run"
    for step in (9, 10):
        path = write(run, step)
        (run / "log.txt").write_text(f"until {step}")
        Mirror(BUCKET + "/", run).push(path)
    names = [call[0] for call in bucket.calls if call[1] == "wb" and "step_000010" in call[0]]
    assert names[-1] == f"{BUCKET}/checkpoints/step_000010/manifest.json" and len(names) == 3
    (tmp_path / "other").mkdir()
    fetched = Mirror(BUCKET, tmp_path / "other").pull()
    assert fetched == tmp_path / "other" / "checkpoints" / "step_000010"
    ck.verify_checkpoint(fetched)
    assert (tmp_path / "other" / "log.txt").read_text() == "until 10"
    assert [p.name for p in fetched.parent.iterdir()] == ["step_000010"]


def test_a_copy_that_was_cut_short_is_passed_over(tmp_path, bucket):
    for step in (1, 2, 3):
        Mirror(BUCKET, tmp_path / "run").push(write(tmp_path / "run", step))
    del bucket.files[f"{BUCKET}/checkpoints/step_000003/manifest.json"]
    bucket.files[f"{BUCKET}/checkpoints/step_000002/model000002.pt"] = b"half"
    (tmp_path / "other").mkdir()
    assert Mirror(BUCKET, tmp_path / "other").pull().name == "step_000001"
    assert Mirror(BUCKET, tmp_path / "other").pull() is None  # it has one now
    assert Mirror("gs://bucket/nothing", tmp_path / "third").pull() is None


class Unreachable(Exception):
    """As blobfile's own errors: no OSError."""


@pytest.mark.parametrize("on_error", ["stop", "warn"])
def test_a_mirror_that_fails_is_a_failed_save(tmp_path, bucket, monkeypatch, on_error):
    logger.configure(tmp_path / "logs", ["log"])

    def fail(path, *args, **options):
        raise Unreachable("HTTP 503\nand more")

    monkeypatch.setattr(bucket, "BlobFile", fail)
    saver = Saver(tmp_path / "run", on_error=on_error, mirror=Mirror(BUCKET, tmp_path / "run"))
    words = rf"could not save step 1 under .*: {BUCKET}/\S* cannot be reached: Unreachable: HTTP 503; the newest .*"
    if on_error == "stop":
        with pytest.raises(UserError, match=words) as error:
            saver.save({"model000001.pt": {"w": torch.ones(1)}}, {"step": 1})
        assert "\n" not in str(error.value)
    else:
        saver.save({"model000001.pt": {"w": torch.ones(1)}}, {"step": 1})
        assert "HTTP 503" in (tmp_path / "logs" / "log.txt").read_text()
    assert len(ck.complete_checkpoints(tmp_path / "run")) == 1


def test_a_run_moves_to_another_machine(tmp_path, bucket):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 8, 8, 1), np.uint8))
    flags = (
        "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 8 "
        "--num_head_channels 16 --global_batch_size 2 --num_workers 0 --save_interval 1 --preview_count 0 "
        f"--ema_rate 0.9 --log_interval 2 --total_training_steps 4 --data_dir {tmp_path}/images.npz"
    )

    def train(run, *more):
        run_train(parse(EdmTrainConfig, [*flags.split(), "--out_dir", str(tmp_path / run), *more]))
        logger.reset()

    train("whole")
    with pytest.raises(SystemExit):
        train("first", "--mirror", BUCKET, "--max_hours", "1e-9")
    assert b'"time"' in bucket.files[f"{BUCKET}/status.json"]
    shutil.rmtree(tmp_path / "first")
    train("second", "--mirror", BUCKET)
    assert "from step 1" in (tmp_path / "second" / "log.txt").read_text()
    compare(tmp_path / "second", tmp_path / "whole")
    assert f"{BUCKET}/checkpoints/step_000004/manifest.json" in bucket.files


@pytest.mark.parametrize("loss", ["manifest", "file", "size", "all"])
def test_what_the_mirror_lacks_of_the_newest_checkpoint_is_copied_once(tmp_path, bucket, loss):
    run, there = tmp_path / "run", f"{BUCKET}/checkpoints/step_000002"
    mirror = Mirror(BUCKET, run)
    for step in (1, 2):
        mirror.push(write(run, step))
    whole = dict(bucket.files)
    if loss == "size":
        bucket.files[f"{there}/model000002.pt"] = b"half"
    for name in {"manifest": ["manifest.json"], "file": ["model000002.pt"], "size": []}.get(
        loss, list(whole)
    ):
        bucket.files.pop(name if loss == "all" else f"{there}/{name}")
    Saver(run, mirror=mirror).catch_up()
    assert {name: whole[name] for name in whole if there in name} == {
        name: content for name, content in bucket.files.items() if there in name
    }
    bucket.calls.clear()
    Saver(run, mirror=mirror).finish()
    assert not [call for call in bucket.calls if call[1] == "wb"]


def test_a_finished_run_completes_its_mirror(tmp_path):
    """The same command again, after a copy of the last checkpoint that was cut off."""
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((4, 8, 8, 1), np.uint8))
    flags = (
        "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 8 "
        "--num_head_channels 16 --global_batch_size 2 --num_workers 0 --preview_count 0 --ema_rate 0.9 "
        f"--total_training_steps 1 --data_dir {tmp_path}/images.npz --mirror {tmp_path}/disk --out_dir {tmp_path}/run"
    )
    manifest = tmp_path / "disk" / "checkpoints" / "step_000001" / "manifest.json"
    for _ in range(2):
        run_train(parse(EdmTrainConfig, flags.split()))
        logger.reset()
        first = manifest.read_bytes()
        manifest.unlink()
    run_train(parse(EdmTrainConfig, flags.split()))
    assert manifest.read_bytes() == first


@pytest.mark.parametrize("action", ["push", "pull", "push_logs"])
def test_a_second_folder_that_fails_is_one_line_too(tmp_path, monkeypatch, action):
    """A mirror may be a mounted disk: its errors name the place, as those of a bucket do."""
    path = write(tmp_path / "run", 1)
    (tmp_path / "run" / "log.txt").write_text("until 1")
    place = str(tmp_path / "disk")
    Mirror(place, tmp_path / "run").push(path)

    def stale(*args, **options):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("cm.storage.mirror.filesystem.open_file", stale)
    mirror = Mirror(place, tmp_path / ("other" if action == "pull" else "run"))
    with pytest.raises(UserError, match=r"cannot be reached: OSError: \[Errno 116\] Stale file handle$"):
        mirror.push(path) if action == "push" else getattr(mirror, action)()
