"""Presets against the published command lines, the paper's tables and the facts about each experiment."""

import math
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from cm.commands.cli import parse_config
from cm.config import presets
from cm.config.derived import is_consistency, with_two_steps
from cm.config.parsing import parse_ts
from cm.config.presets import __main__ as listing
from cm.config.presets import released
from cm.config.scripts import SCRIPTS, CmTrainConfig, EditConfig, EdmTrainConfig, SampleConfig, resolved
from cm.diffusion.grid import karras_sigmas
from cm.errors import UserError
from cm.objectives.curricula import progdist_steps
from tests.helpers import golden_data

LAUNCH = Path(__file__).parents[2] / "scripts" / "launch.sh"
PATHS = ("data_dir", "teacher_model_path", "model_path", "ref_batch")
# What a short form says beyond the published line: its own name, and when training ends.
BEYOND = (*PATHS, "preset")


def launch_commands() -> list[tuple[str, list[str]]]:
    """(script, arguments) of every command in launch.sh."""
    text = LAUNCH.read_text().replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("mpiexec")]
    return [(Path(words[4]).stem, words[5:]) for words in lines]


def without_paths(argv: list[str]) -> list[str]:
    pairs = zip(argv[::2], argv[1::2])
    return [word for flag, text in pairs if flag.removeprefix("--") not in PATHS for word in (flag, text)]


def meaning(script: str, argv: list[str]) -> dict:
    values = resolved(parse_config(SCRIPTS[script], argv))
    if "training_mode" in values:
        # Either name of consistency training gives a sampler the same scalings; published lines mix them.
        values["training_mode"] = is_consistency(values["training_mode"]) or values["training_mode"]
    if values.get("sampler") == "onestep":
        del values["ts"], values["steps"]  # of no effect
    if script == "edm_train":
        del values["total_training_steps"]  # published lines never end
    return {name: value for name, value in values.items() if name not in BEYOND}


def test_launch_holds_every_published_command():
    ours = [(script, without_paths(argv)) for script, argv in launch_commands() if "--preset" not in argv]
    published = [(c["script"], without_paths(c["argv"])) for c in golden_data.json("launch_commands")]
    assert sorted(ours) == sorted(published)


def test_release_presets_equal_the_published_commands_flag_by_flag():
    """In launch.sh each long form is followed by its short form."""
    commands = launch_commands()
    pairs = [(a, b) for a, b in pairwise(commands) if "--preset" not in a[1]]
    assert len(pairs) == 23
    for (script, long), (short_script, short) in pairs:
        assert short_script == script and "--preset" in short
        if script == "cm_train":
            assert (
                long[long.index("--teacher_model_path") + 1] == short[short.index("--teacher_model_path") + 1]
            )
        assert meaning(script, short) == meaning(script, long), short


def test_launch_has_every_experiment_on_imagenet_and_lsun():
    named = {(script, argv[1]) for script, argv in launch_commands() if argv[0] == "--preset"}
    for name, preset in released.PRESETS.items():
        assert (preset.training_script, name) in named


@pytest.mark.parametrize("variant", ["release", "paper"])
@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_is_valid(name, variant):
    preset = presets.get(name)
    for script in preset.scripts:
        config = parse_config(SCRIPTS[script], ["--preset", name, "--variant", variant])
        assert config.preset == name
        if isinstance(config, SampleConfig) and config.ts:
            assert parse_ts(config.ts, config.steps)[-1] == config.steps - 1
            parse_config(SampleConfig, ["--preset", name, "--sampler", "multistep"])


def test_names():
    expected = {
        f"{d}_{m}"
        for d in ("imagenet64", "bedroom256", "cat256")
        for m in ("edm", "cd_l2", "cd_lpips", "ct", "pd_l2", "pd_lpips")
    }
    expected |= {
        f"cifar10_{m}" for m in ("edm", "cd_l1", "cd_l2", "cd_lpips", "ct", "ct_fixed", "pd_l2", "pd_lpips")
    }
    expected |= {f"{d}_{m}" for d in ("digits", "digits16") for m in ("edm", "cd", "ct", "pd")} | {"tiny"}
    assert set(presets.PRESETS) >= expected


def train(name: str, variant: str = "paper"):
    script = presets.get(name).training_script
    return parse_config(SCRIPTS[script], ["--preset", name, "--variant", variant])


