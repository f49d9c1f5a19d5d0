"""Model files that are wrapped, that say impossible things of themselves, or that are no network at all."""

import json
import os
import zipfile

import pytest
import torch

from cm.config.scripts import SampleConfig
from cm.errors import UserError
from cm.models.files import load_model_file
from cm.models.pretrained import load_pretrained
from cm.storage.weights import load_weights, save_weights
from cm.tools.convert.formats import Source, convert
from cm.tools.convert.tensor_files import write_safetensors
from tests.helpers.convert_models import adm, assert_same, network
from tests.helpers.memory import at_most


@pytest.fixture(scope="module")
def model() -> tuple[dict, dict]:
    """(flags, state dict) of a narrow U-Net."""
    config = adm("imagenet", num_channels=64, num_head_channels=64, training_mode="edm")
    return config, network(config).state_dict()


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: t for name, t in state.items()}


# Name -> (file content around the state dicts `raw` and `ema`, words of the refusal)
WRAPPED = {
    "plain": (lambda raw, ema: {"state_dict": raw, "epoch": 3}, "holds state_dict"),
    "with an average": (
        lambda raw, ema: {"model": raw, "ema": ema, "optimizer": {"state": {}, "param_groups": []}},
        "holds model, ema, optimizer",
    ),
    "lightning": (
        lambda raw, ema: {
            "epoch": 1,
            "pytorch-lightning_version": "2.0",
            "state_dict": {
                **prefixed(raw, "model.net."),
                **prefixed(ema, "model_ema."),
                "loss.w": torch.ones(1),
            },
            "optimizer_states": [{}],
        },
        "holds state_dict",
    ),
    "a number beside the tensors": (lambda raw, ema: {**raw, "epoch": 3}, "epoch is no tensor"),
    "in parallel": (lambda raw, ema: prefixed(raw, "module."), "begin with module."),
    "compiled": (lambda raw, ema: prefixed(raw, "_orig_mod.module."), "begin with _orig_mod.module."),
    "deep": (lambda raw, ema: {"a": {"b": {"state_dict": prefixed(raw, "module.")}}}, "holds a"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_checkpoints_are_named_and_converted(tmp_path, model, name):
    raw = model[1]
    ema = {name: t + 1 for name, t in raw.items()}
    wrap, words = WRAPPED[name]
    path, new = tmp_path / "w.pt", str(tmp_path / "new.pt")
    content = wrap(raw, ema)
    torch.save(content, path)
    for read in (
        lambda: load_model_file(str(path), flag="teacher_model_path"),
        lambda: load_pretrained(SampleConfig(model_path=str(path), device="cpu")),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert words in str(caught.value) and "scripts/convert_checkpoint.py" in str(caught.value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    averaged = "ema" in json.dumps([list(content), list(content.get("state_dict", ""))])
    for weights, expected in (("", ema if averaged else raw), ("raw", raw)):
        convert(Source(str(path), weights, image_size=16), new, "cm", {"training_mode": "edm"})
        assert_same(dict(sorted(load_weights(new)[0].items())), dict(sorted(expected.items())))


def test_what_a_wrapper_does_not_tell_is_asked_for(tmp_path, model):
    torch.save({"teacher": model[1], "student": model[1]}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"holds teacher, student: it does not say which is the network"):
        convert(Source(str(tmp_path / "w.pt"), image_size=16), str(tmp_path / "x.pt"), "cm", {})
    assert not (tmp_path / "x.pt").exists()


WRONG = {
    "num_channels": ["64", 64.5, True, [64], {}, 1 << 40, -1],
    "num_res_blocks": [100_000, 0, "2"],
    "num_classes": [10**9 * 5, "ten"],
    "steps": [10**12, "40", 0],
    "sigma_max": ["80", float("nan"), [80.0]],
    "training_mode": [{}, 3],
    "class_cond": ["True", 1],
    "channel_mult": [[1, 2], 12],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_a_configuration_is_checked_before_anything_is_built(tmp_path, model, name, value):
    config, state = model
    save_weights(tmp_path / "w.pt", state, {"config": {**config, name: value}})
    for read in (
        lambda: load_pretrained(SampleConfig(model_path=str(tmp_path / "w.pt"), device="cpu")),
        lambda: convert(Source(str(tmp_path / "w.pt")), str(tmp_path / "x.pt"), "cm", {}),
    ):
        with pytest.raises(UserError, match=rf"w\.pt: its configuration says .*{name}") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("config", [[], "text", 5, [["image_size", 8]]])
def test_a_configuration_is_an_object(tmp_path, model, config):
    save_weights(tmp_path / "w.pt", model[1], {"config": config})
    with pytest.raises(UserError, match=r"w\.pt: its configuration is a \w+, not an object"):
        load_model_file(str(tmp_path / "w.pt"))
    pytest.importorskip("safetensors")
    write_safetensors(tmp_path / "w.safetensors", model[1], {"config": config})
    with pytest.raises(UserError, match=r"its configuration is a \w+, not an object"):
        convert(Source(str(tmp_path / "w.safetensors")), str(tmp_path / "x.pt"), "cm", {})


@pytest.mark.parametrize(
    "change", [{"num_channels": 65536}, {"num_classes": 10_000_000}, {"num_res_blocks": 500}]
)
def test_a_network_is_compared_with_its_tensors_before_it_takes_memory(tmp_path, model, change):
    config, state = model
    save_weights(tmp_path / "w.pt", state, {"config": {**config, **change}})
    with at_most(200 << 20), pytest.raises(UserError, match="does not fit the model"):
        load_pretrained(SampleConfig(model_path=str(tmp_path / "w.pt"), device="cpu"))
    with at_most(200 << 20), pytest.raises(UserError, match="does not fit the model"):
        convert(Source(str(tmp_path / "w.pt")), str(tmp_path / "x.pt"), "cm", {})


@pytest.mark.parametrize(
    "change",
    [
        {"input_blocks.0.0.weight": torch.zeros(64)},
        {"input_blocks.0.0.weight": torch.zeros(0, 3, 3, 3)},
        {"out.2.weight": torch.zeros(())},
        {"middle_block.1.qkv.weight": torch.zeros(7, 1, 1, 1)},
        {"input_blocks.1.0.in_layers.2.weight": torch.zeros(())},
    ],
    ids=str,
)
def test_tensors_of_unlikely_shapes_are_no_network(tmp_path, model, change):
    torch.save({**model[1], **change}, tmp_path / "w.pt")
    for read in (
        lambda: load_pretrained(
            SampleConfig(model_path=str(tmp_path / "w.pt"), device="cpu", training_mode="edm")
        ),
        lambda: convert(
            Source(str(tmp_path / "w.pt"), image_size=16),
            str(tmp_path / "x.pt"),
            "cm",
            {"training_mode": "edm"},
        ),
    ):
        with pytest.raises(UserError, match=r"w\.pt") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_deep_json_in_a_file_is_refused(tmp_path, model):
    torch.save(model[1], tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt", "a") as archive:
        archive.writestr("w/extra/cm.json", "[" * 100_000 + "]" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        load_model_file(str(tmp_path / "w.pt"))


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "checkpoint_1", "network.pkl"])
def test_a_pipe_is_no_model(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for read in (
        lambda: convert(Source(str(tmp_path / name)), str(tmp_path / "x.pt"), "cm", {}),
        lambda: load_weights(tmp_path / name),
    ):
        with pytest.raises(UserError, match=name):
            read()
