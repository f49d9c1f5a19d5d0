"""Which models may teach, and what data and teacher decide for a run."""

import pytest
import torch

from cm.config.scripts import CmTrainConfig
from cm.errors import UserError
from cm.storage.weights import save_weights
from cm.training.roles import load_into, load_teacher


@pytest.mark.parametrize("mode", ["edm", "progdist", ""])
def test_denoisers_teach(tmp_path, mode):
    path = tmp_path / "model.pt"
    save_weights(path, {"w": torch.ones(2)}, {"config": {"training_mode": mode}} if mode else None)
    assert load_teacher(str(path)).state["w"].tolist() == [1, 1]
    assert load_teacher("") is None


@pytest.mark.parametrize(
    "mode",
    ["consistency_training", "continuous_distillation", "classifier", "ctm", "multistep_distillation"],
)
def test_other_models_do_not(tmp_path, mode):
    path = tmp_path / "model.pt"
    save_weights(path, {"w": torch.ones(2)}, {"config": {"training_mode": mode}})
    with pytest.raises(UserError, match=rf"model\.pt was trained by {mode}: .* \(--teacher_model_path\)"):
        load_teacher(str(path))


def test_a_teacher_on_another_scale_is_named_with_both_values(tmp_path):
    path = str(tmp_path / "model.pt")
    save_weights(path, {"w": torch.ones(2)}, {"config": {"training_mode": "edm", "sigma_data": 1.0}})
    with pytest.raises(
        UserError, match=r"model\.pt was trained with sigma_data 1\.0, not 0\.5 \(--init teacher"
    ):
        load_into(torch.nn.Linear(1, 1), load_teacher(path), "--init teacher", CmTrainConfig())
    with pytest.raises(UserError, match="no teacher is given"):
        load_into(torch.nn.Linear(1, 1), None, "--init teacher", CmTrainConfig())
