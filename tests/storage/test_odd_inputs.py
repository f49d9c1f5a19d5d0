"""A pipe or a device in the place of a file of a checkpoint, a configuration or a search memo: one line, no waiting."""

import os

import pytest
import torch

from cm.commands.cli import parse
from cm.config.scripts import EdmTrainConfig
from cm.errors import UserError
from cm.storage import checkpoint as ck
from cm.storage.mirror import Mirror
from evaluations.search import Memo


@pytest.fixture(params=["pipe", "device"])
def put(request):
    """Puts a pipe or a link to /dev/zero in the place of a file; returns which."""

    def put(path):
        path.unlink(missing_ok=True)
        os.mkfifo(path) if request.param == "pipe" else path.symlink_to("/dev/zero")
        return request.param

    return put


@pytest.fixture
def written(tmp_path):
    return ck.write_checkpoint(tmp_path, 1, {"model000001.pt": {"w": torch.ones(2)}}, {"step": 1}, {})


@pytest.mark.parametrize("name", ["config.json", "config.yaml"])
def test_config(tmp_path, put, name):
    kind = put(tmp_path / name)
    with pytest.raises(UserError, match=rf"--config: \S*{name} is a {kind}, not a file"):
        parse(EdmTrainConfig, ["--config", str(tmp_path / name)])


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model000001.pt"])
def test_checkpoint(written, put, name):
    kind = put(written / name)
    with pytest.raises(UserError, match=rf"{name} is a {kind}, not a file|is incomplete"):
        ck.verify_checkpoint(written)


def test_state(written, put):
    kind = put(written / "state.json")
    with pytest.raises(UserError, match=f"is a {kind}"):
        ck.read_state(written)


def test_mirror(written, tmp_path, put):
    mirror = Mirror(tmp_path / "mirror", tmp_path / "empty")
    mirror.push(written)
    kind = put(tmp_path / "mirror" / "checkpoints" / "step_000001" / "manifest.json")
    with pytest.raises(UserError, match=f"is a {kind}"):
        mirror.pull()


def test_memo(tmp_path, put):
    put(tmp_path / "search_memo.json")
    with pytest.raises(UserError, match="not a file of search scores"):
        Memo(tmp_path / "search_memo.json", {})
