"""Guidance, multistep models and consistency trajectories from flags to results, in one process."""

from pathlib import Path

import numpy as np
import pytest
import torch

import cm
from cm.commands.cli import parse_config
from cm.config.scripts import CmTrainConfig, EdmTrainConfig, SampleConfig
from cm.data.images import to_uint8
from cm.diffusion.denoiser import Denoiser
from cm.models.pretrained import load_pretrained
from cm.nn import NO_CLASS
from cm.training.roles import create_roles, load_teacher
from tests.helpers.small_runs import MODEL, TRAIN, refuses, sample, train


@pytest.fixture(scope="module")
def told_some(data_dir, tmp_path_factory):
    """A class-conditional denoiser that was not told half of the classes."""
    flags = ["--class_cond", "True", "--label_dropout", "0.5", "--preview_count", "0"]
    return train(EdmTrainConfig, data_dir, tmp_path_factory.mktemp("told"), *flags)


def test_models_guide_themselves_and_others(told_some, teachers, tmp_path):
    options = ["--sampler", "euler", "--classes", "1,0"]
    runs = {
        name: sample(told_some, tmp_path / str(i), *options, *flags.split())
        for i, (name, flags) in enumerate(
            {
                "plain": "",
                "itself": "--guidance 3",
                "at 20 and above": "--guidance 3,20,100",
                "nowhere": "--guidance 3,100,200",
                "by a weaker one": f"--guidance 3 --guide {teachers('edm')}",
            }.items()
        )
    }
    assert {name: meta["nfe"] for name, (_, _, meta) in runs.items()} == {
        "plain": 4, "itself": 8, "at 20 and above": 5, "nowhere": 4, "by a weaker one": 8,
    }  # fmt: skip
    images = {name: found[0] for name, found in runs.items()}
    assert np.array_equal(images["plain"], images["nowhere"])
    assert not np.array_equal(images["plain"], images["by a weaker one"])
    assert len(runs["by a weaker one"][2]["guide_sha256"]) == 64
    student = cm.load(told_some)
    drawn = student.sample(3, sampler="euler", steps=4, guidance="3,20,100", classes=[1, 0], seed=42)
    assert np.array_equal(to_uint8(drawn).numpy(), images["at 20 and above"])


def test_guidance_that_has_nothing_to_hold_on_to(told_some, teachers, data_dir, tmp_path):
    refuses("knows no classes", lambda: sample(teachers("edm"), tmp_path / "a", "--guidance", "2"))
    always = train(
        EdmTrainConfig, data_dir, tmp_path / "always", "--class_cond", "True", "--preview_count", "0"
    )
    refuses("without --label_dropout", lambda: sample(always, tmp_path / "b", "--guidance", "2"))
    refuses(
        "does nothing at --guidance 1", lambda: sample(told_some, tmp_path / "c", "--guide", teachers("edm"))
    )
    guided = ["--guidance", "2", "--guide", told_some]
    refuses("knows classes, and the model does not", lambda: sample(teachers("edm"), tmp_path / "d", *guided))


@pytest.mark.parametrize("mode", ["consistency_distillation", "scd"])
def test_guided_teachers(mode, told_some, teachers, data_dir, tmp_path):
    """By itself and by another model; one-step samples of the student take no guidance again."""
    flags = ["--training_mode", mode, "--teacher_model_path", told_some, "--class_cond", "True"]
    flags += ["--loss_norm", "l2", "--start_scales", "4", "--preview_count", "0", "--guidance", "2,0.01,50"]
    flags += ["--boundary", "zero", "--guide", teachers("edm")] if mode == "scd" else []
    run = train(CmTrainConfig, data_dir, tmp_path / "run", *flags)
    config = parse_config(CmTrainConfig, [*MODEL, *TRAIN, *flags, "--num_classes", "2", "--in_channels", "1"])
    _, roles = create_roles(config, load_teacher(told_some), torch.device("cpu"))
    roles.teacher.net.eval()  # as the trainer does
    x, sigma, y = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 5.0]), torch.tensor([0, 1])
    for p in roles.teacher.net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    plain = Denoiser(roles.teacher.net, roles.teacher.precond)
    weaker = roles.teacher.baseline(x, sigma, y=y)
    if mode == "consistency_distillation":
        torch.testing.assert_close(weaker, plain(x, sigma, y=torch.full_like(y, NO_CLASS)))
    expected = 2 * plain(x, sigma, y=y) - weaker
    torch.testing.assert_close(roles.teacher(x, sigma, y=y), expected, rtol=1e-4, atol=1e-4)
    refuses("--guidance is for --sampler heun", lambda: sample(run, tmp_path / "x", "--guidance", "2"))


@pytest.fixture(scope="module")
def flow_teacher(data_dir, tmp_path_factory):
    """A denoiser on MeanFlow's network, of one time."""
    flags = [*FLOW, "--class_cond", "True", "--label_dropout", "0.5", "--preview_count", "0"]
    return train(EdmTrainConfig, data_dir, tmp_path_factory.mktemp("flow"), *flags)


FLOW = ["--network", "ddpmpp_meanflow", "--precond", "flow", "--sigma_max", "1e4"]


