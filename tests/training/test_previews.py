"""Previews: which samplers and levels are drawn for each objective, with which weights, and what they leave behind."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from cm.config.registry import Objective
from cm.config.rows import OBJECTIVES
from cm.config.scripts import CmTrainConfig, EdmTrainConfig, configure
from cm.diffusion.denoiser import Denoiser
from cm.objectives.base import Roles
from cm.runtime import distributed
from cm.training.ema import EmaBank
from cm.training.mixed_precision import MasterWeights
from cm.training.previews import Preview
from tests.helpers.analytic import free
from tests.helpers.mp import run_ranks

STEP = 7
MODEL = {"image_size": 8, "in_channels": 1, "num_classes": 3, "preview_count": 4}


class Recorder(nn.Module):
    """A network of one weight that remembers how it was called; under `free` it is told sigma itself."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls: list[dict] = []

    def forward(self, x, sigma, y=None):
        assert len(set(sigma.tolist())) == 1
        self.calls.append(
            {"x": x, "sigma": sigma[0].item(), "y": y, "w": self.weight.item(), "training": self.training}
        )
        return 0.01 * self.weight * x

    def levels(self):
        return [call["sigma"] for call in self.calls]


def fake_trainer(num_scales=None, step=STEP):
    """What a preview asks of the trainer; num_scales: step -> count."""
    net = Recorder()
    params = list(net.parameters())
    ema = EmaBank(params, "0.9,0.99,0.5")
    for copies, value in zip(ema.copies, (0.5, 2.0, 3.0)):
        copies[0].fill_(value)
    return SimpleNamespace(
        model=net,
        state=SimpleNamespace(
            ema=ema, step=step, divided=False, student=SimpleNamespace(weights=MasterWeights(net))
        ),
        objective=SimpleNamespace(num_scales=num_scales or (lambda step: None)),
        roles=Roles(Denoiser(net, free)),
        device=torch.device("cpu"),
    )


