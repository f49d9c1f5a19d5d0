"""torch.distributed.checkpoint between tensors and the index of `cm.storage.shards`. Its import takes half a second."""

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


@dataclass(frozen=True)
class Place:
    """Where the bytes of a piece of a tensor lie, under the names that torch's reader asks for."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: tuple = ()


def write_pieces(folder: Path, tensors: Mapping[str, Tensor]) -> Metadata:
    """Write this rank's part of tensors; returns what torch knows of all parts. UserError where one cannot write."""
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    try:
        return dcp.save(dict(tensors), storage_writer=writer)
    except dcp.CheckpointException as error:
        raise UserError(_causes(error)) from None


def read_pieces(
    folder: Path, tensors: Mapping[str, Tensor], index: Mapping[str, Any], **options: Any
) -> None:
    """Fill tensors from the pieces that an index names. options: of dcp.load. UserError where that fails."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # no_dist is what was asked for
            dcp.load(dict(tensors), storage_reader=_Reader(folder, index), **options)
    except dcp.CheckpointException as error:  # no Exception
        raise UserError(f"the shards in {folder} cannot be read: {_causes(error)}") from None


def _causes(error: dcp.CheckpointException) -> str:
    causes = "; ".join(f"rank {rank}: {problem}" for rank, (problem, _) in error.failures.items())
    return " ".join(causes.split())[:300]


def described(saved: Metadata) -> dict[str, Any]:
    """The index of what was saved."""
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
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            described[name] = TensorStorageMetadata(properties, torch.Size(entry["size"]), chunks)
        return Metadata(described, storage_data=places)
