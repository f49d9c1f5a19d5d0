"""EDM2's checkpoints: pickles in NVIDIA's layout, made here, become models of ours without any code being run."""

import pickle

import pytest
import torch
from torch import nn

from cm.config.scripts import SampleConfig
from cm.errors import UserError
from cm.models.pretrained import load_pretrained
from cm.networks.edm2 import Block, EDM2UNet
from cm.storage.weights import load_weights
from cm.tools.convert import edm2_layout
from cm.tools.convert.formats import READERS, Source, convert, detect
from tests.helpers.convert_models import assert_same
from tests.helpers.edm_pickles import Persistent
from tests.helpers.golden_data import later


def small(**given) -> EDM2UNet:
    """A narrow network with labels whose gains are not zero."""
    torch.manual_seed(0)
    options = dict(
        image_size=8,
        in_channels=3,
        out_channels=3,
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_head_channels=8,
        num_classes=5,
        logvar_channels=16,
    )
    net = EDM2UNet(**{**options, **given})
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("gain"):
                p.fill_(0.6)
    return net.eval()


def pickled(
    net: EDM2UNet, name: str = "Precond", dtype=torch.float16, turned: bool = False, **changes
) -> dict:
    """What network-snapshot-*.pkl of EDM2 holds: a Precond with the U-Net and the head beside each other.

    turned: everything in the opposite order. changes: other attributes of the blocks.
    """

    def ordered(items: dict) -> dict:
        return dict(reversed(items.items())) if turned else items

    def wrap(module: nn.Module, **state):
        if isinstance(module, nn.ModuleDict):
            copy = nn.ModuleDict()
            copy._modules.update(ordered({n: wrap(c) for n, c in module._modules.items()}))
            return copy
        if isinstance(module, Block):
            state = dict(
                num_heads=module.num_heads, res_balance=0.3, attn_balance=0.3, clip_act=256, dropout=0
            )
            state |= {
                "flavor": module.flavor,
                "resample_mode": module.resample_mode,
                "resample_filter": [1, 1],
            }
            state |= changes
        tensors = {
            kind: ordered({n: convert_type(t) for n, t in getattr(module, kind).items()})
            for kind in ("_parameters", "_buffers")
        }
        modules = {n: wrap(c) for n, c in module._modules.items() if not isinstance(c, nn.Dropout)}
        return Persistent(
            type(module).__name__, {**tensors, "_modules": ordered(modules), "training": False, **state}
        )

    def convert_type(t):
        t = t.detach().to(dtype)
        return nn.Parameter(t, requires_grad=False) if dtype == torch.float32 else t

    head = {n: c for n, c in net._modules.items() if n.startswith("logvar")}
    torso = nn.Module()
    torso._parameters.update(net._parameters)
    torso._modules.update({n: c for n, c in net._modules.items() if n not in head})
    unet = wrap(torso, label_balance=0.5, concat_balance=0.5)
    modules = {"unet": unet} | {n: wrap(c) for n, c in head.items()}
    state = {"_parameters": {}, "_buffers": {}, "_modules": ordered(modules), "training": False}
    state |= {"img_resolution": 8, "img_channels": 3, "label_dim": 5, "use_fp16": True, "sigma_data": 0.5}
    return {
        "encoder": Persistent("StandardRGBEncoder", {"init": None}),
        "dataset_kwargs": {"path": "x"},
        "loss_fn": Persistent("EDM2Loss", {"P_mean": -0.8, "P_std": 1.6, "sigma_data": 0.5}),
        "ema": Persistent(name, state),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("turned", [False, True])
def test_a_pickle_becomes_a_model_that_samples(tmp_path, edm_modules, protocol, turned):
    net = small()
    path = tmp_path / "edm2-img8-xs-1073741-0.075.pkl"
    path.write_bytes(pickle.dumps(pickled(net, turned=turned), protocol=protocol))
    assert detect(str(path)) == "edm"
    with pytest.raises(UserError, match=r"it was not loaded .*; cm convert makes a model of it"):
        load_weights(path)
    line = convert(Source(str(path)), str(tmp_path / "edm2.pt"), "cm", {})
    assert "edm2, " in line
    state, meta = load_weights(tmp_path / "edm2.pt")
    assert_same(state, {name: t.half().float() for name, t in net.state_dict().items()})
    told = meta["config"]
    assert (told["num_head_channels"], told["logvar_channels"], told["sigma_data"]) == (8, 16, 0.5)
    assert (told["ema_sigma_rel"], told["training_mode"], told["precond"]) == (0.075, "edm", "edm")
    model = load_pretrained(SampleConfig(model_path=str(tmp_path / "edm2.pt"), device="cpu"))
    net.load_state_dict(state)
    x, sigma, y = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 20.0]), torch.tensor([3, 1])
    variance = sigma[:, None, None, None] ** 2 + 0.25
    expected = 0.25 / variance * x + (variance - 0.25).sqrt() * 0.5 / variance.sqrt() * net(
        x / variance.sqrt(), sigma.log() / 4, y
    )
    torch.testing.assert_close(model.denoiser(x, sigma, y=y), expected)


