"""Weights files and checkpoint directories: round trips, damage, malice, atomicity."""

import json
import os
import pickle
import zipfile

import pytest
import torch

from cm.errors import UserError
from cm.storage import checkpoint as ck

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1, 2])}


def test_weights_file_is_a_plain_state_dict_and_carries_meta(tmp_path):
    path = tmp_path / "model000001.pt"
    ck.save_weights(path, STATE, {"config": {"image_size": 8}})
    plain = torch.load(path, weights_only=True)
    assert plain.keys() == STATE.keys() and torch.equal(plain["a.weight"], STATE["a.weight"])
    state, meta = ck.load_weights(path)
    assert meta == {"config": {"image_size": 8}} == ck.read_meta(path)
    assert torch.equal(state["a.bias"], STATE["a.bias"])
    assert os.listdir(tmp_path) == ["model000001.pt"]


def test_views_do_not_drag_their_storage_along(tmp_path):
    ck.save_weights(tmp_path / "m.pt", {"row": torch.zeros(1000, 1000)[0]})
    assert (tmp_path / "m.pt").stat().st_size < 50_000


def test_files_of_other_code_have_no_meta(tmp_path):
    torch.save(STATE, tmp_path / "legacy.pt")
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert ck.load_weights(tmp_path / "legacy.pt")[1] is None
    assert ck.load_weights(tmp_path / "old.pt")[1] is None


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("kind", ["zip", "legacy", "raw"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    if kind == "raw":
        (tmp_path / "m.pt").write_bytes(pickle.dumps(Malicious()))
    else:
        torch.save({"a": Malicious()}, tmp_path / "m.pt", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match=r"m\.pt"):
        ck.load_weights(tmp_path / "m.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 700])
def test_truncated_files_are_named_in_one_line(tmp_path, keep):
    ck.save_weights(tmp_path / "m.pt", STATE)
    (tmp_path / "m.pt").write_bytes((tmp_path / "m.pt").read_bytes()[:keep])
    with pytest.raises(UserError, match=r"m\.pt") as error:
        ck.load_weights(tmp_path / "m.pt")
    assert "\n" not in str(error.value)


def test_other_contents(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="list"):
        ck.load_weights(tmp_path / "list.pt")
    with pytest.raises(UserError, match="no such"):
        ck.load_weights(tmp_path / "missing.pt")


def test_misfit_names_the_first_tensors():
    module = torch.nn.Linear(3, 2)
    ck.check_matching(module, module.state_dict(), "x.pt")
    with pytest.raises(UserError, match=r"x\.pt.*weight: \(3, 2\) in the file, \(2, 3\) in the model"):
        ck.check_matching(module, {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "x.pt")
    with pytest.raises(UserError, match="bias: missing"):
        ck.check_matching(module, {"weight": torch.zeros(2, 3)}, "x.pt")
    with pytest.raises(UserError, match="extra: not in the model"):
        ck.check_matching(module, {**module.state_dict(), "extra": torch.zeros(1)}, "x.pt")


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


def test_meta_does_not_break_the_zip(tmp_path):
    ck.save_weights(tmp_path / "m.pt", STATE, {"k": "v"})
    assert zipfile.ZipFile(tmp_path / "m.pt").testzip() is None
    assert torch.equal(torch.load(tmp_path / "m.pt", weights_only=True, mmap=True)["a.bias"], STATE["a.bias"])
