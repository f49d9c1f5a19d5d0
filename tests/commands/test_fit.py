"""A configuration made to fit: side and classes from the data, auto's choice kept, memory, warnings, teachers."""

import json

import numpy as np
import pytest

from cm.commands import fit as fitting
from cm.commands.cli import parse_config
from cm.commands.fit import fit, fit_memory, warnings
from cm.config.derived import identity_flags, may_grow, stored_config
from cm.config.inherit import adopt_teacher, inherit
from cm.config.scripts import SCRIPTS, CmTrainConfig, EdmTrainConfig, SampleConfig, configure
from cm.errors import UserError
from cm.tools.planning.devices import parse_cluster
from cm.tools.planning.estimate import plan_step
from cm.training.memory import bytes_of_weights, bytes_per_image, largest_microbatch


@pytest.fixture
def data(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 12, 12, 1)).astype(np.uint8)
    np.savez(tmp_path / "d.npz", images=pixels, labels=np.arange(60) % 3)
    return str(tmp_path / "d.npz")


def auto(data, *flags, script="edm_train"):
    return parse_config(SCRIPTS[script], ["--data_dir", data, "--preset", "auto", *flags])


def test_auto_follows_the_data_and_prints_what_it_chose(data, tmp_path):
    config, notes = fit(auto(data), None, str(tmp_path / "run"))
    assert (config.image_size, config.class_cond, config.channel_mult) == (12, True, "1,2")
    assert config.num_workers == 0 and not config.random_flip and config.ema_warmup
    assert config.global_batch_size == 60
    assert notes[0].startswith("--preset auto: --") and "--channel_mult 1,2 " in notes[0]
    given, _ = fit(auto(data, "--num_channels", "64", "--lr", "0.5"), None, str(tmp_path / "run"))
    assert (given.num_channels, given.lr, given.num_res_blocks, given.global_batch_size) == (64, 0.5, 1, 60)
    plain, _ = fit(auto(data, "--labels", "none"), None, str(tmp_path / "run"))
    assert not plain.class_cond


def test_flags_of_the_network_are_judged_by_the_size_of_the_data(data, tmp_path):
    config, _ = fit(
        auto(data, "--attention_resolutions", "6"), None, str(tmp_path / "run")
    )  # none of 64 pixels'
    assert (config.attention_resolutions, config.channel_mult) == ("6", "1,2")
    assert fit(auto(data, "--patch_size", "3"), None, str(tmp_path / "run"))[0].channel_mult == "1"
    for flags, said in (
        (("--attention_resolutions", "7"), r"--attention_resolutions 7 is not .* \(12, 6\)"),
        (("--patch_size", "5"), "--image_size 12 is not a multiple of --patch_size 5"),
        (("--num_channels", "48"), "--num_channels 48 times --channel_mult 1,2 gives"),
    ):
        with pytest.raises(UserError, match=said):
            fit(auto(data, *flags), None, str(tmp_path / "run"))


def test_a_run_goes_on_with_what_auto_chose_at_its_beginning(data, tmp_path):
    first, _ = fit(auto(data), None, str(tmp_path))
    stored = {**stored_config(first), "global_batch_size": 32, "num_channels": 64}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    again, _ = fit(auto(data), None, str(tmp_path))
    assert (again.global_batch_size, again.num_channels) == (32, 64)


def test_size_0_is_that_of_the_data(data, tmp_path):
    config = parse_config(EdmTrainConfig, ["--data_dir", data, "--image_size", "0", "--channel_mult", "1,2"])
    assert fit(config, None, str(tmp_path))[0].image_size == 12