# Table 3 of the paper: preset -> lr, batch, mu or mu0, N or (s0, s1), iterations, fp16, EMA rate to six digits
TABLE_3 = {
    "cifar10_cd_lpips": (4e-4, 512, 0.0, 18, 800000, False, 0.9999),
    "cifar10_ct": (4e-4, 512, 0.9, (2, 150), 800000, False, 0.9999),
    "imagenet64_cd_lpips": (8e-6, 2048, 0.95, 40, 600000, True, 0.999943),
    "imagenet64_ct": (8e-6, 2048, 0.95, (2, 200), 800000, True, 0.999943),
    "bedroom256_cd_lpips": (1e-5, 2048, 0.95, 40, 600000, True, 0.999943),
    "bedroom256_ct": (1e-5, 2048, 0.95, (2, 150), 1000000, True, 0.999943),
    "cat256_cd_l2": (1e-5, 2048, 0.95, 40, 600000, True, 0.999943),
    "cat256_ct": (1e-5, 2048, 0.95, (2, 150), 1000000, True, 0.999943),
}


@pytest.mark.parametrize("name", TABLE_3)
def test_paper_variant_is_table_3(name):
    lr, batch, mu, grid, steps, fp16, rate = TABLE_3[name]
    c = train(name)
    assert (c.lr, c.global_batch_size, c.start_ema, c.total_training_steps) == (lr, batch, mu, steps)
    assert (c.use_fp16, c.dropout, round(float(c.ema_rate), 6)) == (fp16, 0.0, rate)
    assert c.ode_solver == "heun" and c.weight_schedule == "uniform"
    if isinstance(grid, tuple):
        assert (c.training_mode, c.scale_mode, c.target_ema_mode) == (
            "consistency_training",
            "progressive",
            "adaptive",
        )
        assert (c.start_scales, c.end_scales, c.init, c.mu_formula) == (*grid, "random", "paper")
    else:
        assert (c.training_mode, c.scale_mode, c.target_ema_mode, c.start_scales) == (
            "consistency_distillation",
            "fixed",
            "fixed",
            grid,
        )


def test_release_differs_from_the_paper_where_the_command_lines_do():
    for name, lr, batch in [
        ("imagenet64_ct", 1e-4, 2048),
        ("bedroom256_ct", 5e-5, 256),
        ("bedroom256_cd_l2", 1e-5, 256),
    ]:
        c = train(name, "release")
        assert (c.lr, c.global_batch_size, c.init, c.mu_formula) == (lr, batch, "auto", "code")
    assert train("bedroom256_cd_l2", "release").ema_rate == "0.9999,0.99994,0.9999432189950708"


def test_teachers():
    for name, batch, steps in [("bedroom256_edm", 2048, 600000), ("cat256_edm", 2048, 300000)]:
        c = train(name)
        assert (c.global_batch_size, c.total_training_steps, c.dropout) == (batch, steps, 0.1)
        assert train(name, "release").global_batch_size == 256
    imagenet = train("imagenet64_edm")
    assert (imagenet.global_batch_size, imagenet.lr, imagenet.weight_schedule) == (4096, 1e-4, "karras")
    assert float(imagenet.ema_rate.split(",")[-1]) == pytest.approx(0.5 ** (4096 / 50e6), rel=1e-12)
    cifar = train("cifar10_edm")
    assert float(cifar.ema_rate) == pytest.approx(0.5 ** (512 / 0.5e6), rel=1e-12)
    assert (cifar.optimizer, cifar.lr, cifar.dropout, cifar.seed) == ("adam", 1e-3, 0.13, 42)
    assert (cifar.lr_warmup_steps, cifar.total_training_steps) == (int(1e7 / 512), 400000)
    assert all(c.schedule_sampler == "lognormal" for c in (imagenet, cifar))


