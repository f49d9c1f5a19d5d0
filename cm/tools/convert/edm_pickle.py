"""Reading EDM's pickles (network-snapshot-*.pkl, training-state-*.pt) without running any code from them.

Such a file is a pickle of Python objects whose classes travel as source text, which EDM's own loader executes. Here
every class becomes an inert record of its name and state; tensors are rebuilt by three functions of this file; any
other name is refused. Only then are the tensors read out of the records.
"""

import io
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cm.data.unpickle import RestrictedUnpickler, one_line
from cm.errors import UserError

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Record:
    """An object of the file: class name and state. It has no behaviour, whatever the class had."""

    class_name = ""

    def __new__(cls, *args, **kwargs):
        record = super().__new__(cls)
        record.state = {}
        return record

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.state = state

    # Subclasses of containers are filled by these.
    def append(self, item):
        """Forget an item."""

    def __setitem__(self, key, value):
        pass


def load_pickle(path: str) -> Any:
    """The content of an EDM pickle, plain or inside a torch zip; objects are `Record`s, tensors are on the CPU.

    UserError in one line for a file that is damaged or asks for anything but the parts of such a network.
    """
    with one_line(f"{path} is not a readable EDM pickle"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _load_zip(archive, path)
        with open(path, "rb") as file:
            return _Unpickler(file, path).load()


def _load_zip(archive: zipfile.ZipFile, path: str) -> Any:
    root = next((n[: -len("data.pkl")] for n in archive.namelist() if n.endswith("/data.pkl")), None)
    if root is None:
        raise UserError(f"{path} is a zip file, but not one of torch.save")
    content = io.BytesIO(archive.read(f"{root}data.pkl"))
    return _Unpickler(content, path, lambda key: archive.read(f"{root}data/{key}")).load()


class _Unpickler(RestrictedUnpickler):
    """Knows classes of torch and numpy as records, and the storages that lie beside the pickle in a zip."""

    def __init__(self, file: BinaryIO, path: str, read_storage: Callable[[str], bytes] | None = None):
        super().__init__(file, BUILDERS, f"{path}: ")
        self.read_storage = read_storage

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in BUILDERS
        if not known and (module.startswith(("torch.nn.modules.", "numpy.")) or module == "numpy"):
            return _record_class(name)
        return super().find_class(module, name)

    def persistent_load(self, pid: tuple) -> Tensor:
        """A storage that lies beside the pickle, as a flat tensor."""
        kind, dtype, key, _location, _size = pid
        if kind != "storage" or self.read_storage is None:
            raise UserError(f"{self.source}refused: it refers to data outside of itself")
        data = bytearray(self.read_storage(key))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _record_class(name: str) -> type[Record]:
    """A new class each time: what a pickle does to its classes reaches no other file."""
    return type("Record", (Record,), {"class_name": name})


def _persistent(meta: dict) -> Record:
    record = Record()
    record.class_name, record.state = str(meta["class_name"]), dict(meta.get("state") or {})
    return record


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset).clone()


def _storage(data: bytes) -> Tensor:
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return torch.empty(0, dtype=storage.dtype).set_(storage)


# (module, name) in a pickle -> what it becomes
BUILDERS: dict[tuple[str, str], Any] = {
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *args: "cpu",
    ("dnnlib.util", "EasyDict"): dict,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}


def module_tensors(module: Record, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all parameters and buffers of a recorded torch module, in state-dict order."""
    skipped = module.state.get("_non_persistent_buffers_set") or ()
    own = {**(module.state.get("_parameters") or {}), **(module.state.get("_buffers") or {})}
    for name, value in own.items():
        if isinstance(value, Tensor) and name not in skipped:
            yield prefix + name, value
    for name, child in (module.state.get("_modules") or {}).items():
        if isinstance(child, Record):
            yield from module_tensors(child, f"{prefix}{name}.")


# Class in the pickle -> --precond, and the range of noise levels where the common one does not fit
COLUMNS: dict[str, tuple[str, dict[str, float]]] = {
    "EDMPrecond": ("edm", {}),
    "VPPrecond": ("vp", {}),
    "VEPrecond": ("ve", {"sigma_min": 0.02, "sigma_max": 100.0}),
    "iDDPMPrecond": ("iddpm", {"sigma_min": 0.0065}),
}


def read_edm_pickle(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict of the bare network, facts about its preconditioning) of an EDM pickle.

    The moving average (`ema`) is taken where there is one, else the network itself (`net`).
    """
    content = load_pickle(path)
    if isinstance(content, dict):
        content = content.get("ema") or content.get("net")
    if not isinstance(content, Record) or "_modules" not in content.state:
        raise UserError(f"{path} holds no network under ema or net")
    if content.class_name not in COLUMNS:
        raise UserError(
            f"{path} has the preconditioning {content.class_name}; known are {', '.join(COLUMNS)}"
        )
    state = dict(module_tensors(content))
    network = {name[len("model.") :]: t.float() for name, t in state.items() if name.startswith("model.")}
    if not network:
        raise UserError(f"{path} holds no tensors of a network")
    column, flags = COLUMNS[content.class_name]
    return network, {"precond": column, **flags, "sigma_data": float(content.state.get("sigma_data", 0.5))}


def is_pickle(path: str | Path) -> bool:
    """Whether a file starts like a binary pickle."""
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"