def test_images_of_several_sizes_need_one(tmp_path):
    from PIL import Image

    for i in range(4):
        Image.new("L", (8 + i, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match=r"several sizes or are not square: cm prepare .* --image_size N"):
        fit(auto(str(tmp_path)), None, str(tmp_path / "run"))


def test_what_does_not_fit_is_split_or_refused(data, monkeypatch):
    config = configure(
        EdmTrainConfig, image_size=16, num_channels=32, channel_mult="1,2", global_batch_size=64
    )
    weights, each = bytes_of_weights(config), bytes_per_image(config)
    monkeypatch.setattr(fitting, "available", lambda *_: int((weights + 20 * each) / 0.9))
    split, notes = fit_memory(config)
    assert split.microbatch == 16 and "--microbatch 16, the same gradient" in notes[0]
    monkeypatch.setattr(fitting, "available", lambda *_: int((weights + each / 2) / 0.9))
    assert fit_memory(config)[0].microbatch == 1  # half an image by an estimate: it is tried
    monkeypatch.setattr(fitting, "available", lambda *_: weights)
    with pytest.raises(UserError, match="does not fit"):
        fit_memory(config)
    monkeypatch.setattr(fitting, "available", lambda *_: 1 << 50)
    assert fit_memory(config) == (config, [])
    assert largest_microbatch(config, 64, 1 << 50) == 64


@pytest.mark.parametrize(
    "flags",
    [
        {"image_size": 28, "num_channels": 32, "channel_mult": "1,2,2", "num_res_blocks": 1},
        {"image_size": 64, "num_channels": 64, "num_res_blocks": 2, "resblock_updown": True},
        {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "resblock_updown": True},
    ],
)
def test_the_estimate_is_near_what_the_planner_traces(flags):
    config = configure(EdmTrainConfig, **flags, global_batch_size=16, in_channels=3)
    traced = plan_step(config, parse_cluster("1xH200"), microbatch=8).memory.activations / 8
    assert 0.6 < bytes_per_image(config) / traced < 1.7


def test_start_lines_warn():
    slow = configure(EdmTrainConfig, total_training_steps=800, ema_rate="0.9999,0.9")
    assert len(warnings(slow)) == 1 and "--ema_rate 0.9999 averages over 10000 steps" in warnings(slow)[0]
    blind = configure(EdmTrainConfig, image_size=28, channel_mult="1,2,2")
    assert "--attention_resolutions may name 28, 14, 7" in warnings(blind)[0]


TEACHER = {
    "image_size": 16,
    "num_channels": 32,
    "channel_mult": "1,2",
    "class_cond": True,
    "num_classes": 3,
    "sigma_max": 40.0,
    "sigma_data": 0.3,
    "in_channels": 1,
    "attention_resolutions": "8",
    "dropout": 0.3,
}


def test_a_student_inherits_unless_a_flag_says_otherwise():
    config = adopt_teacher(parse_config(CmTrainConfig, ["--sigma_max", "60"]), TEACHER, "t")
    assert (config.image_size, config.channel_mult, config.num_classes) == (16, "1,2", 3)
    assert (config.sigma_max, config.sigma_data, config.dropout) == (60.0, 0.3, 0.0)


def test_class_names_and_size_come_with_the_model():
    stored = {**TEACHER, "training_mode": "edm", "class_names": ["shoe", "bag", "coat"]}
    config = parse_config(SampleConfig, ["--model_path", "m", "--classes", "bag,0", "--image_size", "0"])
    merged = inherit(config, stored, "m")
    assert merged.class_names == ("shoe", "bag", "coat") and merged.image_size == 16
    with pytest.raises(UserError, match="did you mean bag"):
        inherit(parse_config(SampleConfig, ["--model_path", "m", "--classes", "bagg"]), stored, "m")


def test_two_steps_without_ts():
    def ts(stored, *flags):
        config = parse_config(SampleConfig, ["--model_path", "m", "--sampler", "multistep", *flags])
        return inherit(config, {**TEACHER, "training_mode": "consistency_training", **stored}, "m").ts

    assert ts({"steps": 18}) == "0,10,17"
    assert ts({"steps": 18, "preset": "digits_cd"}) == "0,11,17"
    assert ts({"steps": 40, "preset": "imagenet64_cd_lpips"}) == "0,22,39"
    assert ts({"steps": 18}, "--ts", "0,3,17") == "0,3,17"
    assert ts({"steps": 18, "preset": "digits_cd", "searched": "0,5,17"}) == "0,5,17"
    assert ts({"steps": 18, "searched": "0,5,39"}) == "0,10,17"  # of another grid


def test_only_a_run_whose_rate_and_grid_know_no_fixed_end_can_be_made_longer():
    assert "total_training_steps" not in identity_flags(configure(EdmTrainConfig, total_training_steps=5))
    late = configure(EdmTrainConfig, total_training_steps=5, lr_schedule="late_decay")
    assert may_grow(late) and "total_training_steps" in identity_flags(late)
    for config in (
        configure(EdmTrainConfig, lr_anneal_steps=5),
        configure(CmTrainConfig, scale_mode="progressive", start_scales=2),
    ):
        assert not may_grow(config) and "total_training_steps" in identity_flags(config)


def test_an_auto_run_at_a_constant_rate_can_be_made_longer(data, tmp_path):
    def run(steps):
        flags = ("--lr_schedule", "constant", "--total_training_steps", str(steps))
        return fit(auto(data, *flags), None, str(tmp_path))[0]

    first = run(100)
    (tmp_path / "config.json").write_text(json.dumps(stored_config(first)))
    longer = run(5000)
    assert longer.total_training_steps == 5000 and identity_flags(longer) == identity_flags(first)


def test_config_takes_what_a_run_wrote_and_yaml(data, tmp_path):
    config, _ = fit(auto(data, "--lr", "0.25"), None, str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(stored_config(config)))
    for path in (tmp_path, tmp_path / "config.json"):
        assert parse_config(EdmTrainConfig, ["--config", str(path)]).lr == 0.25
    with pytest.raises(UserError, match="is of edm_train, not of cm_train"):
        parse_config(CmTrainConfig, ["--config", str(tmp_path)])
    pytest.importorskip("yaml")
    (tmp_path / "c.yaml").write_text("lr: 0.5\nimage_size: 32\nclass_cond: true\n")
    read = parse_config(EdmTrainConfig, ["--config", str(tmp_path / "c.yaml")])
    assert (read.lr, read.image_size, read.class_cond) == (0.5, 32, True)
    (tmp_path / "c.yaml").write_text("lr: [")
    with pytest.raises(UserError, match=r"c\.yaml"):
        parse_config(EdmTrainConfig, ["--config", str(tmp_path / "c.yaml")])
