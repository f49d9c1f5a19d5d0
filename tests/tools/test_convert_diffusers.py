"""Diffusers folders: names, configurations, round trips, and equality with diffusers itself where it is installed."""

import json

import pytest
import torch

from cm.diffusion.denoiser import Denoiser
from cm.diffusion.precond import ConsistencyPrecond, EDMPrecond
from cm.errors import UserError
from cm.sampling.consistency import sample_multistep, sample_onestep
from cm.sampling.registry import run_sampler
from cm.tools.convert import diffusers as converter
from cm.tools.convert.formats import READERS, Source, detect
from cm.tools.convert.layout import AdmShape
from tests.helpers import golden_data
from tests.helpers.convert_models import SHAPES, adm, assert_same, network

RELEASED = {
    "imagenet64_edm_cd_ct": {
        "sample_size": 64,
        "layers_per_block": 3,
        "num_class_embeds": 1000,
        "block_out_channels": [192, 384, 576, 768],
        "attention_head_dim": 64,
        "down_block_types": ["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3],
        "up_block_types": [*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
        "resnet_time_scale_shift": "scale_shift",
    },
    "lsun256_edm_cd_ct": {
        "sample_size": 256,
        "layers_per_block": 2,
        "num_class_embeds": None,
        "block_out_channels": [256, 256, 512, 512, 1024, 1024],
        "attention_head_dim": 64,
        "down_block_types": [*["ResnetDownsampleBlock2D"] * 3, *["AttnDownBlock2D"] * 3],
        "up_block_types": [*["AttnUpBlock2D"] * 3, *["ResnetUpsampleBlock2D"] * 3],
        "resnet_time_scale_shift": "default",
    },
}


@pytest.mark.parametrize("layout", RELEASED)
def test_released_networks_get_the_published_configuration_and_names(layout):
    golden = golden_data.json("checkpoint_layouts")[layout]
    told = {"num_channels": 192, **golden["config"], "num_classes": 1000}
    config = adm("imagenet", channel_mult="", **{k: v for k, v in told.items() if k != "use_fp16"})
    config["num_res_blocks"] = golden["config"]["num_res_blocks"]
    unet = converter.unet_config(config)
    assert {name: unet[name] for name in RELEASED[layout]} == RELEASED[layout]
    state = {name: torch.empty(shape, device="meta") for name, shape in golden["state_dict"]}
    converted = converter.to_diffusers(state, config)
    assert sum(t.numel() for t in converted.values()) == golden["num_parameters"]
    qkv = sum(name.endswith("qkv.weight") for name in state)
    assert len(converted) == len(state) + 4 * qkv  # each qkv weight and bias becomes three
    assert {"mid_block.attentions.0.group_norm.weight", "mid_block.resnets.1.time_emb_proj.bias"} <= set(
        converted
    )
    width = unet["block_out_channels"][-1]
    assert converted["mid_block.attentions.0.to_out.0.weight"].shape == (width, width)
    last = len(unet["block_out_channels"]) - 1
    assert f"down_blocks.{last - 1}.downsamplers.0.conv1.weight" in converted
    assert f"down_blocks.{last}.downsamplers.0.conv1.weight" not in converted
    assert f"up_blocks.{last - 1}.upsamplers.0.norm2.bias" in converted
    assert f"up_blocks.{last}.resnets.{unet['layers_per_block']}.conv_shortcut.weight" in converted
    flags = converter.model_flags(unet, "released")
    assert AdmShape.of({**config, **flags}) == AdmShape.of(config)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_of_names_is_exact(shape):
    config = adm(shape)
    state = network(config).state_dict()
    converted = converter.to_diffusers(state, config)
    q, k, v = state["middle_block.1.qkv.weight"].flatten(1).chunk(3)
    for part, rows in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(converted[f"mid_block.attentions.0.to_{part}.weight"], rows)
    assert_same(
        dict(sorted(converter.from_diffusers(converted, config).items())), dict(sorted(state.items()))
    )


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_round_trip_of_a_folder(tmp_path, suffix):
    pytest.importorskip("safetensors")
    config = adm("imagenet", steps=201, sigma_max=70.0)
    state = network(config).state_dict()
    converter.write_folder(str(tmp_path), state, config)
    assert (
        json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "ConsistencyModelPipeline"
    )
    if suffix == "bin":
        (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        torch.save(converter.to_diffusers(state, config), tmp_path / "unet" / "diffusion_pytorch_model.bin")
    assert detect(str(tmp_path)) == "diffusers"
    found, flags = READERS["diffusers"](Source(str(tmp_path)))
    assert_same(dict(sorted(found.items())), dict(sorted(state.items())))
    assert (flags["steps"], flags["sigma_max"], flags["training_mode"]) == (201, 70.0, "consistency_training")
    same = (
        "image_size",
        "num_channels",
        "channel_mult",
        "num_res_blocks",
        "num_head_channels",
        "num_classes",
    )
    assert {n: flags[n] for n in same} == {n: config[n] for n in same}
    assert flags["attention_resolutions"] == "8" and flags["class_cond"] and flags["resblock_updown"]


def test_what_diffusers_cannot_hold_is_refused_in_one_line(tmp_path):
    config = adm("imagenet")
    state = network(config).state_dict()
    for change, message in [
        ({"training_mode": "progdist"}, "consistency models and EDM's denoisers; this one is of progdist"),
        ({"training_mode": "edm", "precond": "vp"}, "this one is of edm with --precond vp"),
        ({"boundary": "zero"}, "knows --boundary skip only; this model has --boundary zero"),
        ({"c_out_formula": "printed"}, "--c_out_formula code only"),
        ({"time_scale": 1.0}, "--time_scale"),
        ({"resblock_updown": False}, "--resblock_updown True only"),
        ({"network": "ncsnpp"}, "ADM U-Nets"),
    ]:
        with pytest.raises(UserError, match=message):
            converter.write_folder(str(tmp_path / "out"), state, {**config, **change})
    two_widths = {**adm("lsun", attention_resolutions="16,8"), "num_head_channels": -1, "num_heads": 2}
    with pytest.raises(UserError, match="heads of one width"):
        converter.unet_config(two_widths)


def test_foreign_folders_are_refused_in_one_line(tmp_path):
    pytest.importorskip("safetensors")
    config = adm("imagenet")
    converter.write_folder(str(tmp_path), network(config).state_dict(), config)
    unet, scheduler = tmp_path / "unet" / "config.json", tmp_path / "scheduler" / "scheduler_config.json"

    def refuses(path, message, **change):
        kept = path.read_text()
        path.write_text(json.dumps({**json.loads(kept), **change}))
        with pytest.raises(UserError, match=message) as caught:
            converter.read_folder(str(tmp_path))
        assert "\n" not in str(caught.value)
        path.write_text(kept)

    refuses(unet, "UNet2DConditionModel", _class_name="UNet2DConditionModel")
    refuses(unet, "downsample_type is 'conv'", downsample_type="conv")
    refuses(unet, "down_block_types", down_block_types=["DownBlock2D", "AttnDownBlock2D"])
    refuses(unet, "misses|unlike|does not fit", layers_per_block=3)
    refuses(scheduler, "scheduler DDIMScheduler", _class_name="DDIMScheduler")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        converter.read_folder(str(tmp_path))
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="neither"):
        converter.read_folder(str(tmp_path))


class Replay:
    """Noise of a torch generator, as diffusers' pipeline draws it."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def randn_like(self, x: torch.Tensor) -> torch.Tensor:
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


@pytest.mark.parametrize(("shape", "channels"), [("imagenet", 3), ("imagenet", 1), ("lsun", 3)])
def test_diffusers_draws_the_same_images(tmp_path, hf_diffusers, shape, channels):
    config = adm(shape, in_channels=channels)
    net = network(config)
    converter.write_folder(str(tmp_path / "a"), net.state_dict(), config)
    pipeline = hf_diffusers.ConsistencyModelPipeline.from_pretrained(str(tmp_path / "a"))
    pipeline.set_progress_bar_config(disable=True)
    size = config["image_size"]
    noise = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    label = [7, 7] if config["class_cond"] else None
    cond = {"y": torch.tensor([7, 7])} if config["class_cond"] else {}
    t = torch.tensor([700.0, -1000.0])
    with torch.no_grad():
        expected = pipeline.unet(noise, t, class_labels=cond.get("y")).sample
        torch.testing.assert_close(net(noise, t, **cond), expected, rtol=1e-4, atol=2e-5)

    def draw(seed: int = 5, **options) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        images = pipeline(
            batch_size=2, class_labels=label, generator=generator, output_type="pt", **options
        ).images
        return 2 * images - 1

    def denoiser(x, sigma):
        return Denoiser(net, ConsistencyPrecond())(x, sigma, **cond).clamp(-1, 1)

    one = sample_onestep(denoiser, 80 * noise, torch.tensor([80.0, 0.002], dtype=torch.float64))
    torch.testing.assert_close(draw(0, num_inference_steps=1), one.clamp(-1, 1), rtol=0, atol=1e-4)
    if channels == 1:  # the pipeline takes latents of three channels only
        return
    levels = torch.tensor([80.0, 1.3823680, 0.002], dtype=torch.float64)  # ts 0, 22, 39 of 40
    two = sample_multistep(denoiser, 80 * noise, levels, Replay(5))
    torch.testing.assert_close(
        draw(latents=noise.clone(), num_inference_steps=None, timesteps=[22, 0]),
        two.clamp(-1, 1),
        rtol=0,
        atol=1e-4,
    )
    # What diffusers writes itself is read back as the same network.
    pipeline.save_pretrained(str(tmp_path / "b"))
    found, flags = converter.read_folder(str(tmp_path / "b"))
    assert_same(dict(sorted(found.items())), dict(sorted(net.state_dict().items())))
    assert flags["steps"] == 40 and flags["num_head_channels"] == 32


def test_a_teacher_is_drawn_by_edms_euler_steps(tmp_path, hf_diffusers):
    """The scheduler and the pipeline of the folder against our Euler sampler, and the card's own words."""
    config = adm("imagenet", training_mode="edm", in_channels=1, sigma_max=60.0)
    net = network(config)
    converter.write_folder(str(tmp_path / "t"), net.state_dict(), config)
    pipeline = hf_diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "t"), trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler).__name__ == "EDMEulerScheduler" and pipeline.config.time_scale == 1000
    noise, labels = torch.randn(2, 1, 16, 16), torch.tensor([7, 3])
    with torch.no_grad():
        drawn = pipeline(2, 5, labels, latents=noise, output_type="pt").images

    def denoise(x, sigma):
        return Denoiser(net, EDMPrecond())(x, sigma, y=labels)

    own = run_sampler("euler", denoise, 60 * noise, None, steps=5, sigma_max=60.0)
    torch.testing.assert_close(2 * drawn - 1, own.clamp(-1, 1), rtol=0, atol=1e-4)
    pictures = pipeline(2, 1, [7, 3]).images
    assert [(p.mode, p.size) for p in pictures] == [("L", (16, 16))] * 2


