"""The family's systems from flags to results, in one process: columns as teachers, samplers, guidance, likelihood."""

import json
import math
import re
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cm import logger
from cm.alpha_sigma import VARIANCE_PRESERVING
from cm.checkpoint import complete_checkpoints
from cm.cli import parse, parse_config
from cm.columns import COLUMNS
from cm.config import (
    SCRIPTS,
    ClassifierConfig,
    CmTrainConfig,
    EdmTrainConfig,
    LikelihoodConfig,
    SampleConfig,
    flags_of,
)
from cm.derived import adopt_teacher, stored_config
from cm.errors import UserError
from cm.factory import NOISE_SAMPLERS, create_noise_sampler, create_objective, create_precond
from cm.likelihood import PROBES
from cm.likelihood_run import run_likelihood
from cm.noise_schedules import NOISE_SCHEDULES, STATE_SCALES, TIME_STEPS, VPSchedule, iddpm_levels
from cm.objectives import AlphaSigmaObjective, AlphaSigmaProgressive
from cm.precond import PRECONDS, BoundaryPrecond, ConsistencyPrecond, IDDPMPrecond, VEPrecond, VPPrecond
from cm.pretrained import load_classifier, load_pretrained
from cm.sample_run import noise_levels, run_image_sample
from cm.samplers import SAMPLERS
from cm.samplers.pc import CORRECTORS, PREDICTORS
from cm.sde import SDES
from cm.train_run import run_train
from cm.validation import SOLVER_FLAGS, require_inputs

ROOT = Path(__file__).parents[1]

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


@pytest.fixture(autouse=True)
def quiet():
    yield
    logger.reset()


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


def test_a_column_brings_its_noise_and_weighting_unless_they_are_given():
    vp = parse_config(EdmTrainConfig, ["--precond", "vp"])
    assert (vp.schedule_sampler, vp.weight_schedule, vp.sigma_max) == ("vp", "snr", 80.0)
    ve = parse_config(EdmTrainConfig, ["--precond", "ve", "--weight_schedule", "karras", "--sigma_max", "50"])
    assert (ve.schedule_sampler, ve.weight_schedule) == ("ve", "karras")
    assert (ve.sigma_min, ve.sigma_max) == (0.02, 50.0)
    # A flag beats the column, the column the preset that it was added to.
    digits = parse_config(EdmTrainConfig, ["--preset", "digits_edm", "--precond", "vp"])
    assert (digits.schedule_sampler, digits.weight_schedule, digits.lr) == ("vp", "snr", 2e-3)
    assert parse_config(CmTrainConfig, ["--precond", "ve"]).weight_schedule == "karras"


def test_spans_of_the_columns():
    low, high = VPSchedule().sigma(torch.tensor([1e-5, 1.0], dtype=torch.float64)).tolist()
    assert COLUMNS["vp"].span == (pytest.approx(low, rel=1e-3), pytest.approx(high, rel=1e-4))
    u = iddpm_levels()
    assert COLUMNS["iddpm"].span == (
        pytest.approx(u[-1].item(), rel=5e-3),
        pytest.approx(u[0].item(), rel=1e-5),
    )
    refuses(
        "--sigma_max 80.0 leave .* --precond iddpm",
        lambda: parse_config(SampleConfig, ["--precond", "iddpm"]),
    )
    refuses(
        "--boundary piecewise",
        lambda: parse_config(CmTrainConfig, ["--precond", "vp", "--boundary", "piecewise"]),
    )
    refuses("--precond must be one of", lambda: parse_config(EdmTrainConfig, ["--precond", "ddpm"]))


def test_the_factory_builds_the_columns():
    vp = EdmTrainConfig(precond="vp", schedule_sampler="vp")
    assert isinstance(create_precond(vp, consistency=False), VPPrecond)
    assert isinstance(create_precond(EdmTrainConfig(precond="iddpm"), consistency=False), IDDPMPrecond)
    ve = [
        create_precond(EdmTrainConfig(precond="ve", network=n), consistency=False) for n in ("adm", "ncsnpp")
    ]
    assert ve == [VEPrecond(250.0), VEPrecond(1.0)]
    student = create_precond(CmTrainConfig(precond="vp"), consistency=True)
    assert student == BoundaryPrecond(VPPrecond(), ConsistencyPrecond())
    for name in ("vp", "ve", "iddpm"):
        assert hasattr(create_noise_sampler(EdmTrainConfig(schedule_sampler=name)), "level")


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
    refuses("leave the noise levels that the teacher .* 0.02 to 100.0", distill("ve", "--sigma_max", "80"))
    refuses("leave the noise levels of --precond iddpm", distill("iddpm"))
    # What is known of the teacher decides; a bare state dict leaves it to the flags.
    config = CmTrainConfig(precond="vp", explicit=frozenset({"precond"}))
    assert adopt_teacher(config, None, "x.pt") is config
    stored = stored_config(EdmTrainConfig())
    del stored["precond"]
    assert adopt_teacher(CmTrainConfig(), stored, "old").precond == "edm"


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


