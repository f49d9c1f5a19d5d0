"""The family's systems from flags to results, in one process: columns as teachers, samplers, guidance, likelihood."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cm.commands.cli import parse, parse_config
from cm.commands.likelihood import run_likelihood
from cm.config.derived import stored_config
from cm.config.inherit import adopt_teacher
from cm.config.scripts import (
    ClassifierConfig,
    CmTrainConfig,
    EdmTrainConfig,
    LikelihoodConfig,
    SampleConfig,
    configure,
)
from cm.diffusion.alpha_sigma import AlphaSigma
from cm.diffusion.noise_schedules import iddpm_levels
from cm.diffusion.precond import BoundaryPrecond
from cm.models.guides import load_guide
from cm.models.pretrained import load_pretrained
from cm.storage.checkpoint import complete_checkpoints
from cm.storage.weights import load_weights, save_weights
from cm.training.factory import create_objective
from tests.helpers.small_runs import refuses, sample, train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def classifier(data_dir, tmp_path_factory):
    return train(ClassifierConfig, data_dir, tmp_path_factory.mktemp("classifier"))


# ---- columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["vp", "ve", "iddpm"])
def test_a_column_trains_samples_and_teaches(column, teachers, data_dir, tmp_path):
    """The student learns the preconditioning from the teacher's file; the sampler from the model's."""
    teacher = teachers(column)
    model = load_pretrained(parse_config(SampleConfig, ["--model_path", teacher]))
    assert model.config.precond == column
    sigma_range = {"vp": [], "ve": ["--sigma_min", "0.02"], "iddpm": ["--sigma_min", "0.0065"]}[column]
    flags = ["--loss_norm", "l2", "--start_scales", "4", "--class_cond", "False", *sigma_range]
    cd = train(
        CmTrainConfig,
        data_dir,
        tmp_path / "cd",
        *flags,
        "--teacher_model_path",
        teacher,
        "--start_ema",
        "0.9",
    )
    student = load_pretrained(parse_config(SampleConfig, ["--model_path", cd]))
    assert isinstance(student.denoiser.precond, BoundaryPrecond) and student.config.precond == column
    images, _, meta = sample(cd, tmp_path / "one")
    assert images.shape == (3, 8, 8, 1) and meta["nfe"] == 1
    pd = [*flags, "--training_mode", "progdist", "--scale_mode", "progdist", "--distill_steps_per_iter", "1"]
    pd = train(CmTrainConfig, data_dir, tmp_path / "pd", *pd, "--teacher_model_path", teacher)
    assert load_pretrained(parse_config(SampleConfig, ["--model_path", pd])).config.precond == column


def test_a_teacher_that_does_not_fit(teachers, data_dir, tmp_path):
    flags = ["--loss_norm", "l2", "--start_scales", "4", "--class_cond", "False", "--start_ema", "0.9"]

    def distill(column, *extra):
        return lambda: train(
            CmTrainConfig, data_dir, tmp_path / "x", *flags, "--teacher_model_path", teachers(column), *extra
        )

    refuses(
        "--precond edm contradicts --teacher_model_path .* trained with vp", distill("vp", "--precond", "edm")
    )
    refuses("leave the noise levels that the teacher .* 0.02 to 100.0", distill("ve", "--sigma_min", "0.002"))
    refuses("leave the noise levels of --precond iddpm", distill("iddpm", "--sigma_min", "0.002"))
    # What is known of the teacher decides; a bare state dict leaves it to the flags.
    config = configure(CmTrainConfig, precond="vp", explicit=frozenset({"precond"}))
    assert adopt_teacher(config, None, "x.pt") is config
    stored = stored_config(configure(EdmTrainConfig))
    del stored["precond"]
    assert adopt_teacher(configure(CmTrainConfig), stored, "old").precond == "edm"


def test_levels_are_rounded_to_those_the_network_knows(teachers, tmp_path):
    _, _, meta = sample(teachers("iddpm"), tmp_path, "--sampler", "heun", steps=6)
    known = iddpm_levels()
    assert meta["sigmas"][-1] == 0 and meta["nfe"] == 11
    for level in meta["sigmas"][:-1]:
        assert ((known - level).abs() / level).min() < 1e-6
    assert meta["sigmas"][0] == pytest.approx(80.2, rel=0.01) and meta["sigmas"][1] < 60


# ---- samplers by flag --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "nfe"),
    [
        (
            [
                "general",
                "--time_steps",
                "vp",
                "--noise_schedule",
                "vp",
                "--state_scale",
                "vp",
                "--solver_order",
                "1",
            ],
            4,
        ),
        (
            [
                "general",
                "--time_steps",
                "ve",
                "--noise_schedule",
                "ve",
                "--solver_alpha",
                "0.5",
                "--s_churn",
                "1",
            ],
            7,
        ),
        (["euler", "--time_steps", "iddpm"], 4),
        (["pc", "--sde", "ve"], 8),
        (["pc", "--sde", "vp", "--predictor", "ancestral", "--corrector", "none"], 4),
        (["pc", "--sde", "subvp", "--predictor", "euler_maruyama", "--corrector", "annealed_langevin"], 8),
        (["pc", "--sde", "edm", "--corrector_steps", "2", "--snr", "0.1"], 12),
        (["rk45", "--sde", "vp", "--tolerance", "0.1"], None),
    ],
)
def test_samplers_of_the_family(flags, nfe, teachers, tmp_path):
    images, labels, meta = sample(teachers("vp"), tmp_path, "--sampler", *flags)
    assert images.shape == (3, 8, 8, 1) and labels is None
    assert meta["nfe"] == nfe or (nfe is None and meta["nfe"] > 6)


# ---- guidance --------------------------------------------------------------------------------------


def test_a_classifier_trains_and_guides(classifier, teachers, data_dir, tmp_path):
    rows = [json.loads(line) for line in Path(classifier, "progress.jsonl").read_text().splitlines()]
    assert {"loss", "accuracy"} <= rows[0].keys() and not Path(classifier, "previews").exists()
    stored = json.loads(Path(classifier, "config.json").read_text())
    assert (stored["training_mode"], stored["num_classes"], stored["script"]) == (
        "classifier",
        2,
        "classifier_train",
    )
    options = ["--classes", "1,0", "--guide", classifier]
    for sampler in ("ancestral", "euler", "heun"):
        runs = [
            sample(
                teachers("edm"),
                tmp_path / f"{sampler}{scale}",
                "--sampler",
                sampler,
                *options,
                "--guidance",
                scale,
            )
            for scale in ("0", "10000")
        ]
        (free, labels, _), (pulled, _, meta) = runs
        assert labels.tolist() == [1, 0, 1] and meta["guide_path"].endswith(".pt")
        assert np.abs(free.astype(int) - pulled).max() > 2, sampler


def test_classifiers_that_do_not_fit(classifier, teachers, data_dir, tmp_path):
    def load(**changes):
        like = configure(SampleConfig, **{"image_size": 8, "in_channels": 1, **changes})
        return lambda: load_guide(classifier, like, torch.device("cpu"))

    assert load(num_classes=2, class_cond=True)().num_classes == 2
    refuses("--guide .* has --image_size 8, the model 16", load(image_size=16))
    refuses("--guide .* has --in_channels 1, the model 3", load(in_channels=3))
    refuses("--guide .* has --num_classes 2, the model 10", load(num_classes=10, class_cond=True))
    refuses("is a classifier, which draws no images", lambda: sample(classifier, tmp_path / "s"))
    options = ["--classes", "5", "--guide", classifier]
    refuses("--classes", lambda: sample(teachers("edm"), tmp_path / "t", *options))
    refuses(
        "unknown argument --class_cond",
        lambda: parse_config(ClassifierConfig, ["--class_cond", "False"]),
    )
    for flags in (
        ["--precond", "vp"],
        ["--network", "ncsnpp"],
        ["--preview_count", "4"],
        ["--diffusion_schedule", "vp"],
    ):
        refuses(flags[0], lambda flags=flags: parse_config(ClassifierConfig, flags))
    refuses(
        "a teacher is a denoiser",
        lambda: train(
            CmTrainConfig, data_dir, tmp_path / "cd", "--teacher_model_path", classifier, "--loss_norm", "l2"
        ),
    )


# ---- (alpha, sigma) ----------------------------------------------------------------------------------


def test_diffusion_schedules_train_and_halve(teachers, data_dir, tmp_path):
    config = parse_config(
        EdmTrainConfig, ["--diffusion_schedule", "cosine", "--weight_schedule", "truncated-snr"]
    )
    assert isinstance(create_objective(config).sampler.level.__self__, AlphaSigma)
    run = train(
        EdmTrainConfig,
        data_dir,
        tmp_path / "cosine",
        "--diffusion_schedule",
        "cosine",
        "--preview_count",
        "0",
    )
    flags = [
        "--training_mode",
        "progdist",
        "--scale_mode",
        "progdist",
        "--start_scales",
        "2",
        "--loss_norm",
        "l2",
    ]
    flags = [
        *flags,
        "--distill_steps_per_iter",
        "1",
        "--diffusion_schedule",
        "cosine",
        "--preview_count",
        "2",
    ]
    assert isinstance(create_objective(parse_config(CmTrainConfig, flags)).grid, AlphaSigma)
    student = train(CmTrainConfig, data_dir, tmp_path / "pd", *flags, "--teacher_model_path", run)
    assert (complete_checkpoints(student)[-1] / "teacher_model000002.pt").exists()
    _, _, meta = sample(student, tmp_path / "s", steps=2)
    assert meta["nfe"] == 2
    assert meta["sigmas"][0] == pytest.approx(80, rel=1e-4) and len(meta["sigmas"]) == 4
    # t = 1/2 of the truncated schedule.
    low, high = (math.atan(s) for s in (0.002, 80))
    assert meta["sigmas"][1] == pytest.approx(math.tan((low + high) / 2), rel=1e-4)


# ---- likelihood ------------------------------------------------------------------------------------


def test_bits_per_dim_of_a_run(teachers, data_dir, tmp_path):
    def score(*extra):
        argv = [
            "--model_path",
            teachers("edm"),
            "--data_dir",
            data_dir,
            "--num_images",
            "3",
            "--tolerance",
            "1e-2",
        ]
        return run_likelihood(parse(LikelihoodConfig, [*argv, "--out_dir", str(tmp_path), *extra]))

    result = score("--batch_size", "3")
    assert result["images"] == 3 and result["nfe"] > 10
    # An untrained network predicts little more than its input's share: a Gaussian of sigma_data has 8.0 bits here.
    assert 5 < result["bits_per_dim"] < 11 and 0 < result["standard_error"] < 1
    stored = json.loads((tmp_path / "likelihood.json").read_text())
    assert stored["bits_per_dim"] == result["bits_per_dim"] and stored["weights"] == "ema:0.9"
    again = score("--batch_size", "2")
    assert again["bits_per_dim"] == pytest.approx(result["bits_per_dim"], abs=1e-5)
    assert again["nfe"] == result["nfe"]


def test_a_likelihood_that_is_not_finite_is_no_number(teachers, data_dir, tmp_path):
    file = next(Path(teachers("edm")).glob("checkpoints/*/ema_0.9_*.pt"))
    weights, extra = load_weights(file)
    save_weights(tmp_path / "nan.pt", {k: torch.full_like(v, torch.nan) for k, v in weights.items()}, extra)
    argv = ["--model_path", str(tmp_path / "nan.pt"), "--data_dir", data_dir, "--num_images", "2"]
    config = parse(LikelihoodConfig, [*argv, "--out_dir", str(tmp_path / "out")])
    refuses(
        "gave up on image 0 of the batch: the slope is not finite at time", lambda: run_likelihood(config)
    )
    assert not (tmp_path / "out").exists()


def test_only_denoisers_have_a_likelihood(teachers, data_dir, tmp_path):
    flags = ["--loss_norm", "l2", "--start_scales", "4", "--class_cond", "False", "--start_ema", "0.9"]
    cd = train(CmTrainConfig, data_dir, tmp_path / "cd", *flags, "--teacher_model_path", teachers("edm"))
    argv = ["--model_path", cd, "--data_dir", data_dir, "--out_dir", str(tmp_path)]
    refuses("a likelihood needs a denoiser", lambda: run_likelihood(parse(LikelihoodConfig, argv)))
    refuses("--model_path", lambda: parse(LikelihoodConfig, ["--data_dir", data_dir]))
    refuses("--probe must be one of", lambda: parse(LikelihoodConfig, [*argv, "--probe", "sobol"]))
