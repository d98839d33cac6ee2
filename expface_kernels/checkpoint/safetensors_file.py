"""Class centres in one safetensors file that the plain library opens, written in parts and read by rows.

The file is eight bytes with the header's length, the header in JSON, then the tensors' bytes without gaps
(little endian); so where a row lies is known before any is written, and every rank writes its own.

C classes, all of them · D features
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from expface_kernels.checkpoint.table import STATE_PREFIX, WEIGHT, CentreTable, RowSpec, chunks
from expface_kernels.distributed.ranges import ClassRange

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in CODES.items()}
OPTIMIZER = "optimizer"  # key of the file's metadata: the optimizer's class
CHUNK_BYTES = 16 * 2**20


def code_of(name: str, dtype: torch.dtype) -> str:
    """The format's word for a dtype; TypeError, with the name of the tensor, where it has none."""
    if dtype not in CODES:
        raise TypeError(f"{name}: expected one of {sorted(CODES.values())}, got {dtype}")
    return CODES[dtype]


def open_centres(path: str | os.PathLike[str], *, name: str = WEIGHT) -> SafetensorsTable:
    """Open a safetensors file with a (C, D) matrix of centres; its bytes are read when rows are asked for.

    Args:
        path: of a file that `save_centres` wrote, or any other with such a matrix.
        name: of the matrix in the file.

    Returns:
        A table for `load_centres`, `save_centres` or `remap_classes`; a context manager that closes the file.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError, ValueError: no file; truncated; without such a matrix.
    """
    return SafetensorsTable(path, name)


class SafetensorsTable(CentreTable):
    """The centres, and the optimizer state if there is any, of one file; see `open_centres`."""

    def __init__(self, path: str | os.PathLike[str], name: str) -> None:
        self.origin = os.fspath(path)
        self._file = _open(self.origin)
        self._names: dict[str, str] = {}
        self.tensors, self.values = {}, {}
        try:
            self.optimizer = (self._file.metadata() or {}).get(OPTIMIZER)
            self._read_header(name)
        except BaseException:
            self.close()
            raise
        self.held = ClassRange(0, self.num_classes)

    def _read_header(self, name: str) -> None:
        found = sorted(self._file.keys())
        if name not in found:
            raise ValueError(f"{self.origin}: expected a tensor {name!r} in it, got {found}")
        self._names = {key: key for key in found if key.startswith(STATE_PREFIX)} | {WEIGHT: name}
        slices = {ours: self._file.get_slice(theirs) for ours, theirs in self._names.items()}
        shape = tuple(slices[WEIGHT].get_shape())
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{self.origin}: expected {name!r} of shape (C, D), got {shape}")
        self.num_classes = shape[0]
        for ours, part in slices.items():
            row, code = tuple(part.get_shape()), part.get_dtype()
            if code not in DTYPES:
                raise ValueError(f"{self.origin}: {ours!r}: expected one of {sorted(DTYPES)}, got {code}")
            if not row:
                self.values[ours] = self._file.get_tensor(ours)
            elif row[0] == self.num_classes:
                self.tensors[ours] = RowSpec(DTYPES[code], row[1:])
            else:
                raise ValueError(
                    f"{self.origin}: {ours!r}: expected {self.num_classes} rows, one a class, got {row}"
                )

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


def _strings(metadata: Mapping[str, str]) -> dict[str, str]:
    """The format knows no other values: the library would not open the file."""
    if not isinstance(metadata, Mapping):
        raise TypeError(
            "metadata: expected strings by name, such as {'epoch': '3'}, got "
            f"{type(metadata).__name__} {metadata!r}"
        )
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"metadata: expected strings by name, got {{{key!r}: {value!r}}}")
    return dict(metadata)


class Layout:
    """Where each byte of the file goes. Every rank computes the same from the same table and metadata."""

    def __init__(self, table: CentreTable, metadata: Mapping[str, str]) -> None:
        specs = {name: (spec.dtype, (table.num_classes, *spec.row)) for name, spec in table.tensors.items()}
        specs |= {name: (value.dtype, ()) for name, value in table.values.items()}
        # Wide dtypes first, so that each tensor is aligned to its own size.
        names = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
        said = _strings(metadata) | {"format": "pt"}
        if table.optimizer is not None:
            said[OPTIMIZER] = table.optimizer
        header: dict[str, Any] = {"__metadata__": dict(sorted(said.items()))}
        self.offsets: dict[str, int] = {}
        end = 0
        for name in names:
            dtype, shape = specs[name]
            begin, end = end, end + dtype.itemsize * int(torch.Size(shape).numel())
            header[name] = {"dtype": code_of(name, dtype), "shape": shape, "data_offsets": [begin, end]}
            self.offsets[name] = begin
        # What ranks must agree on: a header of another length would shift one rank's rows against another's.
        self.told = {"metadata": str(header["__metadata__"])}
        self.told["tensors"] = ", ".join(f"{name} {specs[name][0]} {specs[name][1]}" for name in names)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.total_bytes = len(self.header) + end

    def create(self, path: Path) -> None:
        """A new file of the whole length with its header; the tensors' bytes are zero still."""
        with open(path, "xb") as file:
            file.write(self.header)
            file.truncate(self.total_bytes)

    def write(self, path: Path, table: CentreTable, held: ClassRange, with_values: bool) -> None:
        """Write the rows `held` of each tensor into the created file, a chunk at a time, down to the disk."""
        with open(path, "r+b") as file:
            for name in table.tensors:
                for start, stop in chunks(table, name, held, CHUNK_BYTES):
                    offset = self.offsets[name] + start * table.row_bytes(name)
                    self._put(file, offset, table.rows(name, start, stop))
            if with_values:
                for name, value in table.values.items():
                    self._put(file, self.offsets[name], value.reshape(1))
            file.flush()
            os.fsync(file.fileno())

    def _put(self, file: BinaryIO, offset: int, values: Tensor) -> None:
        file.seek(len(self.header) + offset)
        file.write(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
