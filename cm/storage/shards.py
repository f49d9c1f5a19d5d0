"""Shards of a checkpoint: what every rank of --shard fsdp wrote of its own part, by torch.distributed.checkpoint.

They stand for the files of weights that they were saved in the place of: a tensor is called FILE/NAME, so that a reader
who asks for the file gets it, put together from the parts. torch keeps its index as a pickle; here it is JSON, and
nothing that was saved can run code.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from cm.errors import UserError
from cm.runtime import distributed
from cm.runtime.files import whole_file
from cm.runtime.inputs import JSON_LIMIT, read_regular
from cm.storage.checkpoint import STATE
from cm.storage.filesystem import is_remote
from cm.storage.weights import Damaged, load_weights, parse_object

INDEX = "shards.json"
PICKLED = ".metadata"  # torch's index
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)
}


@dataclass(frozen=True)
class Place:
    """Where the bytes of a piece of a tensor lie, under the names that torch's reader asks for."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: tuple = ()


def save_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's part of tensors, distributed or the same on all ranks, into a folder that exists.

    All ranks must call it; UserError on all of them where one cannot write.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    try:
        saved = dcp.save(dict(tensors), storage_writer=writer)
    except dcp.CheckpointException as error:
        raise UserError(_causes(error)) from None
    if distributed.is_main():
        with whole_file(folder / INDEX) as file:
            file.write(json.dumps(_described(saved)).encode())
        (folder / PICKLED).unlink()


def _causes(error: dcp.CheckpointException) -> str:
    causes = "; ".join(f"rank {rank}: {problem}" for rank, (problem, _) in error.failures.items())
    return " ".join(causes.split())[:300]


def _described(saved: Metadata) -> dict[str, Any]:
    found = {
        name: {"dtype": str(t.properties.dtype).removeprefix("torch."), "size": list(t.size), "pieces": []}
        for name, t in saved.state_dict_metadata.items()
    }
    sizes = {
        (name, chunk.offsets): list(chunk.sizes)
        for name, t in saved.state_dict_metadata.items()
        for chunk in t.chunks
    }
    for key, place in saved.storage_data.items():
        begin = key.offset if key.offset is not None else torch.Size([0] * len(found[key.fqn]["size"]))
        where = [place.relative_path, place.offset, place.length]
        found[key.fqn]["pieces"].append([list(begin), sizes[key.fqn, begin], *where])
    return found


def read_index(folder: Path) -> dict[str, Any]:
    """What the shards of a checkpoint hold: FILE/NAME -> dtype, size, pieces; {} where there are none. Damaged if bad.

    Each piece has at least as many bytes in a file of the folder as its numbers take.
    """
    path = folder / INDEX
    if not path.is_file():
        return {}
    index = parse_object(read_regular(path, JSON_LIMIT), str(path))
    files = {name: os.path.getsize(folder / name) for name in os.listdir(folder)}
    for name, entry in index.items():
        try:
            width, size = DTYPES[entry["dtype"]].itemsize, [_count(n) for n in entry["size"]]
            values = 0
            for begin, extent, file, offset, length in entry["pieces"]:
                held = math.prod(_count(n) for n in extent)
                inside = len(begin) == len(size) == len(extent) and all(
                    _count(b) + e <= s for b, e, s in zip(begin, extent, size)
                )
                if not inside or _count(offset) + _count(length) > files[file] or held * width > length:
                    raise ValueError("a piece lies outside")
                values += held
            if values != math.prod(size):
                raise ValueError("pieces are missing")
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(f"{path} is no index of shards: {name[:80]} ({error})") from None
    return index


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:20]!r} is no count")
    return value


class _Reader(dcp.FileSystemReader):
    """torch's reader of shards with our index in the place of its pickle."""

    def __init__(self, folder: Path, index: Mapping[str, Any]):
        super().__init__(folder)
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        described, places = {}, {}
        for name, entry in self.index.items():
            chunks = []
            for begin, extent, *place in entry["pieces"]:
                chunks.append(ChunkStorageMetadata(torch.Size(begin), torch.Size(extent)))
                places[MetadataIndex(name, begin)] = Place(*place)
            properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
            described[name] = TensorStorageMetadata(properties, torch.Size(entry["size"]), chunks)
        return Metadata(described, storage_data=places)


def load_shards(
    folder: Path, tensors: Mapping[str, Tensor], index: Mapping[str, Any], **options: Any
) -> None:
    """Fill tensors, distributed or whole, from the shards of a checkpoint, whatever the number of ranks that saved.

    All ranks must call it; with no_dist=True this process alone. UserError where they do not fit.
    """
    for name, tensor in tensors.items():
        if name not in index or list(tensor.shape) != index[name]["size"]:
            there = f"has shape {tuple(index[name]['size'])}" if name in index else "is missing"
            raise UserError(f"{folder}: {name} {there}, the run has shape {tuple(tensor.shape)}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # no_dist is what was asked for
            dcp.load(dict(tensors), storage_reader=_Reader(folder, index), **options)
    except dcp.CheckpointException as error:  # no Exception
        raise UserError(f"the shards in {folder} cannot be read: {_causes(error)}") from None


def names_of(index: Mapping[str, Any]) -> list[str]:
    """Names of the files that the shards of a checkpoint stand for."""
    return sorted({name.partition("/")[0] for name in index})


def load_part(path: str | os.PathLike) -> tuple[dict, dict | None]:
    """(content, meta) of a file of a checkpoint: of the file itself, or put together from the shards in its place.

    The state of an optimizer comes back as {"state": {parameter number: moments}}.
    """
    if is_remote(str(path)) or os.path.isfile(path):
        return load_weights(path)
    path = Path(path)
    index = read_index(path.parent)
    wanted = {name: entry for name, entry in index.items() if name.startswith(f"{path.name}/")}
    if not wanted:
        return load_weights(path)  # which says what is wrong
    tensors = {name: torch.empty(e["size"], dtype=DTYPES[e["dtype"]]) for name, e in wanted.items()}
    load_shards(path.parent, tensors, index, no_dist=True)
    content = {name.partition("/")[2]: tensor for name, tensor in tensors.items()}
    if path.name.startswith("opt"):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in content.items():
            number, _, key = name.partition("/")
            state.setdefault(int(number), {})[key] = tensor
        content = {"state": state}
    return content, parse_object(read_regular(path.parent / STATE, JSON_LIMIT), str(path.parent / STATE))