def test_levels_of_the_samplers():
    def levels(*flags):
        return noise_levels(parse_config(SampleConfig, ["--steps", "5", "--sampler", *flags])).tolist()

    ve = levels("pc", "--sde", "ve")
    ratios = [a / b for a, b in pairwise(ve[:-1])]
    assert ve[0] == pytest.approx(80) and ve[-1] == 0 and ratios == pytest.approx([ratios[0]] * 4)
    vp = levels("euler", "--time_steps", "vp")
    assert vp[0] == pytest.approx(80) and vp[-2:] == [pytest.approx(0.002), 0]
    assert levels("heun") != vp
    cosine = levels("progdist", "--training_mode", "progdist", "--diffusion_schedule", "cosine")
    low, high = (2 / math.pi * math.atan(s) for s in (0.002, 80))
    expected = [math.tan(math.pi / 2 * (low + (high - low) * i / 5)) for i in range(5, -1, -1)]
    assert cosine == pytest.approx([*expected, 0], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--sampler pc --predictor heun", "--predictor must be one of reverse_diffusion"),
        ("--sampler pc --corrector mala", "--corrector must be one of langevin"),
        ("--sampler pc --sde vpp", "--sde must be one of ve"),
        ("--sampler heun --predictor ancestral", "--predictor is for --sampler pc, not for heun"),
        ("--sampler pc --time_steps vp", "--time_steps is for"),
        ("--sampler general --time_steps ddpm", "--time_steps must be one of"),
        ("--sampler general --solver_order 3", "--solver_order must be 1 or 2"),
        ("--sampler general --solver_alpha 0", "--solver_alpha must be positive"),
        ("--sampler rk45 --tolerance 0", "--tolerance must be positive"),
        ("--classifier_scale 2", "--classifier_scale 2.0 needs --classifier_path"),
        ("--sampler onestep --classifier_path x", "--classifier_path is for --sampler heun"),
    ],
)
def test_bad_sampler_flags(flags, match):
    refuses(match, lambda: parse_config(SampleConfig, flags.split()))


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
    options = ["--classes", "1,0", "--classifier_path", classifier]
    for sampler in ("ancestral", "euler", "heun"):
        runs = [
            sample(
                teachers("edm"),
                tmp_path / f"{sampler}{scale}",
                "--sampler",
                sampler,
                *options,
                "--classifier_scale",
                scale,
            )
            for scale in ("0", "10000")
        ]
        (free, labels, _), (pulled, _, meta) = runs
        assert labels.tolist() == [1, 0, 1] and meta["classifier_path"].endswith(".pt")
        assert np.abs(free.astype(int) - pulled).max() > 2, sampler


