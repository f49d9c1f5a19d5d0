"""Weights files: round trips, damage, malice."""

import os
import pickle
import zipfile

import pytest
import torch

from cm.errors import UserError
from cm.storage import weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1, 2])}


def test_weights_file_is_a_plain_state_dict_and_carries_meta(tmp_path):
    path = tmp_path / "model000001.pt"
    weights.save_weights(path, STATE, {"config": {"image_size": 8}})
    plain = torch.load(path, weights_only=True)
    assert plain.keys() == STATE.keys() and torch.equal(plain["a.weight"], STATE["a.weight"])
    state, meta = weights.load_weights(path)
    assert meta == {"config": {"image_size": 8}} == weights.read_meta(path)
    assert torch.equal(state["a.bias"], STATE["a.bias"])
    assert os.listdir(tmp_path) == ["model000001.pt"]


def test_views_do_not_drag_their_storage_along(tmp_path):
    weights.save_weights(tmp_path / "m.pt", {"row": torch.zeros(1000, 1000)[0]})
    assert (tmp_path / "m.pt").stat().st_size < 50_000


def test_files_of_other_code_have_no_meta(tmp_path):
    torch.save(STATE, tmp_path / "legacy.pt")
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert weights.load_weights(tmp_path / "legacy.pt")[1] is None
    assert weights.load_weights(tmp_path / "old.pt")[1] is None


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
        weights.load_weights(tmp_path / "m.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 700])
def test_truncated_files_are_named_in_one_line(tmp_path, keep):
    weights.save_weights(tmp_path / "m.pt", STATE)
    (tmp_path / "m.pt").write_bytes((tmp_path / "m.pt").read_bytes()[:keep])
    with pytest.raises(UserError, match=r"m\.pt") as error:
        weights.load_weights(tmp_path / "m.pt")
    assert "\n" not in str(error.value)


def test_other_contents(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="list"):
        weights.load_weights(tmp_path / "list.pt")
    with pytest.raises(UserError, match="no such"):
        weights.load_weights(tmp_path / "missing.pt")


def test_misfit_names_the_first_tensors():
    module = torch.nn.Linear(3, 2)
    weights.check_matching(module, module.state_dict(), "x.pt")
    with pytest.raises(UserError, match=r"x\.pt.*weight: \(3, 2\) in the file, \(2, 3\) in the model"):
        weights.check_matching(module, {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, "x.pt")
    with pytest.raises(UserError, match="bias: missing"):
        weights.check_matching(module, {"weight": torch.zeros(2, 3)}, "x.pt")
    with pytest.raises(UserError, match="extra: not in the model"):
        weights.check_matching(module, {**module.state_dict(), "extra": torch.zeros(1)}, "x.pt")


def test_meta_does_not_break_the_zip(tmp_path):
    weights.save_weights(tmp_path / "m.pt", STATE, {"k": "v"})
    assert zipfile.ZipFile(tmp_path / "m.pt").testzip() is None
    assert torch.equal(torch.load(tmp_path / "m.pt", weights_only=True, mmap=True)["a.bias"], STATE["a.bias"])
