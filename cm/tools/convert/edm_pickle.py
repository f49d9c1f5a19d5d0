"""Reading EDM's pickles (network-snapshot-*.pkl, training-state-*.pt) without running any code from them.

Such a file is a pickle of Python objects whose classes travel as source text, which EDM's own loader executes. Here
every class becomes an inert record of its name and state; tensors are rebuilt by functions of this file; any other
name is refused. Only then are the tensors read out of the records.
"""

import io
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cm.config.rows import PRECONDS
from cm.errors import UserError
from cm.runtime.inputs import open_regular
from cm.storage.torch_format import TensorUnpickler, check_size, check_zip, read_legacy, read_zip
from cm.storage.unpickle import one_line


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
    with one_line(f"{path} is not a readable EDM pickle"), open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return _Unpickler(file, None, f"{path}: ").load()
        with zipfile.ZipFile(file) as archive:
            check_zip(archive, os.fstat(file.fileno()).st_size)
            return read_zip(archive, _Unpickler, f"{path}: ")


class _Unpickler(TensorUnpickler):
    """Knows what torch pickles of tensors, what EDM adds, and other classes of torch and numpy as records."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.stand_ins |= {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
            ("torch.storage", "_load_from_bytes"): self._storage,
            ("dnnlib.util", "EasyDict"): type("EasyDict", (dict,), {"__init__": lambda self: None}),
        }
        self.records: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in self.stand_ins
        if not known and (module.startswith(("torch.nn.modules.", "numpy.")) or module == "numpy"):
            if name not in self.records:
                self.spend(2000)  # about what a class takes
                # Classes of this file's own: what a pickle does to them reaches no other file.
                self.records[name] = type("Record", (Record,), {"class_name": name})
            return self.records[name]
        return super().find_class(module, name)

    def _storage(self, data: bytes) -> Tensor:
        self.spend(len(data))
        return read_legacy(io.BytesIO(data), self.source)


def _persistent(meta: dict) -> Record:
    record = Record()
    record.class_name, record.state = meta["class_name"], meta.get("state") or {}
    if not isinstance(record.class_name, str) or not isinstance(record.state, dict):
        raise TypeError("an object without a name")
    return record


def module_tensors(module: Record, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all parameters and buffers of a recorded torch module, in state-dict order."""
    yield from _tensors(module, prefix, set())


def _tensors(module: Record, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if id(module) in seen:  # it may even hold itself
        raise ValueError(f"{prefix[:80]} appears twice")
    seen.add(id(module))
    skipped = module.state.get("_non_persistent_buffers_set") or ()
    for name, value in (*_named(module, "_parameters"), *_named(module, "_buffers")):
        if isinstance(value, Tensor) and name not in skipped:
            yield prefix + name, value
    for name, child in _named(module, "_modules"):
        if isinstance(child, Record):
            yield from _tensors(child, f"{prefix}{name}.", seen)


def _named(module: Record, kind: str) -> list[tuple[str, Any]]:
    members = module.state.get(kind) or {}
    return [(n, v) for n, v in members.items() if isinstance(n, str)] if isinstance(members, dict) else []


class Column(NamedTuple):
    """A class of EDM's preconditionings: its row of PRECONDS, and arguments that the row has in this form only."""

    precond: str
    fixed: dict[str, float]


EDM2 = "Precond"  # class of EDM2's networks in a pickle
COLUMNS: dict[str, Column] = {
    "EDMPrecond": Column("edm", {}),
    "VPPrecond": Column("vp", {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5}),
    "VEPrecond": Column("ve", {}),
    "iDDPMPrecond": Column("iddpm", {"C_1": 0.001, "C_2": 0.008, "M": 1000}),
}


def read_network(path: str) -> Record:
    """The network in an EDM pickle: the moving average (`ema`) where there is one, else the network itself (`net`)."""
    content = load_pickle(path)
    if isinstance(content, dict):
        content = next((content[name] for name in ("ema", "net") if content.get(name) is not None), None)
    if not isinstance(content, Record) or "_modules" not in content.state:
        raise UserError(f"{path} holds no network under ema or net")
    return content


def network_tensors(content: Record, path: str, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a recorded network whose names begin with `prefix`, without it, as float32."""
    with one_line(f"{path} holds no network"):
        found = {n.removeprefix(prefix): t for n, t in module_tensors(content) if n.startswith(prefix)}
        check_size(found, os.path.getsize(path), path)
        tensors = {name: tensor.float() for name, tensor in found.items()}
    if not tensors:
        raise UserError(f"{path} holds no tensors of a network")
    return tensors


def edm_network(content: Record, path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict of the bare network, facts about its preconditioning) of what an EDM pickle holds."""
    facts = _preconditioning(content, path)
    return network_tensors(content, path, "model."), facts


def _preconditioning(content: Record, path: str) -> dict[str, Any]:
    """Model flags of a recorded preconditioning; UserError where it is none of ours, in form or in its constants."""
    if content.class_name not in COLUMNS:
        raise UserError(
            f"{path} has the preconditioning {content.class_name[:80]}; known are {', '.join((*COLUMNS, EDM2))}"
        )
    column = COLUMNS[content.class_name]
    for name, ours in column.fixed.items():
        if (theirs := _number(content, name, ours, path)) != ours:
            raise UserError(
                f"{path} has {content.class_name}({name}={theirs:g}); --precond {column.precond} has {ours:g}"
            )
    facts: dict[str, Any] = {
        "precond": column.precond,
        "sigma_data": _number(content, "sigma_data", 0.5, path),
    }
    usual = {"sigma_min": 0.002, "sigma_max": 80.0, **(PRECONDS[column.precond].model or {})}
    # The network's own range within the usual one, as EDM's samplers take it. iDDPM's lowest level is a rounded one.
    low = max(_number(content, "sigma_min", usual["sigma_min"], path), usual["sigma_min"])
    high = min(_number(content, "sigma_max", usual["sigma_max"], path), usual["sigma_max"])
    if not low < high:
        raise UserError(f"{path} has no noise levels: sigma_min is {low:g}, sigma_max {high:g}")
    ranges = {"sigma_min": (low, 0.002), "sigma_max": (high, 80.0)}
    return facts | {name: value for name, (value, default) in ranges.items() if value != default}


def _number(content: Record, name: str, default: float, path: str) -> float:
    value = content.state.get(name, default)
    if not isinstance(value, int | float) or math.isnan(value):
        raise UserError(f"{path}: {name} of its {content.class_name} is no number")
    return float(value)


def is_pickle(path: str | Path) -> bool:
    """Whether a file starts like a binary pickle."""
    with open_regular(path) as file:
        return file.read(1) == b"\x80"
