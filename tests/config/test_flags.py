"""Configurations: flags against the golden lists, and their rules."""

import dataclasses
import math
import subprocess
import sys

import pytest

from cm.config import scripts as config_module
from cm.config.flags import ModelFlags
from cm.config.parsing import (
    parse_attention,
    parse_channel_mult,
    parse_classes,
    parse_sigmas,
    parse_ts,
    parse_weights,
)
from cm.config.scripts import SCRIPTS, CmTrainConfig, EdmTrainConfig, SampleConfig, SearchConfig, flags_of
from cm.config.validation import MINIMUM, require_inputs, validate
from cm.errors import UserError
from tests.helpers import golden_data

RUN = [
    "preset",
    "variant",
    "config",
    "dry_run",
    "out_dir",
    "device",
    "precision",
    "deterministic",
    "compile",
    "channels_last",
    "startup_timeout",
    "step_timeout",
]
MODEL = [
    "network",
    "precond",
    "diffusion_schedule",
    "sigma_data",
    "rho",
    "in_channels",
    "num_classes",
    "boundary",
    "c_out_formula",
    "augment_dim",
    "time_scale",
]
TRAIN = [
    "labels",
    "composite",
    "random_crop",
    "random_flip",
    "skip_unreadable",
    "num_workers",
    "lr_schedule",
    "lr_warmup_steps",
    "optimizer",
    "beta1",
    "beta2",
    "adam_eps",
    "grad_clip",
    "ema_warmup",
    "ema_device",
    "shard_optimizer",
    "seed",
    "resume",
    "resume_with_changes",
    "keep_last",
    "keep_every",
    "async_save",
    "on_save_error",
    "max_hours",
    "mirror",
    "max_bad_steps",
    "tensorboard",
    "preview_count",
    "preview_interval",
]
# Every flag that the original does not have
ADDED = {
    "edm_train": [
        *RUN,
        *MODEL,
        *TRAIN,
        *["augment", "p_mean", "p_std", "num_timesteps", "total_training_steps"],
    ],
    "cm_train": [
        *RUN,
        *MODEL,
        *TRAIN,
        *[
            "init",
            "mu_formula",
            "stop_grad",
            "clock",
            "ode_solver",
            "lpips_path",
            "lpips_size",
            "lpips_precision",
        ],
    ],
    "image_sample": [
        *RUN,
        *MODEL,
        *["weights", "classes", "sigmas", "overwrite", "grid_images", "grid_columns"],
        *["time_steps", "noise_schedule", "state_scale", "solver_order", "solver_alpha"],
        *["sde", "predictor", "corrector", "corrector_steps", "snr", "tolerance"],
        *["classifier_path", "classifier_scale", "classifier_width", "classifier_depth", "classifier_pool"],
        *[
            "classifier_attention_resolutions",
            "classifier_use_scale_shift_norm",
            "classifier_resblock_updown",
        ],
        "classifier_noise_schedule",
    ],
    "ternary_search": [
        *RUN,
        *MODEL,
        *["weights", "classes", "points", "coarse", "protocol", "features", "inception_path"],
    ],
}
# The original has no image_edit: its own flags with their defaults
EDIT = {
    "task": "inpaint",
    "input": "",
    "model_path": "",
    "weights": "",
    "training_mode": "consistency_distillation",
    "classes": "",
    "num_results": 1,
    "seed": 42,
    "steps": 40,
    "ts": "",
    "sigmas": "",
    "clip_denoised": True,
    "final_project": True,
    "mask": "center:0.5",
    "factor": 8,
    "sigma_start": 1.0,
    "repeat": 1,
    "sigma": 0.5,
    "noisy_input": False,
    "between": "",
    "frames": 9,
    "frame_ms": 120,
    "animation": "gif",
    "batch_size": 16,
    "resize": False,
    "skip_unreadable": False,
    "overwrite": False,
    "grid_images": 16,
}
# The defaults that differ from the original's on purpose
CHANGED = {
    ("edm_train", "schedule_sampler"): "lognormal",
    ("image_sample", "generator"): "indexed",
    ("ternary_search", "generator"): "indexed",
}