def test_classifiers_that_do_not_fit(classifier, teachers, data_dir, tmp_path):
    def load(**changes):
        wanted = {"image_size": 8, "channels": 1, "num_classes": 0, "device": torch.device("cpu"), **changes}
        return lambda: load_classifier(classifier, **wanted)

    assert load(num_classes=2)().num_classes == 2
    refuses("--classifier_path .* has --image_size 8, the model 16", load(image_size=16))
    refuses("--classifier_path .* has --in_channels 1, the model 3", load(channels=3))
    refuses("--classifier_path .* has --num_classes 2, the model 10", load(num_classes=10))
    refuses(
        "--classifier_path .* is no classifier",
        lambda: load_classifier(
            teachers("edm"), image_size=8, channels=1, num_classes=0, device=torch.device("cpu")
        ),
    )
    refuses("is a classifier, which draws no images", lambda: sample(classifier, tmp_path / "s"))
    options = ["--classes", "5", "--classifier_path", classifier]
    refuses("--classes", lambda: sample(teachers("edm"), tmp_path / "t", *options))
    refuses(
        "--class_cond False: a classifier learns",
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


@pytest.mark.parametrize(
    ("cls", "flags", "match"),
    [
        (
            EdmTrainConfig,
            "--diffusion_schedule cosine --schedule_sampler uniform",
            "--schedule_sampler uniform",
        ),
        (CmTrainConfig, "--diffusion_schedule cosine", "--diffusion_schedule cosine is for"),
        (EdmTrainConfig, "--diffusion_schedule quadratic", "--diffusion_schedule must be one of"),
    ],
)
def test_bad_schedules(cls, flags, match):
    refuses(match, lambda: parse_config(cls, flags.split()))


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
    # Other batches share other steps of the solver, to its tolerance.
    assert score("--batch_size", "2")["bits_per_dim"] == pytest.approx(result["bits_per_dim"], abs=0.05)


def test_only_denoisers_have_a_likelihood(teachers, data_dir, tmp_path):
    flags = ["--loss_norm", "l2", "--start_scales", "4", "--class_cond", "False", "--start_ema", "0.9"]
    cd = train(CmTrainConfig, data_dir, tmp_path / "cd", *flags, "--teacher_model_path", teachers("edm"))
    argv = ["--model_path", cd, "--data_dir", data_dir, "--out_dir", str(tmp_path)]
    refuses("a likelihood needs a denoiser", lambda: run_likelihood(parse(LikelihoodConfig, argv)))
    refuses("--model_path", lambda: parse(LikelihoodConfig, ["--data_dir", data_dir]))
    refuses("--probe must be one of", lambda: parse(LikelihoodConfig, [*argv, "--probe", "sobol"]))


# ---- registries ------------------------------------------------------------------------------------


def test_choices_are_the_registries():
    def choices(cls, name):
        return set(flags_of(cls)[name].metadata["choices"]) - {""}

    assert choices(SampleConfig, "precond") == set(PRECONDS) == set(COLUMNS)
    assert choices(SampleConfig, "diffusion_schedule") == {*VARIANCE_PRESERVING, "ve"}
    assert choices(SampleConfig, "time_steps") == set(TIME_STEPS)
    assert choices(SampleConfig, "noise_schedule") == set(NOISE_SCHEDULES)
    assert choices(SampleConfig, "state_scale") == set(STATE_SCALES)
    assert choices(SampleConfig, "sde") == set(SDES)
    assert choices(SampleConfig, "predictor") == set(PREDICTORS)
    assert choices(SampleConfig, "corrector") == set(CORRECTORS)
    assert choices(LikelihoodConfig, "probe") == set(PROBES)
    assert choices(EdmTrainConfig, "schedule_sampler") == set(NOISE_SAMPLERS)
    assert set(SOLVER_FLAGS) <= set(flags_of(SampleConfig))
    assert {sampler for samplers in SOLVER_FLAGS.values() for sampler in samplers} <= set(SAMPLERS)


# ---- docs/systems.md ---------------------------------------------------------------------------------


def documented_lines():
    """(script, arguments) of every command in the document, with its abbreviations written out."""
    text = (ROOT / "docs" / "systems.md").read_text()
    text = text.replace("\\\n", " ").replace("$RUN", "run").replace("$DATA", "data")
    for script, rest in re.findall(r"python scripts/(\w+)\.py ([^`\n]*)", text):
        if script in SCRIPTS:
            training = script.endswith("_train")
            yield (
                script,
                shlex.split(rest.replace("...", "--data_dir d --out_dir o" if training else "--out_dir o")),
            )


@pytest.mark.parametrize(
    ("script", "argv"), list(documented_lines()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_documented_lines_are_valid(script, argv):
    task = ["--task", argv.pop(0)] if script == "image_edit" else []
    config = parse_config(SCRIPTS[script], [*task, *argv])
    if not config.dry_run:
        require_inputs(config)


def test_every_row_names_tests_that_exist():
    rows = [
        line
        for line in (ROOT / "docs" / "systems.md").read_text().splitlines()
        if re.match(r"\| A\d+ \|", line)
    ]
    assert [re.match(r"\| (A\d+)", row)[1] for row in rows] == [f"A{i}" for i in range(1, 25)]
    for row in rows:
        for part in re.split("; ", row.split("|")[-2].strip()):
            files, _, names = part.partition(":")
            for file in files.split(","):
                path = ROOT / "tests" / f"{file.strip()}.py"
                assert path.exists(), path
            for name in filter(None, (n.strip() for n in names.split(","))):
                # What follows a named test may be further files.
                found = (ROOT / "tests" / f"{name}.py").exists() or f"def test_{name}" in path.read_text()
                assert found, (path, name)
