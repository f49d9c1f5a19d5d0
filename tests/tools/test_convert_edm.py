"""EDM's checkpoints: the layout of its ADM network, both ways, and pickles read without running code."""

import pickle
import pickletools
import zipfile

import pytest
import torch
from torch import nn

from cm.config.rows import NETWORKS
from cm.config.scripts import SampleConfig
from cm.diffusion.precond import denoiser_precond
from cm.errors import UserError
from cm.models.pretrained import load_pretrained
from cm.storage.weights import load_weights
from cm.tools.convert import edm_layout
from cm.tools.convert.formats import READERS, Source, convert, detect
from tests.helpers import edm_reference as reference
from tests.helpers import golden_data
from tests.helpers.convert_models import adm, assert_same, network, to_edm
from tests.helpers.edm_pickles import persistent, snapshot, song


def edm_adm(**given) -> dict:
    """Flags of the narrowest ADM network that EDM's grouping of channels allows."""
    options = dict(
        image_size=8,
        num_channels=128,
        num_head_channels=64,
        channel_mult="1,1.5",
        num_res_blocks=1,
        attention_resolutions="4",
        class_cond=True,
        num_classes=3,
        time_scale=1.0,
        training_mode="edm",
    )
    return adm("imagenet", **{**options, **given})


def test_imagenet_layout_has_the_published_number_of_entries():
    golden = golden_data.json("checkpoint_layouts")["imagenet64_edm_cd_ct"]
    state = {name: torch.empty(shape, device="meta") for name, shape in golden["state_dict"]}
    told = {k: v for k, v in golden["config"].items() if k != "use_fp16"}
    config = adm("imagenet", channel_mult="", **{**told, "num_classes": 1000, "num_head_channels": 64})
    config["num_res_blocks"] = 3
    converted = to_edm(state, config)
    assert len(converted) == 553
    filters = [name for name in converted if name.endswith("resample_filter")]
    assert sum(t.numel() for n, t in converted.items() if n not in filters) == 295_899_267
    assert "enc.32x32_down.skip.resample_filter" in filters and len(filters) == 12
    assert "enc.32x32_down.skip.weight" not in converted
    assert converted["map_label.weight"].shape == (768, 1000)
    assert converted["dec.8x8_in0.qkv.weight"].shape == (2304, 768, 1, 1)
    assert "dec.16x16_up.conv0.weight" in converted and "dec.8x8_up.conv0.weight" not in converted
    assert converted["dec.64x64_block3.conv0.weight"].shape == (192, 384, 3, 3)
    found = edm_layout.identify(converted, "x")
    same = (
        "image_size",
        "num_channels",
        "num_res_blocks",
        "attention_resolutions",
        "class_cond",
        "num_classes",
    )
    assert {n: found[n] for n in same} == {n: config[n] for n in same}
    assert (found["channel_mult"], found["time_scale"]) == ("1,2,3,4", 1.0)


@pytest.mark.parametrize("attention", ["4", "8,4"])
def test_adm_in_both_layouts_gives_the_same_output(attention):
    config = edm_adm(attention_resolutions=attention)
    net = network(config).double()
    state = net.state_dict()
    converted = to_edm(state, config)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    c_noise, y = torch.tensor([-1.5, 1.0], dtype=torch.float64), torch.tensor([2, 0])
    expected = reference.dhariwal_unet(converted, x, c_noise, y)
    # Our time features are fp32, whatever the dtype of the times.
    torch.testing.assert_close(net(x, c_noise, y), expected, rtol=1e-5, atol=1e-5)
    back, found = edm_layout.from_edm(converted)
    assert_same(dict(sorted(back.items())), dict(sorted(state.items())))
    assert found["attention_resolutions"] == attention


