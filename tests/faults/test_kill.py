"""kill -9 at random moments, many of them while a checkpoint is written: the end is bitwise that of a quiet run."""

import json
import os
import shutil

import pytest
import torch

from cm.storage.checkpoint import complete_checkpoints
from cm.storage.weights import load_weights, save_weights
from cm.tools.torture import Torture, compare, slow_storage


@pytest.fixture(scope="module")
def torture(tmp_path_factory):
    """Eight kills of consistency training with dropout and two averages."""
    torture = Torture(tmp_path_factory.mktemp("torture"), runs=("ct",), seed=0, report=lambda text: None)
    torture.run(8)
    return torture


def test_eight_kills_leave_no_trace(torture):
    tally = torture.tally
    assert tally.kills == 8 and tally.kills_in_save >= 1
    assert tally.starts > 8 and sum(tally.finished.values()) >= 1
    assert str(tally).startswith("8 kills, ")


def spoil_tensor(run):
    path = complete_checkpoints(run)[-1] / "opt000010.pt"
    content, meta = load_weights(path)
    moment = content["state"][3]["exp_avg"].flatten()
    moment[0] = torch.nextafter(moment[0], torch.tensor(1e9))
    save_weights(path, content, meta)


def spoil_state(run):
    path = complete_checkpoints(run)[-1] / "state.json"
    path.write_text(path.read_text().replace('"skipped": 0', '"skipped": 1'))


def spoil_log(run):
    path = run / "progress.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))


@pytest.mark.parametrize("spoil", [spoil_tensor, spoil_state, spoil_log])
def test_the_comparison_sees_the_smallest_difference(torture, tmp_path, spoil):
    reference, _ = torture.undisturbed("ct")
    shutil.copytree(reference, tmp_path / "copy")
    compare(tmp_path / "copy", reference)
    spoil(tmp_path / "copy")
    with pytest.raises(AssertionError, match="copy"):
        compare(tmp_path / "copy", reference)


def test_slow_storage_is_slow_and_ends():
    before = os.fsync
    with slow_storage(0.0):
        assert os.fsync is not before
    assert os.fsync is before