def test_cifar10_runs():
    assert train("cifar10_cd_l1").lr == 2e-4 and train("cifar10_cd_l2").loss_norm == "l2"
    fixed = train("cifar10_ct_fixed")
    assert (fixed.start_scales, fixed.start_ema, fixed.lr, fixed.scale_mode) == (120, 0.99, 4e-4, "fixed")
    pd = train("cifar10_pd_l2")
    assert (pd.start_scales, pd.distill_steps_per_iter, pd.lr, pd.lr_schedule) == (
        4096,
        50000,
        5e-5,
        "linear",
    )
    assert (pd.optimizer, pd.grad_clip, pd.weight_schedule, pd.ema_rate) == (
        "adam",
        1.0,
        "truncated-snr",
        "0",
    )
    # Eleven stages of 50 000 steps, and twice as many for each of the last two
    assert pd.total_training_steps == progdist_steps(4096, 50000) == 11 * 50000 + 2 * 100000
    continuous = {
        "cd_l2": ("distillation", "l2", False, 1e-3, 400000),
        "cd_l2_stopgrad": ("distillation", "l2", True, 5e-6, 400000),
        "cd_lpips_stopgrad": ("distillation", "lpips-max", True, 5e-6, 400000),
        "ct_l2": ("training", "l2", True, 5e-6, 800000),
        "ct_lpips": ("training", "lpips-max", True, 5e-6, 400000),
    }
    for name, (kind, norm, stop_grad, lr, steps) in continuous.items():
        c = train(f"cifar10_cont_{name}")
        assert (c.training_mode, c.loss_norm, c.stop_grad) == (f"continuous_{kind}", norm, stop_grad)
        assert (c.lr, c.total_training_steps, c.dropout, c.init) == (lr, steps, 0.3, "teacher")
        assert (c.optimizer, c.ema_rate, c.weight_schedule) == ("radam", "0.9999", "uniform")
    sample = parse_config(SampleConfig, ["--preset", "cifar10_cd_lpips"])
    assert (sample.ts, sample.steps) == ("0,11,17", 18)


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("cifar10_ict", 0.821),
        ("cifar10_ect", 0.821),
        ("cifar10_tcm2", 1.0),
        ("cifar10_sct", 0.98238),
        ("cifar10_scd", 0.98238),
        ("imagenet64_ict", 1.526),
        ("imagenet64_ecm_s", 1.526),
        ("imagenet64_tcm2_s", 1.526),
        ("imagenet64_sct_s", 0.98238),
    ],
)
def test_second_levels_of_the_later_methods(name, second):
    """Those of the papers; sCM's is t = 1.1. A run of a preset takes them by itself."""
    c = parse_config(SampleConfig, ["--preset", name, "--sampler", "multistep"])
    assert [float(level) for level in c.sigmas.split(",")] == [80, second]
    assert second >= getattr(c, "transition_t", 0)
    own = SampleConfig(sampler="multistep", training_mode=c.training_mode)
    assert with_two_steps(own, {"preset": name}).sigmas == c.sigmas
    assert not name.startswith("cifar10_s") or second == pytest.approx(0.5 * math.tan(1.1), abs=1e-5)


def test_ict_on_imagenet():
    """The network of the released models but for norms and dropout; the second level of the paper."""
    for name, depth, fids in (("imagenet64_ict", 3, (4.02, 3.20)), ("imagenet64_ict_deep", 6, (3.25, 2.77))):
        c = train(name)
        assert (c.num_res_blocks, c.use_scale_shift_norm, c.dropout, c.dropout_resolutions) == (
            depth,
            False,
            0.2,
            "16,8",
        )
        assert (c.global_batch_size, c.ema_rate, c.optimizer, c.lr) == (4096, "0.99997", "radam", 1e-4)
        assert (c.start_scales, c.end_scales, c.total_training_steps, c.start_ema) == (10, 1280, 800000, 0)
        assert tuple(r.fid for r in presets.get(name).results) == fids
        assert parse_config(SampleConfig, ["--preset", name]).sigmas == "80,1.526"


def test_two_step_points():
    for name, ts, steps, sigma in [
        ("cifar10_cd_l2", "0,11,17", 18, 0.5853481),
        ("imagenet64_cd_lpips", "0,22,39", 40, 1.3823680),
        ("imagenet64_ct", "0,106,200", 201, 1.9128436),
        ("bedroom256_cd_lpips", "0,17,39", 40, 4.3655617),
        ("bedroom256_cd_l2", "0,18,39", 40, 3.5196988),
        ("bedroom256_ct", "0,67,150", 151, 3.9912186),
        ("cat256_ct", "0,62,150", 151, 5.2485032),
    ]:
        c = parse_config(SampleConfig, ["--preset", name])
        assert (c.ts, c.steps) == (ts, steps)
        point = parse_ts(c.ts, c.steps)[1]
        assert float(karras_sigmas(steps, c.sigma_min, c.sigma_max, c.rho)[point]) == pytest.approx(
            sigma, rel=1e-6
        )


def test_consistency_models_can_be_edited_with():
    """image_edit knows the grid and the objective of exactly the presets that are consistency models."""
    for name, preset in presets.PRESETS.items():
        mode = preset.scripts.get("cm_train", {}).get("training_mode", "edm")
        editable = "image_edit" in preset.scripts
        assert editable == is_consistency(mode), name
        if editable:
            c = parse_config(EditConfig, ["--preset", name])
            sample = parse_config(SampleConfig, ["--preset", name])
            assert (c.training_mode, c.steps, c.image_size) == (mode, sample.steps, sample.image_size), name