def test_parameters_in_fp32_and_networks_without_labels_or_head(tmp_path, edm_modules):
    net = small(num_classes=None, logvar_channels=0, attention_resolutions=(), channel_mult=(1, 2, 2))
    path = tmp_path / "training-state.pt"
    torch.save({"net": pickled(net, dtype=torch.float32)["ema"], "optimizer_state": {"lr": 1e-2}}, path)
    state, told = READERS[detect(str(path))](Source(str(path)))
    assert_same(state, net.state_dict())
    assert (told["class_cond"], told["logvar_channels"], told["attention_resolutions"]) == (False, 0, "")
    assert told["channel_mult"] == "1,2,2" and "ema_sigma_rel" not in told


def test_golden_state_dicts_are_recognised_by_their_names(tmp_path):
    """Bare files need heads of 64 channels; what the golden network has is passed on."""
    g = later("edm2_net")
    n = g.config["network"]
    state, told = edm2_layout.from_edm2(g.state_dict("net/sd/"), "x", n["channels_per_head"])
    assert told["image_size"] == n["img_resolution"] and told["num_classes"] == n["label_dim"]
    assert told["channel_mult"] == ",".join(f"{m:g}" for m in n["channel_mult"])
    assert told["attention_resolutions"] == ",".join(map(str, n["attn_resolutions"]))
    assert set(state) == {name.removeprefix("unet.") for name in g.state_dict("net/sd/")}
    scm = later("scm_net")
    heads = scm.config["networks"]["edm2"]["channels_per_head"]
    _, told = edm2_layout.from_edm2(scm.state_dict("edm2/sd/"), "x", heads)
    assert told["network"] == "edm2_scm"
    wide = small(model_channels=64, num_head_channels=64)
    torch.save({f"unet.{name}": t for name, t in wide.state_dict().items()}, tmp_path / "bare.pt")
    found, told = READERS[detect(str(tmp_path / "bare.pt"))](Source(str(tmp_path / "bare.pt")))
    assert_same(found, wide.state_dict())
    torch.save(g.state_dict("net/sd/"), tmp_path / "narrow.pt")
    with pytest.raises(UserError, match="64 channels of an attention head do not divide 32"):
        READERS["torch"](Source(str(tmp_path / "narrow.pt")))


def behind(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


WRAPPED = {
    "a wrapper's names": behind("module."),
    "two wrappers' names": behind("_orig_mod.module."),
    "without unet.": behind("net."),
    "a training checkpoint": lambda state: {"ema": behind("unet.")(state), "step": 3},
    "both": lambda state: {"model": behind("module.unet.")(state), "ema": behind("module.unet.")(state)},
    "deep": lambda state: {"a": {"state_dict": behind("unet.")(state)}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_checkpoints_are_unwrapped_here_and_named_elsewhere(tmp_path, kind):
    net = small(model_channels=64, num_head_channels=64)
    path = tmp_path / "wrapped.pt"
    torch.save(WRAPPED[kind](net.state_dict()), path)
    state, told = READERS[detect(str(path))](Source(str(path)))
    assert_same(state, net.state_dict())
    assert told["network"] == "edm2"
    with pytest.raises(UserError, match=r"(begin with|it holds) .*convert_checkpoint\.py takes the network"):
        load_pretrained(SampleConfig(model_path=str(path), device="cpu", training_mode="edm"))


def test_pickles_of_other_classes_or_other_numbers_are_refused_in_one_line(tmp_path, edm_modules):
    path = tmp_path / "x.pkl"

    def refuses(content, message: str) -> None:
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=message) as caught:
            READERS["edm"](Source(str(path)))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    refuses(pickled(small(), name="EDM3Precond"), "preconditioning EDM3Precond; known are .*, Precond")
    refuses(pickled(small(), res_balance=0.4), "Block has res_balance 0.4; our network has 0.3")
    refuses(pickled(small(), resample_filter=[1, 3, 3, 1]), "Block has resample_filter")
    refuses({"ema": Persistent("Precond", {"_modules": {}})}, "holds no tensors of a network")
    broken = pickled(small())
    unet = broken["ema"].state["_modules"]["unet"].state["_modules"]
    del unet["emb_noise"]
    refuses(broken, "emb_noise.weight: missing in the file")
