"""Reading EDM's pickles: nothing in them is run, and small files take little memory."""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from cm.errors import UserError
from cm.tools.convert import edm_pickle
from cm.tools.convert.formats import READERS, Source, convert, detect
from tests.helpers.convert_models import network
from tests.helpers.edm_pickles import Persistent, snapshot, song
from tests.helpers.memory import at_most


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "function", [print, eval, getattr, io.open, torch.load, nn.functional.silu, zipfile.ZipFile]
)
def test_no_function_of_a_pickle_is_called(tmp_path, function, protocol, capsys):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"ema": Call(function, "1")}, protocol=protocol))
    with pytest.raises(UserError, match="refused: its pickle asks for") as caught:
        edm_pickle.load_pickle(str(path))
    assert "\n" not in str(caught.value)
    assert not capsys.readouterr().out


def test_code_inside_a_torch_zip_or_a_nested_tensor_is_not_run(tmp_path, capsys):
    path = tmp_path / "x.pt"
    torch.save({"net": Call(print, "torch_utils.persistence")}, path)
    assert detect(str(path)) == "edm"  # by its text only
    with pytest.raises(UserError, match="print"):
        edm_pickle.load_pickle(str(path))
    inner = pickle.dumps(Call(print, "inner"))
    path.write_bytes(pickle.dumps({"ema": Call(torch.storage._load_from_bytes, inner)}))
    with pytest.raises(UserError, match=r"x\.pt: refused: its pickle asks for builtins\.print"):
        edm_pickle.load_pickle(str(path))
    assert not capsys.readouterr().out


def test_classes_of_torch_and_numpy_become_records(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(
        pickle.dumps({"array": np.arange(3), "scalar": np.float32(1), "module": nn.Linear(2, 3), "n": 5})
    )
    content = edm_pickle.load_pickle(str(path))
    assert content["n"] == 5
    assert all(isinstance(content[name], edm_pickle.Record) for name in ("array", "scalar", "module"))
    assert [name for name, _ in edm_pickle.module_tensors(content["module"])] == ["weight", "bias"]


def expanded() -> dict:
    """One weight that says it is 10^12."""
    holder = nn.Module()
    holder.model = nn.Module()
    holder.model.register_buffer("w", torch.zeros(1).expand(10**6, 10**6))
    return snapshot(holder.model)


def repeated() -> bytes:
    """A memo of one text, made into bytes again and again: each call copies it."""
    text = b"(X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x01"
    return b"\x80\x02" + text + b"c_codecs\nencode\nq\x020" + b"h\x02h\x01\x85R" * 10_000 + b"t."


def holding_itself() -> bytes:
    module = Persistent("EDMPrecond", {"_modules": {}, "_parameters": {}})
    module.state["_modules"]["model"] = module
    return pickle.dumps({"ema": module})


BOMBS = {
    "memo": lambda: b"\x80\x02Nr" + struct.pack("<I", 10**8) + b".",
    "memo in text": lambda: b"\x80\x02Np100000000\n.",
    "buffer": lambda: b"\x80\x05\x96" + struct.pack("<Q", 10**10) + b".",
    "bytes": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 10**11) + b".",
    "bytearray": lambda: pickle.dumps({"ema": Call(bytearray, 10**10)}, protocol=2),
    "repeated call": repeated,
    "many operations": lambda: b"\x80\x02" + b"N0" * 3_000_000 + b".",
    "a module that holds itself": holding_itself,
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_pickles_take_little_memory(name, tmp_path, edm_modules):
    path = tmp_path / "x.pkl"
    path.write_bytes(BOMBS[name]())
    with at_most(200 << 20), pytest.raises(UserError) as caught:
        READERS["edm"](Source(str(path)))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_weights_that_are_views_of_one_value_are_refused(tmp_path, edm_modules):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(expanded()))
    with pytest.raises(UserError, match=r"does not hold the values of w, of shape \(1000000, 1000000\)"):
        READERS["edm"](Source(str(path)))


def test_a_compressed_zip_is_not_unpacked(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("x/data.pkl", bytes(1 << 28))
    with at_most(100 << 20), pytest.raises(UserError, match="would unpack to more than its size"):
        convert(Source(str(path)), str(tmp_path / "new.pt"), "cm", {})


def test_damaged_pickles_are_refused_in_one_line(tmp_path, edm_modules):
    path = tmp_path / "x.pkl"
    whole = pickle.dumps(snapshot(network(song())))
    for damaged in (
        whole[: len(whole) // 2],
        b"\x80\x04.",
        b"\x80\x04K\x01R.",
        b"\x80\x04ccm.errors\nUserError\n)R.",
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            edm_pickle.load_pickle(str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(UserError, match=r"not one of torch\.save"):
        edm_pickle.load_pickle(str(path))