def test_a_teachers_folder_is_read_back(tmp_path):
    pytest.importorskip("safetensors")
    config = adm("lsun", training_mode="edm", sigma_max=60.0)
    state = network(config).state_dict()
    converter.write_folder(str(tmp_path), state, config)
    assert (tmp_path / "pipeline.py").read_text().startswith('"""The pipeline of an exported EDM teacher.')
    found, flags = converter.read_folder(str(tmp_path))
    assert_same(dict(sorted(found.items())), dict(sorted(state.items())))
    assert (flags["training_mode"], flags["sigma_max"], flags["time_scale"]) == ("edm", 60.0, 0.0)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["time_scale"]  # a folder of others, whose network takes the scheduler's own times
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert converter.read_folder(str(tmp_path))[1]["time_scale"] == 1.0


FIELDS = {
    "unet/config.json": {
        "block_out_channels": [None, [], ["32"], 32, [0, 32], [1.5]],
        "sample_size": ["16", 0, None, True],
        "layers_per_block": ["2", 10**9],
        "in_channels": [None, "3"],
        "num_class_embeds": ["10"],
        "down_block_types": [5, [5]],
    },
    "scheduler/scheduler_config.json": {
        "num_train_timesteps": ["40", 0, 10**12],
        "sigma_max": [float("nan"), "80", None],
        "_class_name": [5],
    },
}


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [(file, name, v) for file, fields in FIELDS.items() for name, values in fields.items() for v in values],
)
def test_types_in_the_configuration_of_a_folder(tmp_path, file, field, value):
    pytest.importorskip("safetensors")
    config = adm("imagenet")
    converter.write_folder(str(tmp_path / "f"), network(config).state_dict(), config)
    content = json.loads((tmp_path / "f" / file).read_text())
    (tmp_path / "f" / file).write_text(json.dumps({**content, field: value}))
    with pytest.raises(UserError) as caught:
        converter.read_folder(str(tmp_path / "f"))
    assert str(tmp_path / "f") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", "5"])
def test_json_that_is_no_configuration(tmp_path, text):
    pytest.importorskip("safetensors")
    config = adm("imagenet")
    converter.write_folder(str(tmp_path / "f"), network(config).state_dict(), config)
    (tmp_path / "f" / "unet" / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"unet/config\.json"):
        converter.read_folder(str(tmp_path / "f"))
