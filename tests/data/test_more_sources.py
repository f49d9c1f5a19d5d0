"""npz under usual names, WebDataset tars, data sets of other libraries."""

import io
import json
import struct
import sys
import tarfile
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from cm.commands import prepare as prepare_command
from cm.config import plugins
from cm.data.archives import open_items
from cm.data.facts import describe
from cm.data.libraries import as_source
from cm.data.prepare import prepare
from cm.data.sources import open_source
from cm.errors import UserError
from cm.runtime.torchvision_operators import declare_missing_operators


def png(value, size=6):
    out = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(out, format="PNG")
    return out.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    "names", [("x_train", "y_train"), ("images", "labels"), ("X", "y"), ("data", "target")]
)
@pytest.mark.parametrize("shape", [(5, 4, 4), (5, 4, 4, 3), (5, 3, 4, 4)])
def test_npz_under_usual_names(names, shape, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.savez(
        tmp_path / "d.npz", **{names[0]: pixels, names[1]: np.arange(5)[:, None] % 2, "other": np.zeros(3)}
    )
    source = open_source(str(tmp_path / "d.npz"))
    assert source.shape == (4, 4, 3 if len(shape) == 4 else 1)
    expected = pixels[2].transpose(1, 2, 0) if shape[1] == 3 else pixels[2].reshape(source.shape)
    assert (source.read(2) == expected).all() and (source.gather([2])[0] == expected).all()
    assert source.labels("auto").indices.tolist() == [0, 1, 0, 1, 0]


def test_npz_without_images_says_what_is_there(tmp_path):
    np.savez(tmp_path / "d.npz", weights=np.zeros(3), bias=np.zeros(1))
    with pytest.raises(UserError, match="bias, weights; images are looked for under arr_0, images, x_train"):
        open_source(str(tmp_path / "d.npz"))
    np.savez(tmp_path / "d.npz", x_train=np.zeros((2, 4, 4)))
    with pytest.raises(UserError, match="x_train is float64"):
        open_source(str(tmp_path / "d.npz"))


@pytest.mark.parametrize(
    "values, advice",
    [
        (np.linspace(0, 1, 32), r"0 to 1; expected uint8 images: save \(x \* 255\)"),
        (np.linspace(-1, 1, 32), r"-1 to 1.*\(\(x \+ 1\) \* 127.5\)"),
        (np.arange(32), r"0 to 31.*save x.clip"),
    ],
)
def test_npz_of_other_numbers_says_how_they_become_images(values, advice, tmp_path):
    np.savez_compressed(tmp_path / "d.npz", images=values.reshape(2, 4, 4))
    with pytest.raises(UserError, match=advice):
        open_source(str(tmp_path / "d.npz"))


def test_labels_of_an_npz_may_be_names_but_not_rows(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    np.savez(tmp_path / "d.npz", images=pixels, labels=np.array(["dog", "cat", "emu", "cat"]))
    labels = open_source(str(tmp_path / "d.npz")).labels("auto")
    assert labels.classes == ("cat", "dog", "emu") and labels.indices.tolist() == [1, 0, 2, 0]
    np.savez(tmp_path / "d.npz", images=pixels, labels=np.eye(4))
    with pytest.raises(UserError, match=r"float64 \(4, 4\); labels must be one integer.*labels.argmax\(1\)"):
        open_source(str(tmp_path / "d.npz"))


@pytest.mark.parametrize("labels", ["cls", "json", "names"])
def test_webdataset(labels, tmp_path):
    for shard in range(2):
        files = {}
        for i in range(3):
            files[f"{i:04d}.png"] = png(10 * (3 * shard + i))
            label = {"cls": ("cls", b"%d" % (i % 2)), "json": ("json", json.dumps({"label": i % 2}).encode())}
            ending, content = label.get(labels, ("cls", b"cat" if i % 2 else b"bird"))
            files[f"{i:04d}.{ending}"] = content
        write_tar(tmp_path / f"s-{shard:02d}.tar", files)
    for path in (f"{tmp_path}/s-{{00..01}}.tar", str(tmp_path)):
        source = open_source(path)
        assert len(source) == 6 and source.read(4) == png(40)
        table = source.labels("auto")
        assert table.indices.tolist() == [0, 1, 0] * 2
        assert table.classes == (("bird", "cat") if labels == "names" else ("0", "1"))
    items = open_items(f"{tmp_path}/s-00.tar")
    assert [name for name, _ in items.images][2].endswith("0002.png") and items.total == 3


def test_a_tar_without_labels_is_no_webdataset(tmp_path):
    write_tar(tmp_path / "x.tar", {"cat/1.png": png(1), "dog/1.png": png(2)})
    assert open_items(f"{tmp_path}/x.tar").description.startswith("tar")


def test_torchvision_by_name():
    declare_missing_operators()  # a torchvision that does not fit torch is imported all the same
    pytest.importorskip("torchvision")
    facts = describe("torchvision:FakeData")
    assert (facts.count, facts.side, facts.channels) == (1000, 224, 3) and len(facts.classes) == 10
    with pytest.raises(UserError, match="did you mean FashionMNIST"):
        open_source("torchvision:FashonMNIST")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"\[datasets\]"):
        open_source("hf:cifar10")


class Pairs(torch.utils.data.Dataset):
    """Images of one form with the labels 0, 1, 0, 1."""

    classes = ("cat", "dog")

    def __init__(self, form, label=int):
        self.form, self.label = form, label

    def __len__(self):
        return 4

    def __getitem__(self, index):
        pixels = np.full((5, 5, 3), index, np.uint8)
        return self.form(pixels), self.label(index % 2)


@pytest.mark.parametrize(
    "form",
    [
        Image.fromarray,
        lambda a: a,
        lambda a: torch.from_numpy(a).permute(2, 0, 1),
        lambda a: torch.from_numpy(a).permute(2, 0, 1) / 255,
        lambda a: a[..., 0],
    ],
)
def test_data_sets_in_the_form_of_torch(form):
    source = as_source(Pairs(form), "mine:")
    assert source.read(3).tolist() == np.full((5, 5, source.read(3).shape[2]), 3).tolist()
    table = source.labels("auto")
    assert (table.indices.tolist(), table.classes) == ([0, 1, 0, 1], ("cat", "dog"))


def test_what_is_no_image_or_label_is_named():
    for form, said in (
        (lambda a: a.astype(int), "mine: image 1: is int64; expected uint8"),
        (lambda a: a / 100.0 - 1, "is float64"),
        (lambda a: a[:, :, :2], r"has shape \(5, 5, 2\)"),
    ):
        with pytest.raises(UserError, match=said):
            as_source(Pairs(form), "mine").read(1)
    with pytest.raises(UserError, match="mine: image 0: has no whole number as its label"):
        as_source(Pairs(Image.fromarray, label=lambda i: "cat"), "mine").labels("auto")


PLUGIN = """
import numpy as np, torch
from cm import register

@register.data_source("pairs-of-torch", matches=lambda path: path == "pairs:")
class Images(torch.utils.data.Dataset):
    def __init__(self, path):
        self.targets = [0, 1, 0]
    def __len__(self):
        return 3
    def __getitem__(self, index):
        return np.full((8, 8), 40 * index, np.uint8), index % 2
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_of_torch_by_a_plugin_can_be_prepared(workers, tmp_path, monkeypatch, capsys):
    (tmp_path / "own.py").write_text(PLUGIN)
    line = [
        "cm",
        "pairs:",
        str(tmp_path / "d"),
        "--plugin",
        str(tmp_path / "own.py"),
        "--num_workers",
        str(workers),
    ]
    monkeypatch.setattr(sys, "argv", line)
    try:
        prepare_command.main(prepare_command.parse_flags())
    finally:
        plugins.forget(str(tmp_path / "own.py"))
    assert "--image_size 8" in capsys.readouterr().out
    made = open_source(str(tmp_path / "d"))
    assert made.read(2)[0, 0].tolist() == [80] and made.labels("auto").indices.tolist() == [0, 1, 0]


class Rows(list):
    """A split in the form that the package `datasets` documents: rows by number, columns by name, features."""

    def __init__(self, names=("cat", "dog")):
        super().__init__({"img": Image.new("RGB", (6, 6), (i, 0, 0)), "label": i % 2} for i in range(4))
        label = (
            type("ClassLabel", (), {"names": [*names]})()
            if names
            else type("Value", (), {"dtype": "int64"})()
        )
        self.features = {"label": label, "img": type("Image", (), {})()}

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


def test_data_sets_of_hugging_face_in_their_forms(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*names, **how):
        asked.append((*names, how))
        return Rows(names=() if names[0] == "me/plain" else ("cat", "dog"))

    stub = ModuleType("datasets")
    stub.load_dataset, stub.load_from_disk = load_dataset, lambda path: {"train": Rows(), "test": Rows()}
    monkeypatch.setitem(sys.modules, "datasets", stub)
    source = open_source("hf:me/set/small@test")
    assert asked.pop() == ("me/set", "small", {"split": "test"})
    assert source.labels("auto").classes == ("cat", "dog") and source.read(3)[0, 0].tolist() == [3, 0, 0]
    assert open_source("hf:me/plain").labels("auto").indices.tolist() == [0, 1, 0, 1]
    assert asked.pop() == ("me/plain", {"split": "train"})
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    before = [*open_source(str(tmp_path / "x.parquet")).identity()]
    assert asked.pop() == ("parquet", {"data_files": str(tmp_path / "x.parquet"), "split": "train"})
    (tmp_path / "x.parquet").write_bytes(b"PAR1 more")
    assert [*open_source(str(tmp_path / "x.parquet")).identity()] != before
    open_source(f"hf:{tmp_path}")
    assert asked.pop() == (str(tmp_path), {"split": "train"})
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert len(open_source(f"hf:{tmp_path}@test")) == 4
    for name, said in ((f"{tmp_path}@dev", "no split dev: it has train, test"), ("", "name is missing")):
        with pytest.raises(UserError, match=said):
            open_source(f"hf:{name}")
    with pytest.raises(UserError, match="no such file"):
        open_source(str(tmp_path / "y.parquet"))


def test_the_package_datasets_itself(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = Rows()
    kinds = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    made = datasets.Dataset.from_dict({name: rows[name] for name in ("img", "label")}, features=kinds)
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "x.parquet"))
    for path in (f"hf:{tmp_path}/saved", str(tmp_path / "x.parquet")):
        source = open_source(path)
        assert source.labels("auto").indices.tolist() == [0, 1, 0, 1] and source.read(2)[5, 5].tolist() == [
            2,
            0,
            0,
        ]


def test_sources_of_every_kind_can_be_prepared(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "named.npz", images=pixels)
    write_tar(
        tmp_path / "w-0.tar", {f"{i}.png": png(i) for i in range(4)} | {f"{i}.cls": b"1" for i in range(4)}
    )
    header = struct.pack(">BBBB3I", 0, 0, 8, 3, 4, 8, 8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + pixels[..., 0].tobytes())
    for name in ("named.npz", "w-0.tar", "train-images-idx3-ubyte"):
        manifest = prepare(str(tmp_path / name), str(tmp_path / f"out-{name}"), image_size=8)
        assert (manifest["count"], manifest["passed_over"]) == (4, 0), name
