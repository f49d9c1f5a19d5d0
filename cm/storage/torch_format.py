"""Files of torch.save, as zips and in the format before them: tensors and plain values are read, nothing else.

torch.load(weights_only=True) runs no code either, but lets a file of a few bytes take any amount of memory, and its
refusals advise how to run the code after all.
"""

import io
import os
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cm.runtime.inputs import open_regular
from cm.storage.unpickle import MAX_OPERATIONS, Refused, RestrictedUnpickler

LEGACY = b"\x80\x02\x8a\x0a"  # how files of torch.save began before they were zips
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

DTYPES = {
    name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype) and "q" not in name
}
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
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


class TensorUnpickler(RestrictedUnpickler):
    """Knows tensors, their containers and plain values.

    storage: (key, dtype, number of values) -> flat tensor of what lies beside the pickle.
    """

    def __init__(
        self,
        file: BinaryIO,
        storage: Callable[[Any, torch.dtype, int], Tensor] | None,
        source: str = "",
        room: int = 0,
    ):
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_of_type,
            ("builtins", "set"): self._set,
            ("__builtin__", "set"): self._set,
            ("collections", "OrderedDict"): self._ordered,
        }
        super().__init__(file, {**PLAIN, **known}, source, room)
        self.storage = storage

    def persistent_load(self, pid: tuple) -> Tensor:
        """A storage that lies beside the pickle, as a flat tensor."""
        kind, dtype, key, _location, count, *view = pid
        if kind != "storage" or self.storage is None or type(count) is not int:
            raise Refused(f"{self.source}refused: it refers to data outside of itself")
        flat = self.storage(key, dtype, count)
        if view and view[0] is not None:
            _key, offset, length = view[0]
            return flat[offset : offset + length]
        return flat

    def _tensor(self, storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
        return storage.as_strided(size, stride, offset)

    def _tensor_of_type(self, storage, offset, size, stride, requires_grad, hooks, dtype, *_) -> Tensor:
        return self._tensor(storage.view(dtype), offset, size, stride)

    def _ordered(self, items: Sequence = ()) -> OrderedDict:
        self.spend(100 * len(items))
        return OrderedDict(items)

    def _set(self, items: list) -> set:
        self.spend(64 * len(items))
        return set(items)


def _same(value: Any = (), *_: Any) -> Any:
    return value


# (module, name) in a pickle -> what it becomes, where that takes no room
PLAIN: dict[tuple[str, str], Any] = {
    **{("torch", name): dtype for name, dtype in {**DTYPES, **STORAGES}.items()},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch._utils", "_rebuild_parameter"): _same,
    ("torch._utils", "_rebuild_parameter_with_state"): _same,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda function, kind, arguments, state: function(*arguments),
    ("torch", "Tensor"): "a type that is named, never called",
    ("torch.nn.parameter", "Parameter"): "a type that is named, never called",
    ("torch", "Size"): _same,
    ("torch", "device"): lambda *_: "cpu",
    ("collections", "Counter"): _same,
}


def read_torch(path: str | os.PathLike) -> Any:
    """What torch.save wrote: tensors, on the CPU, in dicts, lists and tuples.

    Refused (UserError) for anything else in it; whatever zipfile, pickle or torch raises where bytes are damaged.
    """
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return read_legacy(file)
        with zipfile.ZipFile(file) as archive:
            check_zip(archive, os.fstat(file.fileno()).st_size)
            return read_zip(archive)


def check_zip(archive: zipfile.ZipFile, size: int) -> None:
    """BadZipFile for a zip of `size` bytes that would unpack to more than that, or whose bytes are damaged."""
    members = archive.infolist()
    for member in members:
        if member.filename.startswith("/") or ".." in member.filename.split("/"):
            raise zipfile.BadZipFile(f"its member {member.filename!r} leads out of the file")
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    # torch never compresses. Members that overlap in the file count twice here.
    if not stored or sum(member.file_size for member in members) > size:
        raise zipfile.BadZipFile("it would unpack to more than its size, as no file of torch does")
    if damaged := archive.testzip():
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}: the file is damaged")


def read_zip(
    archive: zipfile.ZipFile, unpickler: type[TensorUnpickler] = TensorUnpickler, source: str = ""
) -> Any:
    """The object in a zip that `check_zip` has passed."""
    root = next((n[: -len("data.pkl")] for n in archive.namelist() if n.endswith("/data.pkl")), None)
    if root is None:
        raise zipfile.BadZipFile("it is a zip file, but not one of torch.save")
    read: dict[str, Tensor] = {}

    def storage(key: Any, dtype: torch.dtype, count: int) -> Tensor:
        name = f"{root}data/{key}"
        if name not in read:
            flat = torch.empty(archive.getinfo(name).file_size, dtype=torch.uint8)
            archive.fp.seek(_start(archive, name))
            _fill(flat, archive.fp)
            read[name] = flat
        return read[name].view(dtype)[:count]

    room = 3 * sum(member.file_size for member in archive.infolist()) + (1 << 20)
    return unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), storage, source, room).load()


def _start(archive: zipfile.ZipFile, name: str) -> int:
    """Where the bytes of a stored member begin: behind its local header, its name and extra fields."""
    offset = archive.getinfo(name).header_offset
    archive.fp.seek(offset)
    lengths = struct.unpack("<HH", archive.fp.read(30)[26:])
    return offset + 30 + sum(lengths)


def read_legacy(file: BinaryIO, source: str = "") -> Any:
    """The object in a file of the format before zips: pickles, then the values of the storages that they name."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    storages: dict[Any, Tensor] = {}
    room = length

    def storage(key: Any, dtype: torch.dtype, count: int) -> Tensor:
        nonlocal room
        if key not in storages:
            room -= count * dtype.itemsize
            if count < 0 or room < 0:
                raise Refused(f"{source}refused: it names more values than it holds")
            storages[key] = torch.empty(count, dtype=dtype)
        return storages[key]

    magic, _version, _system = (RestrictedUnpickler(file, {}, source).load() for _ in range(3))
    if magic != LEGACY_MAGIC:
        raise ValueError("it does not begin as files of torch do")
    content = TensorUnpickler(file, storage, source).load()
    for key in RestrictedUnpickler(file, {}, source).load():
        count = int.from_bytes(file.read(8), "little")
        flat = storages.pop(key)
        if count != len(flat):
            raise ValueError(f"a storage has {count} values in place of {len(flat)}")
        _fill(flat.view(torch.uint8), file)
    if storages:
        raise ValueError("it lacks values of its tensors")
    return content


def check_size(content: Any, size: int, source: str) -> None:
    """Refused where `content` is far more than a file of `size` bytes can hold, for whoever copies it.

    Tensors may be views of the same few values (of a single one where a stride is 0), and containers may hold the same
    ones again and again.
    """
    room, entries = 4 * size + (1 << 20), MAX_OPERATIONS
    stack = [("a tensor", content)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, Tensor):
            room -= value.numel() * max(value.element_size(), 4)
            if room < 0:
                raise Refused(f"{source} does not hold the values of {name}, of shape {tuple(value.shape)}")
        elif isinstance(value, dict | list | tuple):
            entries -= len(value)
            if entries < 0:
                raise Refused(f"{source} holds the same containers again and again")
            items = value.items() if isinstance(value, dict) else ((name, item) for item in value)
            stack += [(key[:200] if isinstance(key, str) else name, item) for key, item in items]


def _fill(flat: Tensor, file: BinaryIO) -> None:
    """Read the bytes of a flat uint8 tensor."""
    if file.readinto(memoryview(flat.numpy())) != len(flat):
        raise EOFError("the file ends too early")