def test_published_results():
    """Tables 1 and 2 of the paper."""
    rows = {
        (n, r.nfe): (r.fid, r.inception_score or r.precision, r.recall)
        for n, p in presets.PRESETS.items()
        for r in p.results
    }
    assert rows["cifar10_cd_lpips", 1] == (3.55, 9.48, None) and rows["cifar10_cd_lpips", 2] == (
        2.93,
        9.75,
        None,
    )
    assert rows["cifar10_ct", 1] == (8.70, 8.49, None) and rows["cifar10_ct", 2] == (5.83, 8.85, None)
    assert rows["cifar10_pd_l2", 1] == (8.34, 8.69, None) and rows["cifar10_edm", 35] == (2.04, 9.84, None)
    assert rows["imagenet64_cd_lpips", 1] == (6.20, 0.68, 0.63) and rows["imagenet64_ct", 2] == (
        11.1,
        0.69,
        0.56,
    )
    assert rows["imagenet64_edm", 79] == (2.44, 0.71, 0.67) and rows["imagenet64_pd_l2", 2] == (
        8.95,
        0.63,
        0.65,
    )
    assert rows["bedroom256_cd_lpips", 2] == (5.22, 0.68, 0.39) and rows["bedroom256_ct", 1] == (
        16.0,
        0.60,
        0.17,
    )
    assert rows["bedroom256_pd_l2", 1] == (16.92, 0.47, 0.27) and rows["bedroom256_edm", 79] == (
        3.57,
        0.66,
        0.45,
    )
    assert rows["cat256_cd_lpips", 1] == (11.0, 0.65, 0.36) and rows["cat256_ct", 2] == (11.7, 0.63, 0.36)
    assert rows["cat256_edm", 79] == (6.69, 0.70, 0.43) and rows["cat256_pd_l2", 2] == (15.5, 0.59, 0.36)
    assert all(r.source for p in presets.PRESETS.values() for r in p.results)


@pytest.mark.parametrize(
    "name, parameters",
    [("imagenet64_cd_l2", 295_899_267), ("cat256_ct", 526_304_771), ("cifar10_ct", 56_395_523)],
)
def test_networks_have_the_published_size(name, parameters):
    import torch

    from cm.models.factory import create_network

    with torch.device("meta"):
        network = create_network(train(name))
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_digits():
    edm, cd = train("digits_edm"), train("digits_cd")
    for c in (edm, cd):
        assert (c.image_size, c.num_channels, c.channel_mult, c.attention_resolutions) == (8, 32, "1,1", "4")
        assert (c.in_channels, c.num_classes, c.global_batch_size, c.lr_schedule) == (1, 10, 64, "late_decay")
        assert c.ema_warmup and not c.random_flip and c.class_cond
    assert (edm.total_training_steps, edm.lr, edm.ema_rate) == (1500, 2e-3, "0.99")
    assert (cd.total_training_steps, cd.lr, cd.ema_rate, cd.start_scales, cd.start_ema) == (
        500,
        1e-3,
        "0.98",
        18,
        0.9,
    )
    teacher = train("digits_cont_edm")
    for method, mode, stop_grad in (
        ("cd", "continuous_distillation", False),
        ("ct", "continuous_training", True),
    ):
        c = train(f"digits_cont_{method}")
        assert (c.training_mode, c.init, c.stop_grad, c.image_size) == (mode, "teacher", stop_grad, 8)
        assert c.time_scale == teacher.time_scale == 4
    for size in ("digits", "digits16"):
        pd = train(f"{size}_pd")
        assert pd.total_training_steps == progdist_steps(pd.start_scales, pd.distill_steps_per_iter)


def test_errors():
    with pytest.raises(UserError, match="imagenet64_cd_lpips"):
        presets.get("imagenet64_cd_lpip")
    with pytest.raises(UserError, match="edm_train"):
        presets.values("digits_edm", "release", "cm_train")
    assert isinstance(train("tiny"), EdmTrainConfig)
    assert isinstance(parse_config(CmTrainConfig, ["--preset", "tiny"]), CmTrainConfig)


def test_the_list_has_three_columns(capsys):
    listing.main()
    head, *rows = capsys.readouterr().out.splitlines()
    scripts, results = head.index("scripts"), head.index("published results")
    assert len(rows) == len(presets.PRESETS)
    for row, (name, preset) in zip(rows, presets.PRESETS.items()):
        assert row[:scripts].strip() == name
        assert row[scripts:results].strip() == ", ".join(preset.scripts)
        assert row[results:].count("FID") == len(preset.results)