def karras(position, low=0.002, high=80.0, rho=7.0):
    return (high ** (1 / rho) + position * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def drawn(config, folder, trainer):
    """{name: levels} in the order of drawing."""
    found = {}
    for name, images in Preview(config, str(folder)).samples(trainer):
        assert images.shape == (4, 1, 8, 8) and images.abs().max() <= 1
        found[name] = trainer.model.levels()
        trainer.model.calls.clear()
    return found


# ---- what is drawn ---------------------------------------------------------------------------------


def test_a_teacher_is_drawn_with_18_heun_steps(tmp_path):
    found = drawn(configure(EdmTrainConfig, **MODEL), tmp_path, fake_trainer())
    grid = [karras(i / 17) for i in range(18)]
    expected = [grid[0]] + [level for level in grid[1:] for _ in range(2)]
    assert found == {"heun18": pytest.approx(expected, rel=1e-5)}


@pytest.mark.parametrize(("scales", "position"), [(18, 10 / 17), (40, 23 / 39), (3, 1 / 2), (11, 6 / 10)])
@pytest.mark.parametrize("mode", ["consistency_distillation", "consistency_training"])
def test_consistency_models_are_drawn_in_one_and_two_steps(mode, scales, position, tmp_path):
    """The second evaluation is at the grid point nearest to 0.6 of the way, on the grid N(k) of this step."""
    trainer = fake_trainer({STEP: scales}.__getitem__)
    found = drawn(configure(CmTrainConfig, **MODEL, training_mode=mode), tmp_path, trainer)
    assert list(found) == ["onestep", "twostep"]
    assert found["onestep"] == pytest.approx([80.0], rel=1e-5)
    assert found["twostep"] == pytest.approx([80.0, karras(position)], rel=1e-5)


def test_two_grid_points_leave_no_second_evaluation_to_choose(tmp_path):
    trainer = fake_trainer(lambda step: 2)
    found = drawn(configure(CmTrainConfig, **MODEL, training_mode="consistency_training"), tmp_path, trainer)
    assert found["twostep"] == pytest.approx([80.0, 0.002], rel=1e-5)


@pytest.mark.parametrize("mode", ["continuous_distillation", "continuous_training"])
def test_continuous_models_use_the_grid_of_their_samples(mode, tmp_path):
    config = configure(
        CmTrainConfig, **MODEL, training_mode=mode, start_scales=11, sigma_min=0.01, sigma_max=50.0
    )
    found = drawn(config, tmp_path, fake_trainer())
    assert found["twostep"] == pytest.approx([50.0, karras(0.6, 0.01, 50.0)], rel=1e-5)


@pytest.mark.parametrize(("step", "scales", "steps"), [(0, 4, 4), (STEP, 4, 4), (STEP, 64, 32)])
def test_progressive_distillation_is_drawn_with_the_steps_just_trained(step, scales, steps, tmp_path):
    trainer = fake_trainer({max(step - 1, 0): scales}.__getitem__, step)
    found = drawn(configure(CmTrainConfig, **MODEL, training_mode="progdist"), tmp_path, trainer)
    expected = [karras(i / steps) for i in range(steps)]
    assert found == {f"progdist{steps}": pytest.approx(expected, rel=1e-5)}


def test_progressive_distillation_in_the_time_of_its_schedule(tmp_path):
    config = configure(CmTrainConfig, **MODEL, training_mode="progdist", diffusion_schedule="cosine")
    found = drawn(config, tmp_path, fake_trainer(lambda step: 2))
    low, high = math.atan(0.002), math.atan(80.0)
    assert found == {"progdist2": pytest.approx([80.0, math.tan((low + high) / 2)], rel=1e-4)}


def test_denoisers_of_other_objectives_are_drawn_with_the_sampler_of_their_row(tmp_path):
    OBJECTIVES.add("flow", Objective(make=lambda config: None, sampler="euler", origin="test"))
    try:
        config = configure(CmTrainConfig, **MODEL, training_mode="flow")
        found = drawn(config, tmp_path, fake_trainer())
    finally:
        OBJECTIVES.drop("flow")
    assert found == {"euler18": pytest.approx([karras(i / 17) for i in range(18)], rel=1e-5)}


# ---- with which weights, labels and noise --------------------------------------------------------------


def test_the_slowest_average_is_drawn_and_the_weights_come_back(tmp_path):
    trainer = fake_trainer()
    trainer.model.train()
    Preview(configure(EdmTrainConfig, **MODEL), str(tmp_path))(trainer)
    assert {(call["w"], call["training"]) for call in trainer.model.calls} == {(2.0, False)}
    assert trainer.model.weight.item() == 1.0 and trainer.model.training
    assert not trainer.model.weight.grad and trainer.state.ema.copies[1][0].item() == 2.0


def test_the_weights_come_back_after_an_error(tmp_path):
    def broken(step):
        raise ValueError("no grid")

    trainer = fake_trainer(broken)
    with pytest.raises(ValueError, match="no grid"):
        Preview(configure(CmTrainConfig, **MODEL), str(tmp_path))(trainer)
    assert trainer.model.weight.item() == 1.0 and trainer.model.training


def test_a_model_that_is_not_finite_is_not_drawn_and_training_goes_on(tmp_path):
    trainer = fake_trainer()
    trainer.state.ema.copies[1][0].fill_(torch.nan)
    Preview(configure(EdmTrainConfig, **MODEL), str(tmp_path))(trainer)
    assert not list((tmp_path / "previews").iterdir())
    assert trainer.model.weight.item() == 1.0


def test_classes_in_turn(tmp_path):
    trainer = fake_trainer()
    Preview(configure(EdmTrainConfig, **MODEL, class_cond=True), str(tmp_path))(trainer)
    assert all(call["y"].tolist() == [0, 1, 2, 0] for call in trainer.model.calls)
    trainer = fake_trainer()
    Preview(configure(EdmTrainConfig, **MODEL, class_cond=False), str(tmp_path))(trainer)
    assert all(call["y"] is None for call in trainer.model.calls)


def test_the_noise_is_always_the_same_and_trainings_random_numbers_go_on(tmp_path):
    config = configure(CmTrainConfig, **MODEL, training_mode="consistency_training")
    first, second = fake_trainer(lambda step: 18), fake_trainer(lambda step: 18, step=90)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for trainer in (first, second):
        Preview(config, str(tmp_path))(trainer)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.model.calls, second.model.calls, strict=True):
        assert torch.equal(a["x"], b["x"])
    assert first.model.calls[0]["x"].std().item() == pytest.approx(80.0, rel=0.2)


# ---- files and ranks -----------------------------------------------------------------------------------


def test_names_of_files(tmp_path):
    config = configure(CmTrainConfig, **MODEL, training_mode="consistency_training")
    Preview(config, str(tmp_path))(fake_trainer(lambda step: 18))
    found = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert found == ["step_000007_onestep.png", "step_000007_twostep.png"]
    with Image.open(tmp_path / "previews" / found[0]) as image:
        assert min(image.size) >= 16


def draw_on_ranks(folder):
    trainer = fake_trainer()
    Preview(configure(EdmTrainConfig, **MODEL), folder)(trainer)
    files = [path.name for path in Path(folder, "previews").iterdir()]
    return distributed.get_rank(), len(trainer.model.calls), files


def test_rank_0_draws_and_the_others_wait(tmp_path):
    files = ["step_000007_heun18.png"]
    results = run_ranks("tests.training.test_previews:draw_on_ranks", 3, str(tmp_path))
    assert results == [(0, 35, files), (1, 0, files), (2, 0, files)]
