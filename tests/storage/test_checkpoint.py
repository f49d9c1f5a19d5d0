"""Checkpoint directories: what they hold, damage, interrupted writes, pruning."""

import json
import os

import pytest
import torch

from cm.errors import UserError
from cm.storage import checkpoint as ck

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1, 2])}


def write(run, step):
    return ck.write_checkpoint(run, step, {f"model{step:06d}.pt": STATE}, {"step": step}, {"config": {}})


def test_checkpoint_directory(tmp_path):
    path = write(tmp_path, 12)
    assert path.name == "step_000012"
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "model000012.pt", "state.json"]
    assert ck.read_state(path) == {"step": 12, "config": {}}
    ck.verify_checkpoint(path)
    write(tmp_path, 2)
    write(tmp_path, 12)
    assert [p.name for p in ck.complete_checkpoints(tmp_path)] == ["step_000002", "step_000012"]


def test_incomplete_checkpoints_are_not_seen(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    folder = tmp_path / "checkpoints"
    (folder / "step_000002" / "manifest.json").unlink()
    (folder / "step_000003" / "model000003.pt").write_bytes(b"short")
    (folder / "step_000004" / "manifest.json").write_text("{")
    assert [p.name for p in ck.complete_checkpoints(tmp_path)] == ["step_000001"]
    assert ck.complete_checkpoints(tmp_path / "nothing") == []


def test_flipped_bit_is_found(tmp_path):
    path = write(tmp_path, 1) / "model000001.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model000001\.pt is damaged"):
        ck.verify_checkpoint(path.parent)


def test_failed_write_leaves_earlier_checkpoints_and_no_rubbish(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ck, "_write_json", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 2)
    assert os.listdir(tmp_path / "checkpoints") == ["step_000001"]
    ck.verify_checkpoint(ck.complete_checkpoints(tmp_path)[-1])


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path):
    for step in (5, 10, 15, 20, 25):
        write(tmp_path, step)
    ck.prune_checkpoints(tmp_path, keep_last=0, keep_every=0)
    assert len(ck.complete_checkpoints(tmp_path)) == 5
    ck.prune_checkpoints(tmp_path, keep_last=2, keep_every=10)
    names = [p.name for p in ck.complete_checkpoints(tmp_path)]
    assert names == ["step_000010", "step_000020", "step_000025"]


def test_manifest_is_the_last_file_in(tmp_path):
    manifest = json.loads((write(tmp_path, 3) / "manifest.json").read_text())
    assert manifest["step"] == 3 and set(manifest["files"]) == {"model000003.pt", "state.json"}
