"""Classifiers of guided-diffusion: layout, times, flags, guidance of a model by one."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cm.commands.cli import parse
from cm.commands.sample import run_image_sample
from cm.commands.train import run_train
from cm.config.scripts import EdmTrainConfig, SampleConfig, configure
from cm.errors import UserError
from cm.models.guided_diffusion import SCHEDULES, is_classifier
from cm.models.guides import load_guide, provenance
from cm.networks.classifier import EncoderUNetModel
from cm.storage.weights import save_weights

PLACE = {"image_size": 8, "in_channels": 3}


def network(**changes) -> EncoderUNetModel:
    """As the flags of `flags()` describe it, with random weights throughout."""
    torch.manual_seed(0)
    options = dict(
        image_size=8, in_channels=3, model_channels=64, out_channels=4, num_res_blocks=1, attention_resolutions=(1,),
        channel_mult=(1, 2), num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True,
    )  # fmt: skip
    model = EncoderUNetModel(**{**options, **changes})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model.eval()


def as_released(model: EncoderUNetModel) -> dict[str, torch.Tensor]:
    """Its weights as guided-diffusion has them: kernels of one dimension, rows of qkv by (head, three, channel)."""
    state = {}
    for name, tensor in model.state_dict().items():
        if ".qkv." in name:
            heads = len(tensor) // (3 * 64)
            tensor = torch.cat(
                [
                    tensor.unflatten(0, (3, heads, 64))[part, head]
                    for head in range(heads)
                    for part in range(3)
                ]
            )
        if name.endswith(("qkv.weight", "proj_out.weight")):
            tensor = tensor[..., 0]
        state[name] = tensor
    return state


def load(path, **model):
    """The guide of a model that is described by flags."""
    return load_guide(str(path), configure(SampleConfig, **PLACE | model), torch.device("cpu"))


@pytest.fixture
def released(tmp_path):
    save_weights(tmp_path / "8x8_classifier.pt", as_released(network()))
    return tmp_path / "8x8_classifier.pt"


def sigma_at(schedule: str, t: int) -> float:
    """sqrt((1 - abar_t) / abar_t) from the betas as the papers print them."""
    if schedule == "linear":
        betas = [1e-4 + (0.02 - 1e-4) * k / 999 for k in range(1000)]
    else:
        bar = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1001)]
        betas = [min(1 - bar[k + 1] / bar[k], 0.999) for k in range(1000)]
    abar = math.prod(1 - beta for beta in betas[: t + 1])
    return math.sqrt((1 - abar) / abar)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_times_are_the_steps_of_the_schedule(schedule):
    for t in (0, 1, 10, 500, 998, 999):
        sigma = sigma_at(schedule, t)
        c = SCHEDULES[schedule](torch.tensor([sigma], dtype=torch.float64))
        assert c.c_noise.item() == t
        assert c.c_in.item() == pytest.approx(1 / math.sqrt(1 + sigma**2), rel=1e-12)
    # Levels beyond either end take the nearest step.
    assert SCHEDULES[schedule](torch.tensor([1e-4, 1e6])).c_noise.tolist() == [0, 999]


def test_a_released_file_gives_the_logits_of_its_network(released):
    loaded = load(released)
    assert loaded.num_classes == 4 and provenance(loaded)["guide_path"] == str(released)
    x, t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), [0, 300, 700]
    sigma = torch.tensor([sigma_at("linear", k) for k in t])
    expected = network()(x / (1 + sigma**2).sqrt()[:, None, None, None], torch.tensor(t, dtype=torch.float32))
    torch.testing.assert_close(loaded.model.logits(x, sigma), expected, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in loaded.model.net.parameters())


def test_shapes_tell_the_published_classifier_of_64_pixels(tmp_path):
    """Four blocks a level, attention at 32, 16 and 8; 1000 classes, cosine noise."""
    options = dict(
        model_channels=128, num_res_blocks=4, attention_resolutions=(2, 4, 8), channel_mult=(1, 2, 3, 4)
    )
    with torch.device("meta"):
        model = EncoderUNetModel(
            image_size=64, in_channels=3, out_channels=1000, num_head_channels=64, use_scale_shift_norm=True,
            resblock_updown=True, **options,
        )  # fmt: skip
    state = as_released(model)
    assert is_classifier(state)
    save_weights(tmp_path / "c.pt", {name: torch.zeros(t.shape) for name, t in state.items()})
    loaded = load(tmp_path / "c.pt", image_size=64, num_classes=1000, class_cond=True)
    assert loaded.model.precond == SCHEDULES["cosine"] and loaded.num_classes == 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"use_scale_shift_norm": False},
        {"resblock_updown": False},
        {"num_res_blocks": 2, "attention_resolutions": (2,)},
        {"model_channels": 32, "channel_mult": (2, 4), "attention_resolutions": (1, 2)},
        {"channel_mult": (1,), "attention_resolutions": (1,)},
    ],
    ids=str,
)
def test_shapes_tell_every_network(changes, tmp_path):
    model = network(**changes)
    save_weights(tmp_path / "c.pt", as_released(model))
    loaded = load(tmp_path / "c.pt").model.net
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0, 500.0])
    torch.testing.assert_close(loaded(x, t), model(x, t), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named(released, tmp_path):
    with pytest.raises(
        UserError, match=r"8x8_classifier.pt does not fit images of 24 pixels: .* level has 4"
    ):
        load(released, image_size=24)
    state = as_released(network())
    state["out.0.weight"] = torch.ones(3)
    save_weights(tmp_path / "odd.pt", state)
    with pytest.raises(UserError, match=r"odd.pt does not fit the model: out.0.weight: \(3,\) in the file"):
        load(tmp_path / "odd.pt")
    with pytest.raises(UserError, match="has --in_channels 3, the model 1"):
        load(released, in_channels=1)
    with pytest.raises(UserError, match="has --num_classes 4, the model 10"):
        load(released, num_classes=10, class_cond=True)
    save_weights(tmp_path / "odd.pt", {"w": torch.ones(2)})
    with pytest.raises(UserError, match="is not the state dict of an ADM U-Net"):
        load(tmp_path / "odd.pt")
    save_weights(tmp_path / "cd.pt", {"w": torch.ones(2)}, {"config": {"training_mode": "sct"}})
    with pytest.raises(UserError, match=r"cd\.pt was trained by sct: a guide is a classifier"):
        load(tmp_path / "cd.pt")


def test_it_guides_a_model(released, tmp_path):
    images = np.random.RandomState(0).randint(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=images)
    argv = (
        "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 8 "
        "--num_head_channels 16 --global_batch_size 2 --num_workers 0 --preview_count 0 --ema_rate 0.9 "
        f"--total_training_steps 1 --data_dir {tmp_path}/images.npz --out_dir {tmp_path}/run"
    )
    run_train(parse(EdmTrainConfig, argv.split()))

    def sample(name, *more):
        argv = f"--model_path {tmp_path}/run --num_samples 4 --steps 3 --sampler euler --out_dir {tmp_path / name}"
        run_image_sample(parse(SampleConfig, [*argv.split(), *more]))
        with np.load(next((tmp_path / name).glob("*.npz"))) as arrays:
            return (
                arrays["arr_0"],
                arrays.get("arr_1"),
                json.loads(next(Path(tmp_path, name).glob("*.json")).read_text()),
            )

    free, _, _ = sample("free")
    guide = ["--guide", str(released)]
    steered, labels, meta = sample("steered", *guide, "--guidance", "30", "--classes", "0,1,2,3")
    assert labels.tolist() == [0, 1, 2, 3] and not np.array_equal(free, steered)
    assert meta["guide_path"] == str(released) and len(meta["guide_sha256"]) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"out.2.positional_embedding": torch.zeros(())},
        {"out.2.positional_embedding": torch.zeros(64, 1)},
        {"out.2.c_proj.weight": torch.zeros(())},
        {"time_embed.0.weight": torch.zeros(5)},
        {"middle_block.1.qkv.weight": torch.zeros(7, 1, 1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_tensors_of_unlikely_shapes_are_no_classifier(tmp_path, change):
    save_weights(tmp_path / "c.pt", {**as_released(network()), **change})
    with pytest.raises(UserError, match=r"c\.pt") as caught:
        load(tmp_path / "c.pt")
    assert "\n" not in str(caught.value)
