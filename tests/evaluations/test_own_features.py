"""Feature networks of one's own: a class in a file, a TorchScript file, a model of timm."""

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from cm.errors import UserError
from evaluations.evaluator import Options, evaluate
from evaluations.features import load_features
from evaluations.npz_io import open_images, open_reference
from evaluations.protocols import PROTOCOLS, choose_protocol
from tests.helpers.eval_files import stripes, write_npz

CPU = torch.device("cpu")
SOURCE = """
import torch
from torch import nn

class Means(nn.Module):  # mean of each colour and of its square
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        assert x.shape[1] == 3
        return self.scale * torch.cat([x, x.square()], dim=1)

def flat():
    return lambda x: x.flatten(1)

def pair():
    return lambda x: (x, x)

def scalar():
    return lambda x: x.mean()

def fails():
    raise KeyError("no weights")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(SOURCE)
    return path


def test_a_class_in_a_file(file, tmp_path):
    network = load_features(f"{file}:Means", "", CPU)
    images = torch.from_numpy(stripes(5)[0])  # grey: three channels for a network that does not take one
    network.check(tuple(images.shape), "x")
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = 2 * torch.cat([x.mean((2, 3)).expand(-1, 3), x.square().mean((2, 3)).expand(-1, 3)], 1)
    torch.testing.assert_close(network(images)["pool"], expected)
    assert network.dims == {"pool": 6} and network.name == "nets.py:Means"
    assert network.sha256 == load_features(f"{file}:Means", "", CPU).sha256
    with pytest.raises(UserError, match="SHA-256"):
        load_features(f"{file}:Means", "", CPU, sha256="0" * 8)


def test_it_needs_no_protocol(file, tmp_path):
    reference = open_reference(str(write_npz(tmp_path / "ref.npz", 40)))
    protocol, strict = choose_protocol("", f"{file}:flat", reference)
    assert protocol == PROTOCOLS["any"] and not strict
    samples = [open_images(str(write_npz(tmp_path / "s.npz", 30, seed=1)))]
    network = load_features(f"{file}:flat", "", CPU)
    options = Options(protocol, (*protocol.metrics, "inception_score", "accuracy"))
    result = evaluate(reference, samples, network, options)
    assert set(result["metrics"]) == set(protocol.metrics) and result["comparable"]
    assert set(result["not_measured"]) == {"inception_score", "accuracy"}
    rgb = [open_images(str(write_npz(tmp_path / "c.npz", 30, channels=3)))]
    with pytest.raises(UserError, match="gives other features for these images"):
        evaluate(reference, samples + rgb, network, options)


@pytest.mark.parametrize(
    "name, words",
    [
        ("Mean", "did you mean Means?"),
        ("fails", "KeyError: 'no weights'"),
        ("pair", "returned a tuple"),
        ("scalar", r"2 images gave the shape \(\)"),
    ],
)
def test_what_is_no_feature_network(file, name, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        load_features(f"{file}:{name}", "", CPU).check((5, 8, 8, 1), "x")


def test_torchscript(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    torch.jit.trace(net, torch.zeros(1, 1, 8, 8)).save(tmp_path / "net.pt")
    network = load_features(f"torchscript={tmp_path / 'net.pt'}", "", CPU)
    images = torch.from_numpy(stripes(3)[0])
    network.check(tuple(images.shape), "x")
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(network(images)["pool"], net(x).mean((2, 3)).detach())
    np.savez(tmp_path / "no.pt.npz", a=1)
    for path, words in (("no.pt.npz", "no TorchScript file"), ("gone.pt", "no such file")):
        with pytest.raises(UserError, match=words):
            load_features(f"torchscript={tmp_path / path}", "", CPU)
    with pytest.raises(UserError, match="does not take images of 8x8x3"):
        network.check((5, 8, 8, 3), "x")


def test_timm(monkeypatch):
    """With a timm of our own: pretrained weights are asked for, images are resized and normalised as it says."""
    asked = []

    def create_model(name, pretrained, num_classes):
        asked.append((name, pretrained, num_classes))
        if name == "nothing":
            raise RuntimeError("Unknown model (nothing)\nmore")
        return nn.Flatten()

    config = {"input_size": (3, 4, 4), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    timm = types.SimpleNamespace(
        create_model=create_model, data=types.SimpleNamespace(resolve_model_data_config=lambda net: config)
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    network = load_features("timm=tiny", "", CPU)
    network.check((2, 8, 8, 1), "x")
    assert asked == [("tiny", True, 0)] and network.dims == {"pool": 48}
    grey = torch.full((1, 8, 8, 1), 255, dtype=torch.uint8)
    torch.testing.assert_close(network(grey)["pool"], torch.full((1, 48), 2.0))
    with pytest.raises(UserError, match=r"timm=nothing: Unknown model \(nothing\)$"):
        load_features("timm=nothing", "", CPU)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"\[timm\]"):
        load_features("timm=tiny", "", CPU)
