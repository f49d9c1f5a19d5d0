"""Configurations: flags against the golden lists, and their rules."""

import dataclasses
import math
import subprocess
import sys

import pytest

from cm.config.fields import flags_of, meta_of
from cm.config.parsing import (
    parse_attention,
    parse_channel_mult,
    parse_classes,
    parse_sigmas,
    parse_ts,
    parse_weights,
)
from cm.config.scripts import (
    SCRIPTS,
    CmTrainConfig,
    EdmTrainConfig,
    SampleConfig,
    SearchConfig,
    configuration_class,
    configure,
)
from cm.config.validation import require_inputs, validate
from cm.errors import UserError
from tests.helpers import golden_data

# The defaults that differ from the original's on purpose
CHANGED = {
    ("edm_train", "schedule_sampler"): "lognormal",
    ("image_sample", "generator"): "indexed",
    ("ternary_search", "generator"): "indexed",
}


@pytest.mark.parametrize("script", ["edm_train", "cm_train", "image_sample", "ternary_search"])
def test_flags_of_the_original_keep_their_names_types_and_defaults(script):
    flags = flags_of(configuration_class(SCRIPTS[script], {}))
    for row in golden_data.json("cli_defaults")[script]:
        name = row["dest"]
        assert row["flag"] == f"--{name}"
        assert type(flags[name].default).__name__ == row["type"], name
        expected = CHANGED.get((script, name), row["default"])
        assert flags[name].default == (math.inf if expected == "inf" else expected), name


def test_the_command_lines_stay_small():
    """However many methods come: their options are flags only where they are chosen."""
    classes = {script: configuration_class(cls, {}) for script, cls in SCRIPTS.items()}
    assert len(set().union(*(flags_of(cls) for cls in classes.values()))) <= 150
    for script, cls in classes.items():
        main = [name for name, f in flags_of(cls).items() if meta_of(f).main]
        assert 15 <= len(main) <= 35, script


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_explains_itself(script):
    for name, field in flags_of(configuration_class(SCRIPTS[script], {})).items():
        meta = meta_of(field)
        assert len(meta.help) > 5, name
        assert not meta.names or field.default in meta.names, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_are_valid_and_frozen(script):
    config = configure(SCRIPTS[script])
    validate(config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.image_size = 32


def test_what_the_data_and_the_model_decide_may_be_left_open():
    validate(configure(EdmTrainConfig, image_size=0))
    validate(configure(SampleConfig, sampler="multistep"))


def test_classes_by_name():
    names = ("t-shirt", "Bag", "7")
    assert parse_classes("bag,t-shirt, 1", 3, names) == (1, 0, 1)
    assert parse_classes("7", 3, names) == (2,)  # no label: a name
    assert parse_classes("bag,2") == ("bag", 2)  # not known yet
    with pytest.raises(
        UserError, match=r"no class is called so; did you mean t-shirt.*there are t-shirt, Bag, 7"
    ):
        parse_classes("tshirt", 3, names)
    with pytest.raises(UserError, match=r"labels 0\.\.2"):
        parse_classes("bag", 3, ())


def test_no_torch():
    """The command line answers --help without torch."""
    code = "import sys, cm.commands.cli, cm.config.presets; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


BAD = [
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
        validate(configure(cls, **change))
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
    validate(configure(cls, **change))


def test_inputs_that_only_a_real_run_needs():
    for config, named in [
        (configure(EdmTrainConfig), "data_dir"),
        (configure(CmTrainConfig, teacher_model_path="t"), "data_dir"),
        (configure(CmTrainConfig, data_dir="d"), "teacher_model_path"),
        (
            configure(CmTrainConfig, data_dir="d", training_mode="consistency_training", init="teacher"),
            "init",
        ),
        (configure(SampleConfig), "model_path"),
        (configure(SearchConfig, model_path="m"), "ref_batch"),
    ]:
        validate(config)
        with pytest.raises(UserError, match=named):
            require_inputs(config)
    require_inputs(configure(CmTrainConfig, data_dir="d", training_mode="consistency_training"))


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