def test_networks_that_the_layouts_do_not_share_are_refused():
    config = edm_adm()
    state = network(config).state_dict()
    converted = to_edm(state, config)
    with pytest.raises(UserError, match="heads of 64 channels"):
        to_edm(state, {**config, "num_head_channels": 32})
    with pytest.raises(UserError, match="--resblock_updown True only"):
        to_edm(state, {**config, "resblock_updown": False})
    narrow = adm("imagenet", class_cond=False, num_head_channels=64, num_channels=64)
    narrow = to_edm(network(narrow).state_dict(), narrow)
    with pytest.raises(UserError, match="32 groups"):
        edm_layout.from_edm(narrow)
    fir = {**converted, "enc.4x4_down.conv0.resample_filter": torch.ones(1, 1, 4, 4) / 16}
    with pytest.raises(UserError, match="box filter"):
        edm_layout.from_edm(fir)
    with pytest.raises(UserError, match=r"has dec\.8x8_block7\.conv0\.weight"):
        edm_layout.from_edm({**converted, "dec.8x8_block7.conv0.weight": torch.zeros(1)})
    del converted["out_conv.bias"]
    with pytest.raises(UserError, match="out"):
        edm_layout.from_edm(converted)


class InEdmLayout(nn.Module):
    """Any state dict as nested modules."""

    def __init__(self, state: dict):
        super().__init__()
        for name, tensor in state.items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_buffer(leaf, tensor)


@pytest.mark.parametrize(
    "config",
    [song(), song("ddpmpp", class_cond=True, num_classes=4, augment_dim=9)],
    ids=["ncsnpp", "ddpmpp"],
)
def test_song_unet_pickle_becomes_a_model_that_samples(tmp_path, edm_modules, config):
    net = network(config)
    path = tmp_path / "edm.pkl"
    path.write_bytes(pickle.dumps(snapshot(net)))
    assert detect(str(path)) == "edm"
    line = convert(Source(str(path)), str(tmp_path / "edm.pt"), "cm", {})
    assert config["network"] in line
    state, meta = load_weights(tmp_path / "edm.pt")
    assert_same(state, net.state_dict())
    assert (meta["config"]["training_mode"], meta["config"]["augment_dim"]) == ("edm", config["augment_dim"])

    model = load_pretrained(SampleConfig(model_path=str(tmp_path / "edm.pt"), device="cpu"))
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 20.0])
    y = torch.tensor([3, 1]) if config["class_cond"] else None
    wide = {name: t.double() for name, t in state.items()}
    variance = sigma.double()[:, None, None, None] ** 2 + 0.25
    raw = reference.song_unet(wide, x.double() / variance.sqrt(), sigma.double().log() / 4, y)
    expected = 0.25 / variance * x + (variance - 0.25).sqrt() * 0.5 / variance.sqrt() * raw
    out = model.denoiser(x, sigma, **({} if y is None else {"y": y}))
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "column"), [("VPPrecond", "vp"), ("VEPrecond", "ve"), ("iDDPMPrecond", "iddpm")]
)
def test_pickles_of_the_other_columns_keep_their_preconditioning(name, column, tmp_path, edm_modules):
    path = tmp_path / "edm.pkl"
    path.write_bytes(pickle.dumps(snapshot(network(song("ddpmpp")), precond=name)))
    convert(Source(str(path)), str(tmp_path / "edm.pt"), "cm", {})
    model = load_pretrained(SampleConfig(model_path=str(tmp_path / "edm.pt"), device="cpu"))
    assert model.config.precond == column
    assert model.denoiser.precond == denoiser_precond(column, time_scale=1.0)


# Constants of each class as EDM's constructor leaves them on the object
CONSTANTS = {
    "VPPrecond": dict(beta_d=19.9, beta_min=0.1, M=1000, epsilon_t=1e-5, sigma_min=0.001, sigma_max=152.2),
    "VEPrecond": dict(sigma_min=0.02, sigma_max=100),
    "iDDPMPrecond": dict(C_1=0.001, C_2=0.008, M=1000, sigma_min=0.0064254, sigma_max=20291.2),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("VPPrecond", (0.002, 80)), ("VEPrecond", (0.02, 100)), ("iDDPMPrecond", (0.006425413, 80))],
)
def test_pickles_keep_the_noise_levels_of_their_network(name, expected, tmp_path, edm_modules):
    path = tmp_path / "edm.pkl"
    path.write_bytes(pickle.dumps(snapshot(network(song("ddpmpp")), name, **CONSTANTS[name])))
    convert(Source(str(path)), str(tmp_path / "edm.pt"), "cm", {})
    config = load_weights(tmp_path / "edm.pt")[1]["config"]
    assert (config["sigma_min"], config["sigma_max"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "constant", "value"),
    [
        ("VPPrecond", "beta_d", 10.0),
        ("VPPrecond", "beta_min", 0.5),
        ("VPPrecond", "M", 500),
        ("VPPrecond", "epsilon_t", 1e-4),
        ("iDDPMPrecond", "M", 200),
        ("iDDPMPrecond", "C_1", 0.01),
        ("iDDPMPrecond", "C_2", 0.02),
    ],
)
def test_other_constants_of_a_preconditioning_are_refused(name, constant, value, tmp_path, edm_modules):
    path = tmp_path / "edm.pkl"
    constants = {**CONSTANTS[name], constant: value}
    path.write_bytes(pickle.dumps(snapshot(network(song("ddpmpp")), name, **constants)))
    with pytest.raises(UserError, match=rf"has {name}\({constant}={value:g}\); --precond \w+ has"):
        READERS["edm"](Source(str(path)))