@pytest.mark.parametrize("mode", ["consistency_distillation", "scd", "flow_map_distillation"])
def test_a_student_is_told_the_scale(mode, told_some, flow_teacher, data_dir, tmp_path):
    """It begins as the teacher whatever the scale; some steps later the scale of a sample changes it."""
    teacher = flow_teacher if mode == "flow_map_distillation" else told_some
    flags = ["--training_mode", mode, "--teacher_model_path", teacher, "--class_cond", "True", "--lr", "0.1"]
    flags += ["--loss_norm", "l2", "--start_scales", "4", "--preview_count", "2", "--guidance", "1:4"]
    flags += ["--total_training_steps", "5"]
    flags += ["--boundary", "zero"] if mode == "scd" else FLOW if mode == "flow_map_distillation" else []
    run = train(CmTrainConfig, data_dir, tmp_path / "run", *flags)
    more = ["--num_classes", "2", "--in_channels", "1"]
    config = parse_config(CmTrainConfig, [*MODEL, *TRAIN, *flags, *more])
    _, roles = create_roles(config, load_teacher(teacher), torch.device("cpu"))
    net = roles.student.net.eval()
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.9]), torch.tensor([0, 1])
    second = {"second": t} if mode == "flow_map_distillation" else {}
    one, four = (net(x, t, y=y, guidance=torch.full((2,), w), **second) for w in (1.0, 4.0))
    assert torch.equal(one, four)

    def drawn(*argv):
        model = load_pretrained(parse_config(SampleConfig, ["--model_path", run, *argv]))
        return model.denoise(y, clip=False)(x, torch.tensor([5.0, 5.0]))

    plain, three = drawn(), drawn("--guidance", "3")
    assert torch.equal(plain, drawn("--guidance", "1")) and not torch.equal(plain, three)
    _, _, meta = sample(run, tmp_path / "s", "--guidance", "3", steps=1)
    assert meta["nfe"] == 1
    refuses("knows scales from 1 to 4", lambda: sample(run, tmp_path / "x", "--guidance", "5"))
    refuses("at which levels it acts", lambda: sample(run, tmp_path / "x", "--guidance", "3,0.1,9"))
    refuses(
        "give --guidance alone",
        lambda: sample(run, tmp_path / "x", "--guidance", "3", "--guide", told_some, "--sampler", "heun"),
    )


def test_bare_weights_are_guided_by_another_model(told_some, tmp_path):
    """They say nothing of their training, so not that they can do without a class."""
    model = load_pretrained(parse_config(SampleConfig, ["--model_path", told_some]))
    torch.save(model.denoiser.net.state_dict(), tmp_path / "bare.pt")
    flags = ["--training_mode", "edm", "--class_cond", "True", "--sampler", "euler", "--guidance", "2"]
    flags += [*MODEL, "--num_classes", "2", "--in_channels", "1"]
    bare = str(tmp_path / "bare.pt")
    refuses("without --label_dropout", lambda: sample(bare, tmp_path / "a", *flags))
    assert sample(bare, tmp_path / "b", *flags, "--guide", told_some)[2]["nfe"] == 8


def test_a_flow_map_without_a_slot_is_refused(told_some, data_dir, tmp_path):
    flags = ["--training_mode", "flow_map_distillation", "--teacher_model_path", told_some]
    flags += ["--class_cond", "True", "--guidance", "1:4", "--loss_norm", "l2"]
    refuses(
        "--network adm cannot be told a guidance: choose ddpmpp_meanflow",
        lambda: train(CmTrainConfig, data_dir, tmp_path / "run", *flags),
    )


def test_segments_train_and_are_sampled_one_step_each(told_some, data_dir, tmp_path):
    flags = [
        "--training_mode",
        "multistep_distillation",
        "--teacher_model_path",
        told_some,
        "--segments",
        "3",
    ]
    flags += [
        "--class_cond",
        "True",
        "--loss_norm",
        "l2",
        "--diffusion_schedule",
        "cosine",
        "--preview_count",
        "2",
    ]
    run = train(CmTrainConfig, data_dir, tmp_path / "run", *flags)
    assert Path(run, "previews", "step_000002_progdist3.png").exists()
    config = load_pretrained(parse_config(SampleConfig, ["--model_path", run])).config
    assert (config.steps, config.sampler, config.diffusion_schedule) == (3, "progdist", "cosine")
    images = cm.load(run).sample(2, seed=1)
    assert images.shape == (2, 1, 8, 8) and torch.isfinite(images).all()


@pytest.mark.parametrize("mode", ["ctm", "ctm_training"])
def test_trajectories_train_and_jump(mode, told_some, data_dir, tmp_path):
    flags = ["--training_mode", mode, "--start_scales", "4", "--start_ema", "0.9", "--class_cond", "True"]
    flags += ["--loss_norm", "l2", "--preview_count", "2"]
    flags += ["--teacher_model_path", told_some] if mode == "ctm" else []
    run = train(CmTrainConfig, data_dir, tmp_path / "run", *flags)
    nfe = {}
    for name, how in {
        "one": [],
        "exact": ["--steps", "3"],
        "gamma": ["--steps", "3", "--sampler", "gamma", "--gamma", "1"],
    }.items():
        images, _, meta = sample(run, tmp_path / name, *how, steps=1)
        assert images.shape == (3, 8, 8, 1)
        nfe[name] = meta["nfe"]
    assert nfe == {"one": 1, "exact": 3, "gamma": 3}