@pytest.mark.parametrize("script", ADDED)
def test_flags_are_the_originals_and_the_declared_additions(script):
    """The list of flags is frozen: names, types and defaults."""
    golden = {row["dest"]: row for row in golden_data.json("cli_defaults")[script]}
    flags = flags_of(SCRIPTS[script])
    assert sorted(flags) == sorted([*golden, *ADDED[script]])
    for name, row in golden.items():
        assert row["flag"] == f"--{name}"
        assert type(flags[name].default).__name__ == row["type"], name
        expected = CHANGED.get((script, name), row["default"])
        assert flags[name].default == (math.inf if expected == "inf" else expected), name


def test_flags_of_image_edit():
    flags = flags_of(SCRIPTS["image_edit"])
    shared = [*RUN, *flags_of(ModelFlags)]
    assert {name: field.default for name, field in flags.items() if name not in shared} == EDIT
    assert set(shared) <= set(flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_explains_itself(script):
    for name, field in flags_of(SCRIPTS[script]).items():
        assert len(field.metadata["help"]) > 5, name
        choices = field.metadata["choices"]
        assert not choices or field.default in choices, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_are_valid_and_frozen(script):
    config = SCRIPTS[script]()
    validate(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.image_size = 32


def test_every_minimum_names_a_flag():
    names = set().union(*(flags_of(cls) for cls in SCRIPTS.values()))
    assert set(MINIMUM) <= names


def test_no_torch():
    """The command line answers --help without torch."""
    code = "import sys, cm.commands.cli, cm.config.presets; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_choices_are_the_registries():
    """What a flag offers is what the library has."""
    from cm.diffusion.noise_levels import SCHEDULE_SAMPLERS
    from cm.diffusion.weightings import WEIGHTINGS
    from cm.networks.architecture import NETWORKS
    from cm.networks.precision import PRECISIONS
    from cm.objectives.consistency import SOLVERS
    from cm.objectives.curricula import MODES
    from cm.objectives.distances import DISTANCES
    from cm.sampling.noise import GENERATORS
    from cm.sampling.registry import SAMPLERS
    from cm.train_util import TRAINING_MODES
    from cm.training.factory import OBJECTIVES
    from cm.training.learning_rate import LEARNING_RATES
    from cm.training.optimizers import OPTIMIZERS

    def choices(cls, name):
        return set(flags_of(cls)[name].metadata["choices"])

    assert choices(CmTrainConfig, "loss_norm") == set(DISTANCES)
    assert choices(CmTrainConfig, "precision") == {"", *PRECISIONS}
    assert choices(CmTrainConfig, "network") == set(NETWORKS)
    assert choices(CmTrainConfig, "ode_solver") == set(SOLVERS)
    assert choices(CmTrainConfig, "optimizer") == set(OPTIMIZERS)
    assert choices(CmTrainConfig, "lr_schedule") == {"", *LEARNING_RATES}
    assert choices(CmTrainConfig, "training_mode") == set(OBJECTIVES) >= set(TRAINING_MODES)
    assert choices(CmTrainConfig, "weight_schedule") == set(WEIGHTINGS)
    assert choices(CmTrainConfig, "target_ema_mode") == {target for target, _ in MODES}
    assert choices(CmTrainConfig, "scale_mode") == {scale for _, scale in MODES}
    assert choices(EdmTrainConfig, "schedule_sampler") == set(SCHEDULE_SAMPLERS)
    assert choices(SampleConfig, "sampler") == set(SAMPLERS)
    assert choices(SampleConfig, "generator") == set(GENERATORS)
    assert choices(SampleConfig, "training_mode") == {"edm", *OBJECTIVES}


BAD = [
    (EdmTrainConfig, {"image_size": 0}, "image_size"),
    (EdmTrainConfig, {"image_size": -64}, "image_size"),
    (EdmTrainConfig, {"image_size": 36}, "channel_mult"),
    (EdmTrainConfig, {"image_size": 36, "channel_mult": "1,2,3,4"}, "image_size 36"),
    (EdmTrainConfig, {"channel_mult": "1,x"}, "channel_mult"),
    (EdmTrainConfig, {"channel_mult": "1,nan"}, "channel_mult"),
    (EdmTrainConfig, {"channel_mult": "1,0"}, "channel_mult"),
    (EdmTrainConfig, {"num_channels": 100}, "num_channels"),
    (EdmTrainConfig, {"num_head_channels": 48}, "num_head_channels"),
    (EdmTrainConfig, {"num_heads": 3}, "num_heads 3"),
    (EdmTrainConfig, {"num_heads_upsample": 5}, "num_heads_upsample"),
    (EdmTrainConfig, {"attention_resolutions": "24"}, "attention_resolutions"),
    (EdmTrainConfig, {"attention_resolutions": "128"}, "attention_resolutions"),
    (EdmTrainConfig, {"attention_resolutions": "4"}, "attention_resolutions"),
    (EdmTrainConfig, {"in_channels": 2}, "in_channels"),
    (EdmTrainConfig, {"sigma_min": 0.0}, "sigma_min"),
    (EdmTrainConfig, {"sigma_min": 90.0}, "sigma_max"),
    (EdmTrainConfig, {"sigma_max": math.inf}, "sigma_max"),
    (EdmTrainConfig, {"lr": -1.0}, "lr"),
    (EdmTrainConfig, {"lr": math.nan}, "lr"),
    (EdmTrainConfig, {"dropout": 1.0}, "dropout"),
    (EdmTrainConfig, {"global_batch_size": 0}, "global_batch_size"),
    (EdmTrainConfig, {"batch_size": 0}, "batch_size"),
    (EdmTrainConfig, {"microbatch": -2}, "microbatch"),
    (EdmTrainConfig, {"save_interval": 0}, "save_interval"),
    (EdmTrainConfig, {"ema_rate": "0.9,oops"}, "ema_rate"),
    (EdmTrainConfig, {"ema_rate": "1.5"}, "ema_rate"),
    (EdmTrainConfig, {"ema_rate": "0.9,0.90"}, "ema_rate"),
    (EdmTrainConfig, {"schedule_sampler": "normal"}, "schedule_sampler"),
    (EdmTrainConfig, {"weight_schedule": "snr2"}, "weight_schedule"),
    (EdmTrainConfig, {"use_fp16": True, "precision": "bf16"}, "precision"),
    (EdmTrainConfig, {"lr_schedule": "late_decay"}, "lr_schedule"),
    (EdmTrainConfig, {"keep_every": 5}, "keep_last"),
    (CmTrainConfig, {"training_mode": "cd"}, "training_mode"),
    (CmTrainConfig, {"loss_norm": "l3"}, "loss_norm"),
    (CmTrainConfig, {"target_ema_mode": "adaptive", "scale_mode": "progressive"}, "start_ema"),
    (CmTrainConfig, {"target_ema_mode": "adaptive", "start_ema": 0.9}, "scale_mode"),
    (CmTrainConfig, {"start_ema": 1.5}, "start_ema"),
    (CmTrainConfig, {"start_scales": 1}, "start_scales"),
    (CmTrainConfig, {"scale_mode": "progressive", "end_scales": 30}, "end_scales"),
    (CmTrainConfig, {"training_mode": "progdist"}, "scale_mode"),
    (CmTrainConfig, {"scale_mode": "progdist"}, "training_mode"),
    (CmTrainConfig, {"training_mode": "progdist", "scale_mode": "progdist"}, "start_scales"),
    (CmTrainConfig, {"total_training_steps": 0}, "total_training_steps"),
    (CmTrainConfig, {"schedule_sampler": "lognormal"}, "schedule_sampler"),
    (SampleConfig, {"num_samples": 0}, "num_samples"),
    (SampleConfig, {"batch_size": -1}, "batch_size"),
    (SampleConfig, {"steps": 0}, "steps"),
    (SampleConfig, {"sampler": "ddim"}, "sampler"),
    (SampleConfig, {"sampler": "multistep"}, "ts"),
    (SampleConfig, {"sampler": "multistep", "ts": "0,5", "sigmas": "80,2"}, "sigmas"),
    (SampleConfig, {"sigmas": "80,2"}, "sampler multistep"),
    (SampleConfig, {"sampler": "multistep", "ts": "5,2,39"}, "ts"),
    (SampleConfig, {"sampler": "multistep", "ts": "0"}, "ts"),
    (SampleConfig, {"sampler": "multistep", "ts": "-1,39"}, "ts"),
    (SampleConfig, {"sampler": "multistep", "ts": "0,22,40", "explicit": frozenset({"steps"})}, "steps 40"),
    (SampleConfig, {"sampler": "multistep", "sigmas": "80,90"}, "sigmas"),
    (SampleConfig, {"weights": "ema:fast"}, "weights"),
    (SampleConfig, {"weights": "best"}, "weights"),
    (SampleConfig, {"classes": "3,-1"}, "classes"),
    (SampleConfig, {"classes": "3,10", "class_cond": True, "num_classes": 10}, "classes"),
    (SearchConfig, {"begin": "9", "end": "9"}, "begin"),
    (SearchConfig, {"end": "40", "explicit": frozenset({"steps"})}, "end"),
    (SearchConfig, {"begin": "-1"}, "begin"),
    (SearchConfig, {"begin": "5,1"}, "begin"),
    (SearchConfig, {"coarse": 20000}, "coarse"),
    (SearchConfig, {"features": "digits.pt"}, "features"),
]


@pytest.mark.parametrize("cls, change, named", BAD, ids=[f"{c.__name__}-{k}" for c, k, _ in BAD])
def test_bad_values_name_the_flag(cls, change, named):
    with pytest.raises(UserError, match=f"--.*{named}") as error:
        validate(cls(**change))
    assert "\n" not in str(error.value)


GOOD = [
    (EdmTrainConfig, {"image_size": 512}),
    (EdmTrainConfig, {"image_size": 16, "channel_mult": "0.5,1", "num_channels": 64}),
    (EdmTrainConfig, {"image_size": 24, "channel_mult": "1,2,2"}),
    (EdmTrainConfig, {"num_channels": 96}),
    (EdmTrainConfig, {"attention_resolutions": ""}),
    (EdmTrainConfig, {"save_interval": -1}),
    (CmTrainConfig, {"training_mode": "progdist", "scale_mode": "progdist", "start_scales": 1024}),
    (SampleConfig, {"sampler": "multistep", "ts": "0,22,22,39"}),
    (SampleConfig, {"sampler": "multistep", "ts": "0,106,200"}),
    (SampleConfig, {"sampler": "multistep", "sigmas": "80,1.4"}),
    (SearchConfig, {"begin": "0,5", "end": "20,39", "points": 2}),
]


@pytest.mark.parametrize("cls, change", GOOD, ids=[str(k) for _, k in GOOD])
def test_good_values_pass(cls, change):
    validate(cls(**change))


def test_inputs_that_only_a_real_run_needs():
    for config, named in [
        (EdmTrainConfig(), "data_dir"),
        (CmTrainConfig(teacher_model_path="t"), "data_dir"),
        (CmTrainConfig(data_dir="d"), "teacher_model_path"),
        (CmTrainConfig(data_dir="d", training_mode="consistency_training", init="teacher"), "init"),
        (SampleConfig(), "model_path"),
        (SearchConfig(model_path="m"), "ref_batch"),
    ]:
        validate(config)
        with pytest.raises(UserError, match=named):
            require_inputs(config)
    require_inputs(CmTrainConfig(data_dir="d", training_mode="consistency_training"))


def test_lists():
    assert parse_channel_mult("", 512) == (0.5, 1, 1, 2, 2, 4, 4)
    assert parse_channel_mult("", 64) == (1, 2, 3, 4)
    assert parse_channel_mult("0.5,1.0", 8) == (0.5, 1)
    assert parse_attention("32,16,8", 64, 4) == (2, 4, 8)
    assert parse_attention("32,16,8", 256, 6) == (8, 16, 32)
    assert parse_attention("32,16,8", 16, 3) == (1, 2)  # the default names what the network has
    assert parse_attention("16", 16, 1) == (1,)
    assert parse_ts("0,22,39", 40) == (0, 22, 39)
    assert parse_sigmas("80,1.5", 0.002, 80.0) == (80.0, 1.5)
    assert parse_classes("3,7", 10) == (3, 7)
    assert parse_weights("ema:0.999") == ("ema", 0.999)
    assert parse_weights("raw") == ("raw", 0.0)


def test_scripts_registry_is_complete():
    classes = [
        c for c in vars(config_module).values() if isinstance(c, type) and c.__name__.endswith("Config")
    ]
    assert set(SCRIPTS.values()) == set(classes)
