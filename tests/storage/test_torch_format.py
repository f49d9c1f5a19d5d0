"""Files of torch.save read without torch's unpickler: the same tensors, at a cost in proportion to the file."""

import io
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch

from cm.errors import UserError
from cm.storage.torch_format import read_torch
from cm.storage.weights import load_weights
from tests.helpers.memory import at_most

DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.uint16)


def contents() -> dict:
    """Everything that a state dict or an optimizer's state is made of."""
    base = torch.arange(24.0)
    state = torch.nn.Linear(3, 2).state_dict()
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.note = "attributes make another kind of pickle"
    return {
        **state,
        **{str(dtype): torch.ones(2, 3).to(dtype) for dtype in DTYPES},
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "a view": base[3:9].view(2, 3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "with attributes": parameter,
        "numbers": {"betas": (0.9, 0.999), "step": 7, "name": "x", "none": None, "flag": True, 3: b"bytes"},
        "kinds": [torch.float16, torch.Size([2, 3]), torch.device("cpu"), {1, 2}],
        "counter": Counter({2: 1}),
        "ordered": OrderedDict(a=torch.ones(1)),
    }


def same(a, b) -> bool:
    if isinstance(b, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
    if isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in b)
    if isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return str(a) == str(b) if isinstance(b, torch.device) else a == b


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
def test_files_of_torch_are_read_bit_by_bit(tmp_path, as_zip):
    written = contents()
    if not as_zip:
        del written[str(torch.uint16)]  # which the old format does not have
    torch.save(written, tmp_path / "x.pt", _use_new_zipfile_serialization=as_zip)
    read = read_torch(tmp_path / "x.pt")
    assert same(read, written)
    read["a view"].add_(1)
    torch.save(read, tmp_path / "y.pt")
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True)["a view"], written["a view"] + 1)


def test_tensors_that_share_values_still_do(tmp_path):
    base = torch.zeros(4)
    torch.save({"a": base, "b": base[1:]}, tmp_path / "x.pt")
    read = read_torch(tmp_path / "x.pt")
    read["a"][1] = 5
    assert read["b"][0] == 5


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def zipped(content: bytes) -> bytes:
    """A zip as torch writes it around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", content)
        archive.writestr("x/data/0", bytes(4))
    return buffer.getvalue()


def saved(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def nested() -> bytes:
    """Lists that hold the one before ten times: 10^30 entries."""
    value: list = [1]
    for _ in range(30):
        value = [value] * 10
    return pickle.dumps({"a": value}, protocol=2)


def legacy_claim() -> bytes:
    """A storage of 10^10 numbers in the old format."""
    content = saved({"a": torch.zeros(3)}, _use_new_zipfile_serialization=False)
    return content.replace(b"K\x03N", b"\x8a\x05" + (10**10).to_bytes(5, "little") + b"N", 1)


BOMBS = {
    "bytearray": lambda: zipped(pickle.dumps({"a": Call(bytearray, 10**10)}, protocol=2)),
    "tensor": lambda: zipped(pickle.dumps({"a": Call(torch.FloatTensor, 10**6, 10**6)}, protocol=2)),
    "memo": lambda: zipped(b"\x80\x02}r" + struct.pack("<I", 10**8) + b"."),
    "expanded": lambda: saved({"a": torch.zeros(1).expand(10**6, 10**6)}),
    "many views": lambda: saved({str(i): torch.zeros(1 << 18)[i:] for i in range(2)} | views()),
    "nested": lambda: zipped(nested()),
    "compressed": lambda: compressed(),
    "legacy": legacy_claim,
}


def views() -> dict:
    base = torch.zeros(1 << 18)
    return {f"v{i}": base[i:] for i in range(1000)}


def compressed() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("x/data/0", bytes(1 << 26))
    return buffer.getvalue()


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_takes_little_memory(name, tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(BOMBS[name]())
    with at_most(100 << 20), pytest.raises(UserError, match=r"w\.pt") as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)


def test_a_refusal_gives_no_advice_how_to_run_the_code(tmp_path):
    torch.save({"net": torch.nn.Linear(2, 2)}, tmp_path / "w.pt")
    with pytest.raises(UserError) as caught:
        load_weights(tmp_path / "w.pt")
    expected = "holds more than tensors and plain values; it was not loaded (refused: its pickle asks for"
    assert expected in str(caught.value) and "\x1b" not in str(caught.value)
