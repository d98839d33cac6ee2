"""Files of class centers: written whole or not at all, and open to the plain safetensors library.

A safetensors file is eight bytes with the header's length, the header in JSON, then the tensors' bytes
without gaps (little endian); so where a row lies is known before any is written, and every rank writes its
own.

C classes, all of them · D features
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from expface_kernels.checkpoint.table import DTYPES, STATE_PREFIX, WEIGHT, CentreTable, RowSpec, code_of
from expface_kernels.distributed.group import Group
from expface_kernels.distributed.ranges import ClassRange

OPTIMIZER_ENTRY = "optimizer"  # of the file's metadata: the optimizer's class


@contextlib.contextmanager
def written_whole(path: Path, group: Group) -> Iterator[Path]:
    """Yield a temporary name beside `path`, whose file or directory becomes `path` after the block.

    Every rank calls this, with a block that puts what it writes on the disk and fails on all ranks or none.
    What was at `path` stays as it was until all ranks have written, and if anything fails.
    """
    token = group.gather_json(uuid.uuid4().hex)[0]
    temporary = path.with_name(f".{path.name}.{token}.tmp")
    try:
        yield temporary
        with group.all_or_none(f"to name {path}"):
            if group.rank == 0:
                if temporary.is_dir():
                    _sync_directory(temporary)
                os.replace(temporary, path)
                _sync_directory(path.parent)
    except BaseException:
        if group.rank == 0:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)
        raise


def _sync_directory(path: Path) -> None:
    """Put the names in a directory on the disk; other systems than POSIX do not offer it."""
    if os.name == "posix":
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def open_centres(path: str | os.PathLike[str], *, name: str = WEIGHT) -> SafetensorsTable:
    """Open a safetensors file with a (C, D) matrix of centers; its bytes are read when rows are asked for.

    Args:
        path: of a file that `save_centres` wrote, or any other with such a matrix.
        name: of the matrix in the file.

    Returns:
        A table for `load_centres`, `save_centres` or `remap_classes`; a context manager that closes the file.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError, ValueError: no file; truncated; without such a matrix.
    """
    return SafetensorsTable(os.fspath(path), name)


class SafetensorsTable(CentreTable):
    """Reads the centers, and the optimizer state if there is any, from one file; see `open_centres`."""

    def __init__(self, path: str, name: str) -> None:
        self.origin = path
        self._file = _open(path)
        try:
            self._read_header(name)
        except BaseException:
            self.close()
            raise

    def _read_header(self, name: str) -> None:
        found = sorted(self._file.keys())
        if name not in found:
            raise ValueError(f"{self.origin}: expected a tensor {name!r} in it, got {found}")
        self._names = {key: key for key in found if key.startswith(STATE_PREFIX)} | {WEIGHT: name}
        slices = {ours: self._file.get_slice(theirs) for ours, theirs in self._names.items()}
        shape = tuple(slices[WEIGHT].get_shape())
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{self.origin}: expected {name!r} of shape (C, D), got {shape}")
        tensors, values = {}, {}
        for ours, part in slices.items():
            row, code = tuple(part.get_shape()), part.get_dtype()
            if code not in DTYPES:
                raise ValueError(f"{self.origin}: {ours!r}: expected one of {sorted(DTYPES)}, got {code}")
            if not row:
                values[ours] = self._file.get_tensor(ours)
            elif row[0] == shape[0]:
                tensors[ours] = RowSpec(DTYPES[code], row[1:])
            else:
                raise ValueError(f"{self.origin}: {ours!r}: expected {shape[0]} rows, one a class, got {row}")
        optimizer = (self._file.metadata() or {}).get(OPTIMIZER_ENTRY)
        super().__init__(self.origin, shape[0], tensors, values, optimizer)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._file.get_slice(self._names[name])[start:stop]

    def take(self, name: str, classes: Tensor) -> Tensor:
        # A view of the mapped file: only what is indexed is read.
        mapped: Tensor = self._file.get_tensor(self._names[name])
        return mapped[classes]

    def close(self) -> None:
        """Unmap the file."""
        self._file.__exit__(None, None, None)

    def __enter__(self) -> SafetensorsTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open(path: str) -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "reading a safetensors file needs safetensors: pip install 'expface_kernels[checkpoint]'"
        ) from error
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return safetensors.safe_open(path, framework="pt").__enter__()
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: expected a whole safetensors file, got one truncated or damaged: {error}"
        ) from error


class Layout:
    """Knows where each byte of the file goes; every rank computes the same from one table and metadata."""

    def __init__(self, table: CentreTable, metadata: Mapping[str, str]) -> None:
        specs = {name: (spec.dtype, (table.num_classes, *spec.row)) for name, spec in table.tensors.items()}
        specs |= {name: (value.dtype, ()) for name, value in table.values.items()}
        # Wide dtypes first, so that each tensor is aligned to its own size.
        names = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
        entries = _strings(metadata) | {"format": "pt"}
        if table.optimizer is not None:
            entries[OPTIMIZER_ENTRY] = table.optimizer
        header: dict[str, Any] = {"__metadata__": dict(sorted(entries.items()))}
        self.offsets: dict[str, int] = {}
        end = 0
        for name in names:
            dtype, shape = specs[name]
            begin, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": code_of(name, dtype), "shape": shape, "data_offsets": [begin, end]}
            self.offsets[name] = begin
        self.options = {
            "metadata": str(header["__metadata__"]),
            "tensors": ", ".join(f"{name} {specs[name][0]} {specs[name][1]}" for name in names),
        }
        """What ranks must agree on: a longer header on one would shift its rows against the others'."""
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.total_bytes = len(self.header) + end

    def create(self, path: Path) -> None:
        """Make a file of the whole length with its header; the tensors' bytes are zero still."""
        with open(path, "xb") as file:
            file.write(self.header)
            file.truncate(self.total_bytes)

    def write(self, path: Path, table: CentreTable, held: ClassRange, with_values: bool) -> None:
        """Write the rows `held` of each tensor into the created file, a chunk at a time, down to the disk."""
        with open(path, "r+b") as file:
            for name, spec in table.tensors.items():
                for start, rows in table.read(name, held):
                    self._put(file, self.offsets[name] + start * spec.row_bytes, rows)
            if with_values:
                for name, value in table.values.items():
                    self._put(file, self.offsets[name], value.reshape(1))
            file.flush()
            os.fsync(file.fileno())

    def _put(self, file: BinaryIO, offset: int, values: Tensor) -> None:
        file.seek(len(self.header) + offset)
        file.write(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _strings(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return a copy; TypeError for other values than strings, with which the library opens no file."""
    if not isinstance(metadata, Mapping):
        raise TypeError(
            "metadata: expected strings by name, such as {'epoch': '3'}, got "
            f"{type(metadata).__name__} {metadata!r}"
        )
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata: expected strings by name, got {{{key!r}: {value!r}}}")
    return dict(metadata)