@pytest.mark.parametrize("value", ["0.5", float("nan"), None, [1]])
def test_constants_that_are_no_numbers_are_refused(value, tmp_path, edm_modules):
    path = tmp_path / "edm.pkl"
    path.write_bytes(pickle.dumps(snapshot(network(song()), sigma_data=value)))
    with pytest.raises(UserError, match="sigma_data of its EDMPrecond is no number"):
        READERS["edm"](Source(str(path)))


def test_adm_pickle_becomes_a_model_on_its_own_clock(tmp_path, edm_modules):
    config = edm_adm()
    in_edm = to_edm(network(config).state_dict(), config)
    path = tmp_path / "adm.pkl"
    path.write_bytes(pickle.dumps(snapshot(InEdmLayout(in_edm))))
    convert(Source(str(path)), str(tmp_path / "adm.pt"), "cm", {})
    model = load_pretrained(SampleConfig(model_path=str(tmp_path / "adm.pt"), device="cpu"))
    assert model.denoiser.precond.time_scale == 1.0 != NETWORKS["adm"].clock
    x, sigma, y = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 20.0]), torch.tensor([2, 1])
    variance = sigma[:, None, None, None] ** 2 + 0.25
    raw = reference.dhariwal_unet(in_edm, x / variance.sqrt(), sigma.log() / 4, y)
    expected = 0.25 / variance * x + (variance - 0.25).sqrt() * 0.5 / variance.sqrt() * raw
    torch.testing.assert_close(model.denoiser(x, sigma, y=y), expected, rtol=1e-4, atol=1e-4)


def test_training_states_are_read(tmp_path, edm_modules):
    """torch.save writes pickle protocol 2, in which numpy's bytes are a call of _codecs.encode."""
    config = song()
    net = network(config)
    holder = nn.Module()
    holder.model = net
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    net.requires_grad_()(torch.zeros(1, 3, 8, 8), torch.zeros(1)).sum().backward()
    optimizer.step()
    path = tmp_path / "training-state-000100.pt"
    content = {"net": persistent(holder, "EDMPrecond"), "optimizer_state": optimizer.state_dict()}
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        operations = pickletools.genops(archive.read(f"{path.stem}/data.pkl"))
    assert {"_codecs encode", "numpy dtype"} <= {name for o, name, _ in operations if o.name == "GLOBAL"}
    assert detect(str(path)) == "edm"
    state, found = READERS["edm"](Source(str(path)))
    assert_same(state, net.state_dict())
    assert found["network"] == "ncsnpp"


def test_bare_state_dicts_in_edm_layout_are_recognised(tmp_path):
    net = network(song())
    torch.save({f"model.{name}": t for name, t in net.state_dict().items()}, tmp_path / "bare.pt")
    state, found = READERS[detect(str(tmp_path / "bare.pt"))](Source(str(tmp_path / "bare.pt")))
    assert_same(state, net.state_dict())
    assert found["network"] == "ncsnpp" and "training_mode" not in found


def test_other_preconditionings_and_contents_are_refused(tmp_path, edm_modules):
    path = tmp_path / "x.pkl"
    net = network(song())

    def refuses(content, message: str) -> None:
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=message) as caught:
            READERS["edm"](Source(str(path)))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    refuses(snapshot(net, precond="TrigPrecond"), "preconditioning TrigPrecond")
    refuses({"ema": None}, "no network under ema or net")
    refuses([1, 2], "no network under ema or net")
    refuses(snapshot(nn.Module()), "no tensors of a network")
