"""Runs in a bucket as models, teachers and starting points; no network, a stand-in for blobfile."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from cm.commands.cli import parse
from cm.commands.sample import run_image_sample
from cm.commands.train import run_train
from cm.config.scripts import CmTrainConfig, EdmTrainConfig, SampleConfig
from cm.errors import UserError
from cm.models.files import load_model_file
from cm.runtime import distributed, logger
from cm.storage import checkpoint as ck
from cm.storage import filesystem
from cm.storage.mirror import checkpoint_paths, fetch, newest_checkpoint
from cm.storage.weights import Damaged, file_sha256, load_weights
from cm.tools.torture import compare
from cm.training.resume import checkpoint_of
from tests.helpers.models import TINY_FLAGS
from tests.helpers.mp import run_ranks
from tests.storage.test_filesystem import FakeBlobfile

RUN = "gs://bucket/run"
FLAGS = (
    f"{TINY_FLAGS}--global_batch_size 2 --num_workers 0 --save_interval 1 --preview_count 0 "
    "--ema_rate 0.5,0.9 --keep_last 0"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with images and a run of two steps in `run`."""
    folder = tmp_path_factory.mktemp("trained")
    images = np.random.RandomState(0).randint(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    np.savez(folder / "images.npz", arr_0=images)
    train(folder, folder / "run", "--total_training_steps", "2")
    logger.reset()
    return folder


@pytest.fixture
def bucket(trained, tmp_path, monkeypatch):
    """A bucket with the run, and an empty cache in `tmp_path/cache`."""
    fake = bucket_of(trained / "run")
    monkeypatch.setitem(sys.modules, "blobfile", fake)
    monkeypatch.setattr(filesystem, "_answered", set())
    monkeypatch.setenv("CM_CACHE_DIR", str(tmp_path / "cache"))
    yield fake
    logger.reset()


def train(folder, run, *flags, script=EdmTrainConfig):
    places = ["--data_dir", folder / "images.npz", "--out_dir", run]
    run_train(parse(script, [*FLAGS.split(), *map(str, places), *flags]))


def cached(tmp_path):
    return sorted(p.name.split("-", 1)[1] for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock")


@pytest.mark.parametrize("path", [RUN, RUN + "/", f"{RUN}/checkpoints/step_000002"])
def test_a_model_comes_from_a_run_and_only_its_file_is_fetched(trained, bucket, tmp_path, path):
    file = load_model_file(path)
    local = load_model_file(str(trained / "run"))
    assert file.path == f"{RUN}/checkpoints/step_000002/ema_0.9_000002.pt" and file.kind == "ema:0.9"
    assert file.sha256 == local.sha256 and file.config == local.config
    assert cached(tmp_path) == ["ema_0.9_000002.pt"]
    assert load_model_file(path, "raw").path.endswith("step_000002/model000002.pt")
    with pytest.raises(
        UserError, match=r"gs://bucket/run/.* has no ema:0.7, but ema:0.5, ema:0.9, raw \(--weights\)"
    ):
        load_model_file(path, "ema:0.7")


def test_a_single_remote_file_stays_a_file(bucket):
    file = load_model_file(f"{RUN}/checkpoints/step_000001/model000001.pt")
    assert file.kind == "raw" and file.config["image_size"] == 8
    with pytest.raises(UserError, match="no such remote file"):
        load_model_file(f"{RUN}/checkpoints/step_000001/model000007.pt")


def test_the_newest_complete_checkpoint_counts(bucket):
    assert [p[-6:] for p in checkpoint_paths(RUN)] == ["000002", "000001"]
    whole = dict(bucket.files)
    step = f"{RUN}/checkpoints/step_000002"
    for damage in (
        lambda: bucket.files.pop(f"{step}/manifest.json"),
        lambda: bucket.files.pop(f"{step}/opt000002.pt"),
        lambda: bucket.files.update({f"{step}/opt000002.pt": b"short"}),
        lambda: bucket.files.update({f"{step}/manifest.json": b"{"}),
    ):
        bucket.files = dict(whole)
        damage()
        assert newest_checkpoint(RUN, "model_path")[0] == f"{RUN}/checkpoints/step_000001"
    for name in list(bucket.files):
        if name.endswith("manifest.json"):
            del bucket.files[name]
    for load in (load_model_file, checkpoint_of):
        with pytest.raises(UserError, match=rf"^{RUN} holds no complete checkpoint \(--\w+\)"):
            load(RUN)


def test_steps_are_numbers_and_other_folders_are_none(bucket):
    for name in ("step_000010", "step_1000000", "step_9", "damaged_step_000003_1", ".tmp_step_000004"):
        bucket.files[f"gs://bucket/other/checkpoints/{name}/x"] = b""
    assert [p.rsplit("_", 1)[1] for p in checkpoint_paths("gs://bucket/other/")] == ["1000000", "000010", "9"]
    assert checkpoint_paths("gs://bucket/nothing") == []


def flip_last_byte(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_a_file_with_another_hash_is_refused_and_not_kept(bucket, tmp_path):
    name = f"{RUN}/checkpoints/step_000002/ema_0.9_000002.pt"
    right = bucket.files[name]
    bucket.files[name] = flip_last_byte(right)
    with pytest.raises(Damaged, match=rf"{name} is damaged: its hash differs"):
        load_model_file(RUN)
    with pytest.raises(Damaged, match=r"gs://bucket/run/.*step_000002 is damaged.*\(--resume_checkpoint\)"):
        checkpoint_of(RUN)
    assert cached(tmp_path) == []
    bucket.files[name] = right
    assert load_model_file(RUN).kind == "ema:0.9"


def test_a_manifest_cannot_lead_out_of_the_cache(bucket, tmp_path):
    name = f"{RUN}/checkpoints/step_000002/manifest.json"
    manifest = json.loads(bucket.files[name])
    manifest["files"]["../../evil"] = {"bytes": 1, "sha256": ""}
    bucket.files[name] = json.dumps(manifest).encode()
    bucket.files[f"{RUN}/evil"] = b"x"
    assert newest_checkpoint(RUN, "model_path")[0].endswith("step_000001")
    assert fetch(f"{RUN}/checkpoints/step_000002", tmp_path / "target") is None
    assert not list(tmp_path.rglob("evil"))


def test_a_checkpoint_is_copied_once_and_anew_when_it_changes(bucket):
    first = checkpoint_of(RUN)
    ck.verify_checkpoint(first)
    assert first.name.endswith("-step_000002")
    reads = [call[0] for call in bucket.calls if call[1] == "rb"]
    assert len(reads) == len(set(reads)) + 2  # the manifest: to look, to fetch by it, and to copy it
    bucket.calls.clear()
    assert checkpoint_of(f"{RUN}/checkpoints/step_000002/") == first
    assert [call[0] for call in bucket.calls] == [f"{RUN}/checkpoints/step_000002/manifest.json"]
    assert checkpoint_of(f"{RUN}/checkpoints/step_000001") != first


def test_training_goes_on_from_a_bucket(trained, bucket, tmp_path):
    train(trained, tmp_path / "there", "--total_training_steps", "4", "--resume_checkpoint", RUN)
    assert "from step 2" in (tmp_path / "there" / "log.txt").read_text()
    train(trained, tmp_path / "whole", "--total_training_steps", "4")
    for name in ("model000004.pt", "ema_0.9_000004.pt", "opt000004.pt"):
        one, other = (tmp_path / run / "checkpoints/step_000004" / name for run in ("there", "whole"))
        assert file_sha256(one) == file_sha256(other) or compare_tensors(one, other), name
    with pytest.raises(UserError, match=r"gs://bucket/empty holds no complete .*\(--resume_checkpoint\)"):
        train(
            trained, tmp_path / "x", "--total_training_steps", "4", "--resume_checkpoint", "gs://bucket/empty"
        )


def compare_tensors(one: Path, other: Path) -> bool:
    import torch

    a, b = (load_weights(path)[0] for path in (one, other))
    leaves = [torch.utils._pytree.tree_leaves(state) for state in (a, b)]
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(*leaves, strict=True)
    )


def test_a_teacher_and_a_sampled_model_may_lie_in_a_bucket(trained, bucket, tmp_path):
    distil = (
        "--training_mode consistency_distillation --loss_norm l2 --start_scales 4 --total_training_steps 1"
    )
    for name, teacher in (("far", RUN), ("near", str(trained / "run"))):
        more = [*distil.split(), "--teacher_model_path", teacher]
        train(trained, tmp_path / name, *more, script=CmTrainConfig)
        logger.reset()
        argv = (
            f"--num_samples 2 --steps 2 --sampler heun --out_dir {tmp_path}/out-{name} --model_path {teacher}"
        )
        run_image_sample(parse(SampleConfig, argv.split()))
    compare(tmp_path / "far", tmp_path / "near")
    samples = [np.load(next(tmp_path.glob(f"out-{name}/*.npz")))["arr_0"] for name in ("far", "near")]
    assert np.array_equal(*samples)


def bucket_of(run: str) -> FakeBlobfile:
    """A bucket with the files of a local run."""
    fake = FakeBlobfile()
    for path in Path(run).rglob("*"):
        if path.is_file():
            fake.files[f"{RUN}/{path.relative_to(run)}"] = path.read_bytes()
    return fake


def found_by_rank(run: str, cache: str) -> tuple[str, str, str]:
    """(weights file, its hash, copied checkpoint) as this rank sees them.

    Rank 0 looks before the manifest of the newest checkpoint is there.
    """
    fake = bucket_of(run)
    if distributed.get_rank() == 0:
        del fake.files[f"{RUN}/checkpoints/step_000002/manifest.json"]
    sys.modules["blobfile"] = fake
    os.environ["CM_CACHE_DIR"] = cache
    file = load_model_file(RUN)
    return file.path, file.sha256, str(checkpoint_of(RUN))


def test_all_ranks_take_what_rank_0_finds(trained, tmp_path):
    first, second = run_ranks(
        "tests.storage.test_remote_runs:found_by_rank",
        2,
        str(trained / "run"),
        str(tmp_path / "cache"),
        timeout=120,
    )
    assert first[:2] == second[:2] and first[0].endswith("step_000001/ema_0.9_000001.pt")
    assert first[2] == second[2] and first[2].endswith("-step_000001")


def test_what_cannot_be_reached_is_one_line(bucket, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("message=request failed: no route, request=<Request a lot>\nand more")

    for name in ("exists", "isdir", "stat", "listdir", "BlobFile"):
        monkeypatch.setattr(bucket, name, fail)
    for load in (load_model_file, checkpoint_of):
        with pytest.raises(filesystem.Unreachable, match=r"cannot be reached: RuntimeError: .* no route$"):
            load(RUN)
