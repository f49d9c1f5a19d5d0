"""The family's systems from flags to results, in one process: columns as teachers, samplers, guidance, likelihood."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cm
from cm.commands.cli import parse, parse_config
from cm.commands.likelihood import run_likelihood
from cm.commands.sample import run_image_sample
from cm.commands.train import run_train
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
from cm.data.images import to_uint8
from cm.diffusion.denoiser import Denoiser
from cm.diffusion.noise_schedules import iddpm_levels
from cm.diffusion.precond import BoundaryPrecond
from cm.errors import UserError
from cm.models.guides import load_guide
from cm.models.pretrained import load_pretrained
from cm.nn import NO_CLASS
from cm.objectives.alpha_sigma import AlphaSigmaObjective, AlphaSigmaProgressive
from cm.storage.checkpoint import complete_checkpoints
from cm.storage.weights import load_weights, save_weights
from cm.training.factory import create_objective
from cm.training.roles import create_roles, load_teacher

ROOT = Path(__file__).parents[2]

MODEL = [
    "--image_size", "8", "--num_channels", "32", "--num_res_blocks", "1", "--channel_mult", "1", "--num_heads", "2",
    "--num_head_channels", "16", "--attention_resolutions", "8",
]  # fmt: skip
TRAIN = [
    "--global_batch_size", "6", "--num_workers", "0", "--log_interval", "1", "--ema_rate", "0.9", "--lr", "1e-3",
    "--total_training_steps", "2", "--save_interval", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return str(folder)


def train(cls, data_dir, out, *extra):
    run_train(parse(cls, [*MODEL, *TRAIN, "--data_dir", data_dir, "--out_dir", str(out), *extra]))
    return str(out)


@pytest.fixture(scope="module")
def teachers(data_dir, tmp_path_factory):
    """One run per column, made when it is asked for."""
    made = {}

    def teacher(column):
        if column not in made:
            out = tmp_path_factory.mktemp(column)
            extra = ["--precond", column, "--class_cond", "False", "--preview_count", "0"]
            made[column] = train(EdmTrainConfig, data_dir, out, *extra)
        return made[column]

    return teacher


@pytest.fixture(scope="module")
def classifier(data_dir, tmp_path_factory):
    return train(ClassifierConfig, data_dir, tmp_path_factory.mktemp("classifier"))


def sample(model, out, *extra, steps=4):
    argv = ["--model_path", model, "--num_samples", "3", "--steps", str(steps), "--out_dir", str(out), *extra]
    run_image_sample(parse(SampleConfig, argv))
    with np.load(next(Path(out).glob("*.npz"))) as arrays:
        images, labels = arrays["arr_0"], arrays.get("arr_1")
    return images, labels, json.loads(next(Path(out).glob("*.json")).read_text())


def refuses(match, run):
    with pytest.raises(UserError, match=match) as error:
        run()
    assert "\n" not in str(error.value)


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


# ---- (alpha, sigma) ----------------------------------------------------------------------------------


def test_diffusion_schedules_train_and_halve(teachers, data_dir, tmp_path):
    config = parse_config(
        EdmTrainConfig, ["--diffusion_schedule", "cosine", "--weight_schedule", "truncated-snr"]
    )
    assert isinstance(create_objective(config), AlphaSigmaObjective)
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
    assert isinstance(create_objective(parse_config(CmTrainConfig, flags)), AlphaSigmaProgressive)
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
