"""Programs beside training whose disk is full: one line that names the file, and nothing left."""

import sys

import numpy as np
import pytest

from cm.commands.cli import parse
from cm.commands.sample import run_image_sample
from cm.config.scripts import SampleConfig
from cm.errors import UserError
from cm.runtime.claims import Claim
from cm.tools.convert.formats import Source, convert
from evaluations import small_classifier
from tests.helpers.full_disk import full_after
from tests.helpers.models import save_consistency_model

FULL = r"^cannot write \S+: [^\n]*File too large[^\n]*$"


@pytest.mark.parametrize("to", ["cm", "legacy", "safetensors", "diffusers"])
def test_converting(tmp_path, to):
    save_consistency_model(tmp_path / "model.pt", resblock_updown=True, attention_resolutions="")
    source, target = Source(str(tmp_path / "model.pt")), tmp_path / "out"
    for limit in (100, 20_000):
        with full_after(limit), pytest.raises(UserError, match=FULL):
            convert(source, str(target), to, {})
        assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    convert(source, str(target), to, {})
    assert target.exists()


@pytest.mark.parametrize("limit", [2500, 5000])
def test_sampling(tmp_path, limit):
    """The samples have 3,072 bytes, so that the larger limit stops at the picture: there is all or nothing."""
    save_consistency_model(tmp_path / "model.pt")
    out = tmp_path / "out"
    flags = (
        f"--model_path {tmp_path}/model.pt --out_dir {out} --num_samples 16 --batch_size 4 --sampler onestep"
    )
    with full_after(limit), pytest.raises(UserError, match=FULL):
        run_image_sample(parse(SampleConfig, flags.split()))
    assert [p.name for p in out.glob("**/*") if p.is_file()] == []


def test_claiming(tmp_path):
    claim = Claim(tmp_path / "out")
    with full_after(10), pytest.raises(UserError, match="File too large"):
        claim.__enter__()
    assert not list(tmp_path.iterdir())


def test_the_classifier_of_digits(tmp_path, monkeypatch):
    np.savez(
        tmp_path / "digits.npz", arr_0=np.zeros((20, 8, 8, 1), np.uint8), arr_1=np.arange(20, dtype=int) % 2
    )
    arguments = ["small_classifier", f"{tmp_path}/digits.npz", f"{tmp_path}/out.pt", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    with full_after(1000), pytest.raises(UserError, match=FULL):
        small_classifier.main()
    assert [path.name for path in tmp_path.iterdir()] == ["digits.npz"]
