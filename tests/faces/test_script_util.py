"""The original's helpers: signatures, defaults, models equal to the golden ones, argparse."""

import argparse
import inspect

import numpy as np
import pytest
import torch

from cm import script_util
from cm.errors import UserError
from cm.networks.architecture import Architecture, build_network
from tests.helpers import golden_data

NAMES = [name for name, value in golden_data.json("signatures")["cm.script_util"].items()]


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_the_originals(name):
    """Same parameters in the same order with the same defaults; additions are keyword-only and optional."""
    expected = golden_data.json("signatures")["cm.script_util"][name]
    parameters = inspect.signature(getattr(script_util, name)).parameters
    ours = [p for p in parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [p.name for p in ours] == [row["name"] for row in expected]
    for parameter, row in zip(ours, expected):
        assert (
            repr(parameter.default) if parameter.default is not inspect.Parameter.empty else None
        ) == row.get("default")
    added = [p for p in parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert all(p.default is not inspect.Parameter.empty for p in added)


def test_defaults_are_those_of_the_scripts():
    golden = {row["dest"]: row["default"] for row in golden_data.json("cli_defaults")["cm_train"]}
    model, train = script_util.model_and_diffusion_defaults(), script_util.cm_train_defaults()
    assert len(model) == 19 and len(train) == 11
    for name, value in (model | train).items():
        assert value == golden[name] and type(value) is type(golden[name])


def test_default_model_builds():
    """128 channels and 4 heads give heads of 96 channels: any width works."""
    with torch.device("meta"):
        model, diffusion = script_util.create_model_and_diffusion(
            **script_util.model_and_diffusion_defaults()
        )
    assert model.num_classes is None and diffusion.loss_norm == "lpips" and not diffusion.distillation


@pytest.mark.parametrize("name", ["unet_a_basic", "unet_b_classcond_updown", "unet_d_learnsigma"])
def test_create_model_is_the_golden_network(name):
    golden = golden_data.load(name)
    model = script_util.create_model(**golden.config["create_model"]).eval()
    model.load_state_dict(golden.state_dict(), strict=True)
    y = {"y": golden.tensor("in/0/y")} if "in/0/y" in golden else {}
    with torch.no_grad():
        out = model(golden.tensor("in/0/x"), golden.tensor("in/0/t"), **y)
    np.testing.assert_allclose(out.numpy(), golden["out/0"], rtol=1e-4, atol=1e-4)


def test_additions():
    flags = dict(
        image_size=16, num_channels=32, num_res_blocks=1, channel_mult="1,2", attention_resolutions="8"
    )
    with torch.device("meta"):
        model = script_util.create_model(**flags, class_cond=True, num_classes=10, in_channels=1)
        labelled = script_util.create_model(**flags, class_cond=True)
        plain = script_util.create_model(**flags, num_classes=10)
    assert (model.num_classes, model.in_channels, model.out_channels) == (10, 1, 1)
    assert (labelled.num_classes, plain.num_classes) == (script_util.NUM_CLASSES, None)


def test_flags_reach_the_diffusion():
    flags = script_util.model_and_diffusion_defaults() | {"image_size": 32, "num_channels": 32}
    with torch.device("meta"):
        _, d = script_util.create_model_and_diffusion(
            **flags | {"sigma_min": 0.01, "sigma_max": 50.0, "weight_schedule": "uniform"},
            distillation=True,
            loss_norm="l2",
            ode_solver="euler",
            sigma_data=0.6,
            rho=5.0,
        )
    assert (d.sigma_min, d.sigma_max, d.weight_schedule, d.distillation) == (0.01, 50.0, "uniform", True)
    assert (d.loss_norm, d.ode_solver, d.sigma_data, d.rho) == ("l2", "euler", 0.6, 5.0)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"image_size": 20}, "image_size"),
        ({"num_channels": 40}, "num_channels"),
        ({"num_heads": 5}, "num_heads"),
        ({"attention_resolutions": "32"}, "attention_resolutions"),
        ({"network": "vit"}, "network"),
    ],
)
def test_impossible_networks_name_the_flag(change, named):
    flags = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1,2,2"} | change
    with pytest.raises(UserError, match=named):
        build_network(Architecture(**flags))


def test_fractional_widths_and_channels_reach_the_network():
    with torch.device("meta"):
        net = build_network(
            Architecture(
                image_size=16,
                num_channels=64,
                num_res_blocks=1,
                channel_mult="0.5,1.5",
                learn_sigma=True,
                in_channels=1,
            )
        )
    assert net.input_blocks[0][0].weight.shape == (32, 1, 3, 3)
    assert net.middle_block[0].out_layers[3].weight.shape[0] == 96
    assert net.out[2].weight.shape[0] == 2


def test_argparse_helpers():
    parser = argparse.ArgumentParser()
    script_util.add_dict_to_argparser(parser, {"a": 1, "b": False, "c": None, "d": 0.5, "e": ""})
    args = parser.parse_args(["--a", "2", "--b", "yes", "--c", "x"])
    assert script_util.args_to_dict(args, ["a", "b", "c", "d", "e"]) == {
        "a": 2,
        "b": True,
        "c": "x",
        "d": 0.5,
        "e": "",
    }
    with pytest.raises(SystemExit):
        parser.parse_args(["--b", "maybe"])


@pytest.mark.parametrize(
    "text, value", [("True", True), ("n", False), ("0", False), ("YES", True), (False, False)]
)
def test_str2bool(text, value):
    assert script_util.str2bool(text) is value


def test_str2bool_refuses_other_words():
    with pytest.raises(argparse.ArgumentTypeError):
        script_util.str2bool("maybe")
