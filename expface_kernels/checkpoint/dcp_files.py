"""The files of torch.distributed.checkpoint, read so that no pickle in them can run code."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

INDEX_FILE = ".metadata"


def read_index(source: Path) -> Metadata:
    """What is in a checkpoint directory; FileNotFoundError where there is none."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such directory")
    if not (source / INDEX_FILE).is_file():
        raise FileNotFoundError(f"{source}: expected a checkpoint directory, got one without {INDEX_FILE}")
    return Reader(source).read_metadata()


def check_files(source: Path, metadata: Metadata) -> None:
    """Every file is there that the index names, and is long enough: FileNotFoundError, ValueError."""
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source / name}: a shard of the checkpoint is missing")
        size = (source / name).stat().st_size
        if size < end:
            raise ValueError(f"{source / name}: expected at least {end} bytes, got {size}: it is truncated")


class Reader(dcp.FileSystemReader):
    """torch's reader, whose index may hold nothing but the types of an index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = Path(self.path) / INDEX_FILE
        with open(index, "rb") as file:
            try:
                metadata = _IndexUnpickler(file).load()
            except _ForbiddenType:
                raise
            except Exception as error:  # a damaged pickle may raise anything
                raise ValueError(f"{index}: damaged or truncated: {type(error).__name__}: {error}") from error
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{self.path}: expected Metadata in {INDEX_FILE}, got {type(metadata).__name__}")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _ForbiddenType(pickle.UnpicklingError):
    """An index names something that no index is made of."""


class _IndexUnpickler(pickle.Unpickler):
    """Looks up the types of a checkpoint's index and no others, so that loading one runs no code."""

    allowed = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("collections", "OrderedDict"),
        }
        | {
            (module, name)
            for module in ("pathlib", "pathlib._local")
            for name in ("PosixPath", "WindowsPath")
        }
        | {
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "_MEM_FORMAT_ENCODING",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
            )
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in self.allowed:
            raise _ForbiddenType(f"{INDEX_FILE}: expected a checkpoint's index, got {module}.{name}")
        return super().find_class(module, name)


class Planner(DefaultLoadPlanner):
    """torch's planner, but values that are no tensors are read with weights_only=True."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        *path, last = self.mappings[read_item.dest_index.fqn]
        inside: Any = self.original_state_dict
        for key in path:
            inside = inside[key]
        inside[last] = torch.load(value, weights_only=True)
