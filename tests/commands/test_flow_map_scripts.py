"""Flow maps from flags to results, in one process: training, resuming, sampling, teachers, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cm.api import load
from cm.config.inherit import inherit
from cm.config.rows import OBJECTIVES
from cm.config.scripts import CmTrainConfig, EditConfig, EdmTrainConfig, SampleConfig, SearchConfig
from cm.diffusion.flow_maps import FlowMap
from tests.helpers.small_runs import refuses, sample, train

FLOW = ["--network", "ddpmpp_meanflow", "--precond", "flow", "--class_cond", "False"]


def pixels(images):
    return ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def meanflow(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("meanflow")
    return train(
        CmTrainConfig,
        data_dir,
        out,
        *FLOW,
        "--training_mode",
        "meanflow",
        "--preview_count",
        "2",
        "--preview_interval",
        "2",
    )


@pytest.fixture(scope="module")
def teacher(data_dir, tmp_path_factory):
    return train(EdmTrainConfig, data_dir, tmp_path_factory.mktemp("teacher"), "--class_cond", "False")


def test_a_flow_map_trains_and_samples(meanflow, tmp_path):
    model = load(meanflow)
    assert isinstance(model._model.denoiser, FlowMap) and model.config.sigma_max == 1e6
    names = {path.name for path in Path(meanflow, "previews").glob("*.png")}
    assert names == {"step_000002_onestep.png", "step_000002_fourstep.png"}
    _, _, one = sample(meanflow, tmp_path / "one", steps=1)
    assert (one["nfe"], one["config"]["sampler"], one["sigmas"]) == (1, "jumps", [1e6, 0.0])
    four, _, meta = sample(meanflow, tmp_path / "four")
    assert meta["nfe"] == 4 and np.allclose(meta["sigmas"][1:], [3.0, 1.0, 1 / 3, 0.0], rtol=1e-5)
    drawn = model.sample(3, steps=4, seed=meta["config"]["seed"])
    assert np.array_equal(pixels(drawn), four)
    for sampler in ("heun", "onestep"):
        sample(meanflow, tmp_path / sampler, "--sampler", sampler, "--sigma_max", "80")


@pytest.mark.parametrize("mode", ["ctm", "meanflow"])
def test_jumps_of_a_flow_map_are_no_points_of_a_grid(mode):
    """Its file's steps are for its own sampler; editing, search and samplers along a grid keep theirs."""
    stored = {"training_mode": mode, "steps": 1, "network": "adm"}

    def steps(config, **changes):
        asked = replace(config, **changes, explicit=frozenset(changes))
        return inherit(asked, stored, "f").steps

    own = OBJECTIVES[mode].sampler
    assert steps(SampleConfig()) == steps(SampleConfig(), sampler=own) == 1
    grid = {steps(SampleConfig(), sampler=name) for name in ("heun", "multistep")}
    assert grid == {steps(EditConfig()), steps(SearchConfig())} == {40}
    assert (
        inherit(EditConfig(), {**stored, "training_mode": "consistency_training", "steps": 18}, "f").steps
        == 18
    )


def test_resuming_changes_nothing(meanflow, data_dir, tmp_path):
    for total in ("1", "2"):
        flags = [
            *FLOW,
            "--training_mode",
            "meanflow",
            "--total_training_steps",
            total,
            "--save_interval",
            "1",
        ]
        again = train(CmTrainConfig, data_dir, tmp_path / "run", *flags)
    states = [load(run, weights="raw")._model.denoiser.net.state_dict() for run in (meanflow, again)]
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


