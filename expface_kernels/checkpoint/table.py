"""What a checkpoint of class centres is, wherever it lies: named tensors with one row for each class.

C classes, all of them · D features
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from expface_kernels.distributed.ranges import ClassRange

WEIGHT = "weight"
STATE_PREFIX = "optimizer."


class RowSpec(NamedTuple):
    """Of one tensor with a row for each class: its dtype and the shape of a row."""

    dtype: torch.dtype
    row: tuple[int, ...]


class CentreTable:
    """Class centres and the optimizer state that goes with them, read by rows; the base of every source.

    Attributes:
        num_classes: C.
        tensors: by name, what has a row for each class: "weight" (C, D), and of the optimizer's state
            "optimizer.momentum_buffer" or "optimizer.exp_avg" and so on.
        values: by name, the state that all classes share, () tensors: "optimizer.step".
        optimizer: class name of the optimizer whose state is here, None where there is none.
        held: the classes whose rows this process can read; all but for live tensors of a group.
        origin: what to call it in an error: a path, or "weight".
    """

    num_classes: int
    tensors: dict[str, RowSpec]
    values: dict[str, Tensor]
    optimizer: str | None
    held: ClassRange
    origin: str

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start … stop − 1 of a tensor, on any device; 0 ≤ start < stop ≤ C."""
        raise NotImplementedError

    def take(self, name: str, classes: Tensor) -> Tensor:
        """The rows of `classes` (n,) int64 on the CPU, in their order, as a tensor of its own."""
        raise NotImplementedError

    def row_bytes(self, name: str) -> int:
        """Bytes of one row."""
        dtype, row = self.tensors[name]
        return dtype.itemsize * int(torch.Size(row).numel())

    def state_names(self) -> set[str]:
        """Names of the optimizer's state, without their prefix."""
        names = {*self.tensors, *self.values}
        return {name.removeprefix(STATE_PREFIX) for name in names if name.startswith(STATE_PREFIX)}


def chunks(table: CentreTable, name: str, rows: ClassRange, chunk_bytes: int) -> list[tuple[int, int]]:
    """(start, stop) pairs that cover `rows` of a tensor, each of at most `chunk_bytes` (but one row)."""
    step = max(1, chunk_bytes // max(1, table.row_bytes(name)))
    return [(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]
