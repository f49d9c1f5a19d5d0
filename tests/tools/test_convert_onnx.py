"""ONNX export: what is written draws our images, for any batch; what does not is not kept."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cm.config.derived import stored_config
from cm.config.rows import NETWORKS
from cm.config.scripts import CmTrainConfig, configure
from cm.errors import UserError
from cm.models.factory import create_network
from cm.storage.weights import load_weights
from cm.tools.convert import onnx as exporter
from cm.tools.convert.formats import Source, convert
from tests.helpers.convert_models import flags
from tests.helpers.models import save_consistency_model

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# Narrow networks: enough that every kind of layer is in the graph
NARROW = {"image_size": 8, "in_channels": 3, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}
NARROW |= {"attention_resolutions": "4", "num_head_channels": 32}


@pytest.fixture
def packages():
    for name in PACKAGES:
        pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[onnx]'")


@pytest.fixture
def student(tmp_path) -> str:
    """A class-conditional consistency model of grey images."""
    save_consistency_model(tmp_path / "cd.pt", in_channels=1, class_cond=True, num_classes=3)
    return str(tmp_path / "cd.pt")


def left_in(folder: Path) -> list[str]:
    """Everything in a folder but the model that was converted."""
    return sorted(path.name for path in folder.iterdir() if path.name != "cd.pt")


def graph(path: Path, gain: float) -> None:
    """An ONNX file that returns its noise times `gain`."""
    import onnx

    shape, kinds = ["batch", 1, 8, 8], onnx.TensorProto
    noise = onnx.helper.make_tensor_value_info("noise", kinds.FLOAT, shape)
    labels = onnx.helper.make_tensor_value_info("labels", kinds.INT64, ["batch"])
    images = onnx.helper.make_tensor_value_info("images", kinds.FLOAT, shape)
    factor = onnx.helper.make_tensor("factor", kinds.FLOAT, [], [gain])
    node = onnx.helper.make_node("Mul", ["noise", "factor"], ["images"])
    made = onnx.helper.make_graph([node], "g", [noise, labels], [images], [factor])
    onnx.save(onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 17)]), path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: graph(path, 1.0), "draws other images than the model"),
        (lambda path: graph(path, float("nan")), "largest difference nan, allowed 0.0001"),
        (lambda path: path.write_bytes(b"no graph"), "does not run, nothing was written"),
    ],
)
def test_a_graph_that_draws_something_else_is_not_kept(
    tmp_path, student, packages, monkeypatch, write, message
):
    monkeypatch.setattr(exporter, "_export", lambda model, config, path, stored: write(path))
    with pytest.raises(UserError, match=message) as caught:
        convert(Source(student), str(tmp_path / "g.onnx"), "onnx", {})
    assert "\n" not in str(caught.value)
    assert left_in(tmp_path) == []


def test_an_earlier_export_stays_when_a_new_one_fails(tmp_path, student, packages, monkeypatch):
    monkeypatch.setattr(exporter, "_export", lambda model, config, path, stored: graph(path, 1.0))
    (tmp_path / "g.onnx").write_bytes(b"earlier")
    with pytest.raises(UserError):
        convert(Source(student), str(tmp_path / "g.onnx"), "onnx", {})
    assert (tmp_path / "g.onnx").read_bytes() == b"earlier"


def test_without_the_packages_it_is_one_line(tmp_path, student, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"--to onnx needs onnx: pip install '.*\[onnx\]'"):
        convert(Source(student), str(tmp_path / "g.onnx"), "onnx", {})
    assert left_in(tmp_path) == []


def test_only_one_step_generators_are_exported(tmp_path):
    with pytest.raises(UserError, match="one-step generators; this model is of edm"):
        exporter.write_onnx(str(tmp_path / "g.onnx"), {}, flags(training_mode="edm"))


def test_the_module_that_is_traced_is_the_one_step_sampler(student):
    state, meta = load_weights(student)
    model, config = exporter._model(state, meta["config"])

    class Eager:
        """In place of a session of onnxruntime."""

        def run(self, _, inputs):
            with torch.no_grad():
                return (model(*map(torch.from_numpy, inputs.values())).numpy(),)

    assert exporter._difference(Eager(), model, config, 3) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_onnxruntime_draws_our_images(tmp_path, packages, name):
    """The comparison is made by the export itself, on batches of sizes that it was not traced with."""
    import onnx
    import onnxruntime

    config = configure(CmTrainConfig, training_mode="consistency_training", network=name, **NARROW)
    torch.manual_seed(0)
    net, stored = create_network(config), {**stored_config(config), "steps": 18}
    with torch.no_grad():
        for p in net.parameters():  # what begins at zero would hide the rest
            p.add_(0.05 * torch.randn_like(p))
    exporter.write_onnx(str(tmp_path / "g.onnx"), net.state_dict(), stored)
    assert left_in(tmp_path) == ["g.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "g.onnx"))
    noise = torch.randn(5, 3, 8, 8).numpy()
    (images,) = session.run(None, {"noise": noise})
    assert images.shape == noise.shape and abs(images).max() <= 1
    meta = {p.key: p.value for p in onnx.load(tmp_path / "g.onnx").metadata_props}
    assert json.loads(meta["cm"])["config"]["network"] == name


@pytest.mark.slow
def test_the_card_draws_with_the_graph(tmp_path, student, packages, monkeypatch):
    (tmp_path / "out").mkdir()
    line = convert(Source(student), str(tmp_path / "out" / "g.onnx"), "onnx", {})
    assert line.endswith("README.md") and left_in(tmp_path / "out") == ["README.md", "g.onnx"]
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    found: dict = {}
    exec(code, found)
    assert found["images"].shape == (4, 1, 8, 8) and np.abs(found["images"]).max() <= 1