def test_a_student_learns_guidance(data_dir, tmp_path):
    """Where some rows hide their class; a sample costs one pass, and the weights are others than without."""
    flags = [
        "--training_mode",
        "meanflow",
        "--class_cond",
        "True",
        "--label_dropout",
        "0.5",
        "--kappa",
        "0.5",
    ]
    run = train(CmTrainConfig, data_dir, tmp_path / "run", *FLOW[:-2], *flags)
    _, labels, meta = sample(run, tmp_path / "samples", steps=1)
    assert meta["nfe"] == 1 and len(labels) == 3
    plain = train(CmTrainConfig, data_dir, tmp_path / "plain", *FLOW[:-2], *flags[:-2])
    states = [load(path, weights="raw")._model.denoiser.net.state_dict() for path in (run, plain)]
    assert any(not torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


def test_a_student_is_told_its_guidance(data_dir, meanflow, tmp_path):
    """One network for every guidance: samples choose it, at the price of no pass."""
    mode = ["--training_mode", "improved_meanflow", "--class_cond", "True"]
    run = train(
        CmTrainConfig, data_dir, tmp_path / "run", *FLOW[:-2], *mode, "--label_dropout", "0.5", "--lr", "0.1"
    )
    model = load(run)
    drawn = {}
    for guidance in ("1", "4", "4,0.5,2"):
        _, _, meta = sample(run, tmp_path / guidance, "--guidance", guidance, steps=2)
        assert meta["nfe"] == 2
        drawn[guidance] = model.sample(3, steps=2, guidance=guidance)
    assert torch.equal(drawn["1"], model.sample(3, steps=2))
    assert not torch.equal(drawn["4"], drawn["1"]) and not torch.equal(drawn["4"], drawn["4,0.5,2"])
    refuses("knows scales from 1 on", lambda: sample(run, tmp_path / "low", "--guidance", "0.5"))
    one_time = "--guidance and --guide are for models of one time"
    jumps = ["--sampler", "jumps", "--guidance", "4"]
    assert np.array_equal(
        sample(run, tmp_path / "jumps", *jumps, "--seed", "0", steps=2)[0], pixels(drawn["4"])
    )
    refuses("--guide is for --sampler", lambda: sample(run, tmp_path / "guide", *jumps[2:], "--guide", run))
    refuses("--guidance is for --sampler", lambda: sample(meanflow, tmp_path / "flow", *jumps))
    refuses(one_time, lambda: load(meanflow).sample(1, guidance=2, sampler="heun"))
    flags = [*FLOW[2:-2], *mode, "--label_dropout", "0.5", "--network", "adm"]
    refuses(
        "--network adm cannot be told a guidance: choose ddpmpp_meanflow",
        lambda: train(CmTrainConfig, data_dir, tmp_path / "adm", *flags),
    )


@pytest.mark.parametrize("identity", ["eulerian", "lagrangian", "progressive"])
def test_a_student_begins_as_its_teacher(identity, teacher, data_dir, tmp_path):
    flags = [
        "--training_mode",
        "flow_map_distillation",
        "--identity",
        identity,
        "--teacher_model_path",
        teacher,
    ]
    student = train(
        CmTrainConfig,
        data_dir,
        tmp_path / "s",
        *flags,
        "--class_cond",
        "False",
        "--init",
        "teacher",
        "--lr",
        "1e-12",
    )
    new, old = load(student, weights="raw")._model.denoiser, load(teacher)._model.denoiser
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0])
    for lower in (sigma, sigma / 2, torch.zeros(2)):
        torch.testing.assert_close(new(x, sigma, lower), old(x, sigma), rtol=1e-4, atol=1e-4)
    sample(student, tmp_path / "samples", steps=2)


def test_what_does_not_fit_is_one_line(meanflow, teacher, data_dir, tmp_path):
    refuses(
        "--sampler jumps needs a flow map, a model of two times",
        lambda: sample(teacher, tmp_path, "--sampler", "jumps"),
    )
    refuses(
        "--sampler jumps needs a flow map, a model of two times",
        lambda: load(teacher).sample(1, sampler="jumps", steps=2),
    )
    refuses(
        "contradicts .* trained with meanflow", lambda: sample(meanflow, tmp_path, "--training_mode", "edm")
    )
    refuses(
        "was trained by meanflow: a teacher is a denoiser",
        lambda: train(
            CmTrainConfig,
            data_dir,
            tmp_path / "cd",
            "--class_cond",
            "False",
            "--teacher_model_path",
            meanflow,
        ),
    )
    refuses(
        "flow_map_distillation needs --teacher_model_path",
        lambda: train(CmTrainConfig, data_dir, tmp_path / "d", "--training_mode", "flow_map_distillation"),
    )
    refuses(
        "--gap_share must",
        lambda: train(
            CmTrainConfig, data_dir, tmp_path / "g", "--training_mode", "meanflow", "--gap_share", "2"
        ),
    )
    assert not list(tmp_path.glob("**/*.npz"))
