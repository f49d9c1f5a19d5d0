"""Conversion from any kind of checkpoint to any other: round trips, what is detected, what is asked for, the script."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cm.commands.cli import parse_config
from cm.config.derived import stored_config, with_counts
from cm.config.scripts import CmTrainConfig, SampleConfig
from cm.errors import UserError
from cm.models.factory import create_network
from cm.models.pretrained import load_pretrained
from cm.storage.checkpoint import write_checkpoint
from cm.storage.weights import load_weights, save_weights
from cm.tools.convert import command as program
from cm.tools.convert import layout
from cm.tools.convert.export import WRITERS
from cm.tools.convert.formats import READERS, Source, convert, detect, known_flags
from cm.tools.convert.tensor_files import read_safetensors, write_safetensors
from tests.helpers.convert_models import adm, assert_same, network, qkv_new_to_legacy

CD = {"training_mode": "consistency_distillation", "steps": 40}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> tuple[dict, dict]:
    """(flags, state dict) of a narrow U-Net whose heads are those of the released networks."""
    config = adm("imagenet", num_channels=64, num_head_channels=64)
    return config, network(config).state_dict()


@pytest.fixture
def original(tmp_path, model) -> str:
    """A bare state dict as the original repository saves it."""
    torch.save(model[1], tmp_path / "cd.pt")
    return str(tmp_path / "cd.pt")


def test_original_file_gets_a_configuration_and_loses_it_again(tmp_path, model, original):
    config, state = model
    new, back = str(tmp_path / "new.pt"), str(tmp_path / "back.pt")
    assert detect(original) == "torch"
    convert(Source(original, image_size=16), new, "cm", CD)
    found, meta = load_weights(new)
    assert_same(found, state)
    same = (
        "image_size",
        "num_channels",
        "channel_mult",
        "num_res_blocks",
        "num_head_channels",
        "num_classes",
        "steps",
    )
    assert {n: meta["config"][n] for n in same} == {n: config[n] for n in same}
    convert(Source(new), back, "legacy", {})
    found, meta = load_weights(back)
    assert_same(found, state)
    assert meta is None


def test_converted_model_is_sampled_without_another_flag(tmp_path, model, original):
    convert(Source(original, image_size=16), str(tmp_path / "new.pt"), "cm", CD)
    loaded = load_pretrained(SampleConfig(model_path=str(tmp_path / "new.pt"), device="cpu"))
    assert (loaded.config.training_mode, loaded.config.sampler) == ("consistency_distillation", "onestep")
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([1, 9])
    edge = torch.full((2,), 0.002)
    torch.testing.assert_close(loaded.denoiser(x, edge, y=y), x)  # the boundary condition
    assert (loaded.denoiser(x, 1000 * edge, y=y) - x).abs().max() > 0.1


def test_round_trips_keep_every_bit(tmp_path, model, original):
    pytest.importorskip("safetensors")
    first, second, third = (str(tmp_path / name) for name in ("a.pt", "b.safetensors", "c.pt"))
    convert(Source(original, image_size=16), first, "cm", CD)
    convert(Source(first), second, "safetensors", {})
    assert detect(second) == "safetensors"
    convert(Source(second), third, "cm", {})
    assert_same(dict(sorted(load_weights(third)[0].items())), dict(sorted(model[1].items())))
    assert load_weights(third)[1] == load_weights(first)[1]
    folder, fourth = str(tmp_path / "folder"), str(tmp_path / "d.pt")
    convert(Source(first), folder, "diffusers", {})
    assert detect(folder) == "diffusers"
    convert(Source(folder), fourth, "cm", CD)
    assert_same(dict(sorted(load_weights(fourth)[0].items())), dict(sorted(model[1].items())))
    assert load_weights(fourth)[1]["config"]["training_mode"] == "consistency_distillation"


def test_bare_safetensors_are_identified(tmp_path, model):
    pytest.importorskip("safetensors")
    path = tmp_path / "bare.safetensors"
    write_safetensors(path, model[1])
    assert read_safetensors(path)[1] is None
    state, config = READERS["safetensors"](Source(str(path), image_size=16))
    assert state.keys() == model[1].keys() and config["num_channels"] == 64


def as_guided(state: dict, heads, order: str = "legacy") -> dict:
    """A state dict as guided-diffusion saves it; heads: number of them in a layer of so many channels."""
    theirs = {}
    for name, tensor in state.items():
        if ".qkv." in name and order == "legacy":
            tensor = qkv_new_to_legacy(tensor, heads(len(tensor) // 3))
        theirs[name] = tensor[..., 0] if name.endswith(("qkv.weight", "proj_out.weight")) else tensor
    return theirs


GUIDED = {
    "num_heads": 4,
    "num_head_channels": -1,
    "num_channels": 64,
    "image_size": 16,
    "learn_sigma": True,
    "class_cond": False,
}


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_a_number_of_heads_is_taken_from_the_caller(tmp_path, order):
    """As the published 128x128_diffusion.pt: 4 heads in every layer, of any width."""
    config = adm("imagenet", **GUIDED)
    net = network(config)
    path, new = tmp_path / "128x128_diffusion.pt", str(tmp_path / "new.pt")
    torch.save(as_guided(net.state_dict(), lambda channels: 4, order), path)
    known = known_flags("", training_mode="edm", num_heads=4, num_head_channels=-1)
    line = convert(Source(str(path), image_size=16, qkv_order=order), new, "cm", known)
    state, meta = load_weights(new)
    assert_same(state, net.state_dict())
    assert (meta["config"]["num_heads"], meta["config"]["num_head_channels"]) == (4, -1)
    assert "num_heads" not in line
    loaded = load_pretrained(SampleConfig(model_path=new, device="cpu"))
    x, c_noise = torch.randn(2, 3, 16, 16), torch.tensor([0.0, 500.0])
    torch.testing.assert_close(loaded.denoiser.net(x, c_noise), net(x, c_noise))


def test_heads_that_were_not_given_are_said(tmp_path):
    config = adm("imagenet", **GUIDED)
    torch.save(as_guided(network(config).state_dict(), lambda channels: 4), tmp_path / "g.pt")
    line = convert(
        Source(str(tmp_path / "g.pt"), image_size=16),
        str(tmp_path / "new.pt"),
        "cm",
        {"training_mode": "edm"},
    )
    assert (
        "--num_head_channels 64 as in the released networks (shapes do not tell; else give --num_heads)"
        in line
    )
    with pytest.raises(UserError, match="do not tell the number of attention heads"):
        convert(Source(str(tmp_path / "g.pt"), image_size=16), str(tmp_path / "x.pt"), "cm", {"num_heads": 5})
    with pytest.raises(UserError, match="has --num_head_channels 64, not --num_heads 4"):
        convert(Source(str(tmp_path / "new.pt")), str(tmp_path / "x.pt"), "cm", {"num_heads": 4})


@pytest.mark.parametrize(
    ("size", "given", "column", "lowest"),
    [(64, "", "iddpm", 0.0064254), (128, "", "ddpm", 0.0100005), (64, "ddpm", "ddpm", 0.0100005)],
)
def test_a_guided_diffusion_network_predicts_the_noise_at_its_steps(tmp_path, size, given, column, lowest):
    """x0 = x - sigma F(x / sqrt(1 + sigma^2), t), t the step of its own schedule with the nearest noise level."""
    config = adm(
        "imagenet",
        **GUIDED | {"image_size": size, "num_channels": 32, "attention_resolutions": str(size // 2)},
    )
    net = network(config | {"num_heads": 2})
    torch.save(as_guided(net.state_dict(), lambda channels: 2), tmp_path / "g.pt")
    known = known_flags("", training_mode="edm", num_heads=2, num_head_channels=-1, precond=given)
    line = convert(Source(str(tmp_path / "g.pt"), image_size=size), str(tmp_path / "new.pt"), "cm", known)
    assert (f"--precond {column}" in line) == (not given)
    loaded = load_pretrained(SampleConfig(model_path=str(tmp_path / "new.pt"), device="cpu"))
    assert (loaded.config.precond, loaded.config.sigma_min) == (column, pytest.approx(lowest, rel=1e-5))
    if column == "iddpm":
        bar = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1001)]
        betas = [min(1 - bar[k + 1] / bar[k], 0.999) for k in range(1000)]
    else:
        betas = [1e-4 + (0.02 - 1e-4) * k / 999 for k in range(1000)]
    t = 300
    abar = math.prod(1 - beta for beta in betas[: t + 1])
    sigma = math.sqrt((1 - abar) / abar)
    x = sigma * torch.randn(1, 3, size, size)
    with torch.no_grad():
        noise = net(x * math.sqrt(abar), torch.tensor([float(t)]))[:, :3]
        denoised = loaded.denoiser(x, torch.tensor([sigma]))
    torch.testing.assert_close(denoised, x - sigma * noise, rtol=1e-3, atol=1e-3 * sigma)


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_attention_of_guided_diffusion_is_reordered(tmp_path, model, order):
    theirs = as_guided(model[1], lambda channels: channels // 64, order)
    torch.save(theirs, tmp_path / "guided.pt")
    state, config = READERS["torch"](Source(str(tmp_path / "guided.pt"), image_size=16, qkv_order=order))
    assert_same(state, model[1])
    assert config["num_head_channels"] == 64


def test_weights_of_a_run_directory_are_chosen(tmp_path, model):
    config, state = model
    other = {name: t + 1 for name, t in state.items()}
    files = {"model000005.pt": state, "ema_0.9999_000005.pt": other}
    write_checkpoint(tmp_path, 5, files, {"step": 5}, {"config": config})
    assert detect(str(tmp_path)) == "torch"
    for weights, expected in (("", other), ("ema", other), ("ema:0.9999", other), ("raw", state)):
        found, told = READERS["torch"](Source(str(tmp_path), weights))
        assert_same(found, expected)
        assert told["steps"] == 40


def test_what_a_file_does_not_tell_is_asked_for(tmp_path, original):
    target = str(tmp_path / "new.pt")

    def refuses(message: str, known: dict, to: str = "cm", size: int = 16) -> None:
        with pytest.raises(UserError, match=message) as caught:
            convert(Source(original, image_size=size), target, to, known)
        assert "\n" not in str(caught.value)

    refuses("give --image_size", CD, size=0)
    refuses("give --training_mode or --preset", {})
    refuses("give --steps or --preset", {"training_mode": "consistency_training"})
    refuses("this one is of progdist", {"training_mode": "progdist", "steps": 40}, "diffusers")
    refuses("has --network adm, not ncsnpp", {**CD, "network": "ncsnpp"})
    convert(Source(original, image_size=16), target, "cm", {"training_mode": "edm"})
    with pytest.raises(UserError, match="has --training_mode edm, not consistency_distillation"):
        convert(Source(target), str(tmp_path / "x.pt"), "cm", CD)
    assert not (tmp_path / "x.pt").exists()


def test_tensors_that_do_not_fit_their_configuration_are_refused(tmp_path, model):
    config, state = model
    path = str(tmp_path / "odd.pt")
    save_weights(path, {**state, "out.2.bias": torch.zeros(4)}, {"config": config})
    with pytest.raises(UserError, match=r"does not fit the model: out\.2\.bias"):
        convert(Source(path), str(tmp_path / "x.pt"), "legacy", {})


def test_a_preset_tells_model_objective_and_grid():
    known = known_flags("cifar10_cd_lpips", training_mode="", steps=0)
    expected = {
        "network": "ncsnpp",
        "channel_mult": "2,2,2",
        "training_mode": "consistency_distillation",
        "steps": 18,
    }
    assert {name: known[name] for name in expected} == expected
    assert "num_samples" not in known
    assert known_flags("cifar10_cd_lpips", steps=36)["steps"] == 36
    assert known_flags("") == {}


def test_the_program_converts(tmp_path, original, capsys):
    target = str(tmp_path / "new.pt")
    program.main(
        program.parser().parse_args([original, target, "--training_mode", "edm", "--image_size", "16"])
    )
    printed = capsys.readouterr().out
    assert printed.startswith(f"{original} (torch): adm,") and f"-> {target} (cm), " in printed
    assert load_weights(target)[1]["config"]["training_mode"] == "edm"


def test_without_a_target_the_sources_name_is_taken_once(tmp_path, original, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert program.default_target("runs/student/", "onnx") == "student.onnx"
    assert program.default_target(original, "diffusers") == "cd-diffusers"
    with pytest.raises(UserError, match=r"cd\.pt is there already"):
        program.default_target(original, "cm")
    assert program.ENDINGS.keys() == WRITERS.keys()


def test_the_script_reports_mistakes_in_one_line(tmp_path):
    (tmp_path / "bad").write_bytes(b"\x80\x04cos\nsystem\n(S'echo x'\ntR.")
    command = [sys.executable, str(ROOT / "scripts" / "convert_checkpoint.py"), "bad", "new.pt"]
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr == "error: bad: refused: its pickle asks for os.system\n"
    assert not (tmp_path / "new.pt").exists()


TWO_INPUTS = {
    "flow map": ("--training_mode meanflow --network ddpmpp_meanflow --precond flow", "a second time"),
    "told all": (
        "--training_mode improved_meanflow --network ddpmpp_meanflow --precond flow --class_cond True "
        "--label_dropout 0.1",
        "a second time",
    ),
    "told a scale": ("--training_mode scd --boundary zero --class_cond True --guidance 1:4", "the scale"),
}


@pytest.mark.parametrize("name", TWO_INPUTS)
def test_networks_of_more_inputs_are_known_and_refused_where_there_is_no_place(name):
    flags, what = TWO_INPUTS[name]
    config = with_counts(parse_config(CmTrainConfig, ["--preset", "tiny", "--data_dir", "d", *flags.split()]))
    state, stored = create_network(config).state_dict(), stored_config(config)
    assert layout.check_fits(state, stored, "it").keys() == state.keys()
    for write in (WRITERS["diffusers"], WRITERS["onnx"]):
        with pytest.raises(UserError, match=f"no input for {what}|takes one-step generators"):
            write("nowhere", state, stored)


@pytest.mark.parametrize("flag", ["steps", "image_size", "num_heads", "num_head_channels"])
def test_numbers_below_0_are_refused(flag, capsys):
    """--steps -8 was written into the result."""
    with pytest.raises(SystemExit):
        program.parser().parse_args(["x", f"--{flag}", "-8"])
    assert f"--{flag}: must be at least 0, got -8" in capsys.readouterr().err
