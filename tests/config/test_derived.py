"""What follows from a configuration: resolved flags, run directories, what a model file fills in."""

import dataclasses

import pytest

from cm.commands.cli import parse_config
from cm.config.derived import (
    channels_last,
    global_batch,
    init_source,
    lr_decay,
    precision,
    run_dir,
    stop_step,
    stored_config,
)
from cm.config.inherit import inherit
from cm.config.scripts import (
    CmTrainConfig,
    EdmTrainConfig,
    SampleConfig,
    SearchConfig,
    config_hash,
    flags_of,
    resolved,
    result_flags,
)
from cm.errors import UserError


def test_resolved_is_plain_json_with_every_flag():
    values = resolved(SampleConfig())
    assert set(values) == set(flags_of(SampleConfig))
    assert values["s_tmax"] == "inf"


def test_hash_sees_what_changes_the_result():
    base = EdmTrainConfig()
    same = dataclasses.replace(base, num_workers=0, log_interval=1, out_dir="x", dry_run=True, max_hours=2.0)
    assert config_hash(same) == config_hash(base)
    assert len(config_hash(base)) == 8 and int(config_hash(base), 16) >= 0
    for change in (
        {"lr": 2e-4},
        {"seed": 1},
        {"data_dir": "d"},
        {"precision": "bf16"},
        {"global_batch_size": 8},
    ):
        assert config_hash(dataclasses.replace(base, **change)) != config_hash(base), change
    assert "lr" in result_flags(base) and "num_workers" not in result_flags(base)


def test_run_directory(monkeypatch):
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    config = EdmTrainConfig(preset="digits_edm")
    assert run_dir(config) == f"runs/digits_edm-{config_hash(config)}"
    assert run_dir(SampleConfig()) == f"runs/image_sample-{config_hash(SampleConfig())}"
    monkeypatch.setenv("OPENAI_LOGDIR", "/logs")
    assert run_dir(config) == "/logs"
    assert run_dir(dataclasses.replace(config, out_dir="here")) == "here"
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("OPENAI_LOGDIR", "~/logs")
    assert run_dir(config) == "/home/me/logs"
    found = parse_config(SampleConfig, ["--out_dir=~/run", "--model_path", "~/m.pt", "--seed", "1"])
    assert (run_dir(found), found.model_path, found.seed) == ("/home/me/run", "/home/me/m.pt", 1)
    with pytest.raises(UserError, match=r"--out_dir gs://b/run: .* local folder"):
        run_dir(dataclasses.replace(config, out_dir="gs://b/run"))


def test_derived_quantities():
    assert precision(EdmTrainConfig()) == "fp32"
    assert precision(EdmTrainConfig(use_fp16=True)) == "fp16"
    assert precision(EdmTrainConfig(precision="bf16")) == "bf16"
    assert global_batch(EdmTrainConfig(), 8) == 2048
    assert global_batch(EdmTrainConfig(batch_size=3), 8) == 24
    assert stop_step(EdmTrainConfig()) == 0
    assert stop_step(EdmTrainConfig(lr_anneal_steps=5)) == 5
    assert stop_step(CmTrainConfig(lr_anneal_steps=5)) == 600000
    assert lr_decay(EdmTrainConfig()) == ("constant", 0)
    assert lr_decay(EdmTrainConfig(lr_anneal_steps=5)) == ("linear", 5)
    assert lr_decay(EdmTrainConfig(lr_schedule="late_decay", total_training_steps=7)) == ("late_decay", 7)
    pd = CmTrainConfig(training_mode="progdist", scale_mode="progdist", start_scales=8, lr_schedule="linear")
    assert lr_decay(pd) == ("linear", 50000)
    assert init_source(CmTrainConfig()) == "random"
    assert init_source(CmTrainConfig(teacher_model_path="t")) == "teacher"
    assert init_source(CmTrainConfig(teacher_model_path="t", init="random")) == "random"


def _ct(**flags) -> CmTrainConfig:
    return CmTrainConfig(
        training_mode="consistency_training",
        target_ema_mode="adaptive",
        start_ema=0.9,
        scale_mode="progressive",
        start_scales=2,
        end_scales=150,
        image_size=32,
        class_cond=True,
        num_classes=10,
        **flags,
    )


def test_a_checkpoint_fills_in_what_the_command_leaves_open():
    stored = stored_config(_ct(sigma_data=0.7))
    config = inherit(SampleConfig(num_channels=128, explicit=frozenset({"num_channels"})), stored, "run/x")
    assert config.image_size == 32 and config.class_cond and config.sigma_data == 0.7
    assert (config.training_mode, config.sampler, config.steps) == ("consistency_training", "onestep", 151)
    teacher = inherit(SampleConfig(), stored_config(EdmTrainConfig(image_size=32)), "run/x")
    assert (teacher.training_mode, teacher.sampler, teacher.steps) == ("edm", "heun", 40)
    search = inherit(SearchConfig(), stored_config(CmTrainConfig(start_scales=18)), "run/x")
    assert (search.begin, search.end, search.steps) == ("0", "17", 18)
    pd = stored_config(CmTrainConfig(training_mode="progdist", scale_mode="progdist", start_scales=8))
    assert (inherit(SampleConfig(), pd, "run/x").sampler, pd["steps"]) == ("progdist", 1)


def test_flags_win_over_a_checkpoint_unless_they_contradict_it():
    stored = stored_config(_ct())
    explicit = SampleConfig(sampler="heun", steps=5, explicit=frozenset({"sampler", "steps"}))
    assert (inherit(explicit, stored, "x").sampler, inherit(explicit, stored, "x").steps) == ("heun", 5)
    for change, named in [
        ({"boundary": "piecewise"}, "boundary"),
        ({"training_mode": "edm"}, "training_mode"),
        ({"num_heads": 2}, "num_heads"),
    ]:
        with pytest.raises(UserError, match=rf"--{named}.*run/x"):
            inherit(SampleConfig(**change, explicit=frozenset(change)), stored, "run/x")
    # The same preconditioning under another name is no contradiction.
    cd = SampleConfig(training_mode="consistency_distillation", explicit=frozenset({"training_mode"}))
    assert inherit(cd, stored, "run/x").training_mode == "consistency_distillation"


def test_points_and_classes_are_checked_against_the_checkpoint():
    stored = stored_config(_ct())
    flags = {"sampler": "multistep", "ts": "0,75,150"}
    assert inherit(SampleConfig(**flags, explicit=frozenset(flags)), stored, "x").steps == 151
    with pytest.raises(UserError, match="--ts"):
        inherit(SampleConfig(sampler="multistep", ts="0,75,151", explicit=frozenset(flags)), stored, "x")
    with pytest.raises(UserError, match="--classes"):
        inherit(SampleConfig(classes="10", explicit=frozenset({"classes"})), stored, "x")
    with pytest.raises(UserError, match="--classes"):
        inherit(SampleConfig(classes="1"), stored_config(EdmTrainConfig()), "x")


def test_a_bare_file_needs_its_objective():
    with pytest.raises(UserError, match="--training_mode"):
        inherit(SampleConfig(), {"image_size": 64}, "model.pt")
    config = SampleConfig(training_mode="edm", explicit=frozenset({"training_mode"}))
    assert inherit(config, {"image_size": 32}, "model.pt").image_size == 32


@pytest.mark.parametrize(
    "flags, device, chosen",
    [
        ({"num_channels": 32}, "cpu", False),
        ({"num_channels": 64}, "cpu", True),
        ({"num_channels": 64}, "cuda", False),
        ({"precision": "bf16"}, "cuda", True),
        ({"channels_last": "False"}, "cpu", False),
        ({"channels_last": "True", "num_channels": 32}, "cpu", True),
    ],
)
def test_memory_format(flags, device, chosen):
    assert channels_last(SampleConfig(**{"num_channels": 128, **flags}), device) == chosen
