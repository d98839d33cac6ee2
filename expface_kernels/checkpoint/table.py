"""Tables of class centers: named tensors with one row for each class, read by rows from wherever they lie.

`CentreTable` is the base of every source. `LiveTable` is the one of centers that are being trained, in this
process or spread over a group; files and remapped classes are in modules of their own.

C classes, all of them · D features
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from expface_kernels.checkpoint.optimizer_state import state_of
from expface_kernels.distributed.group import Group
from expface_kernels.distributed.ranges import ClassRange

WEIGHT = "weight"
STATE_PREFIX = "optimizer."
CHUNK_BYTES = 16 * 2**20
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
"""What the safetensors format calls each dtype that it can hold."""
DTYPES = {code: dtype for dtype, code in CODES.items()}


def code_of(name: str, dtype: torch.dtype) -> str:
    """Return the format's word for a dtype; TypeError, with the name of the tensor, where it has none."""
    if dtype not in CODES:
        raise TypeError(f"{name}: expected one of {sorted(CODES.values())}, got {dtype}")
    return CODES[dtype]


class RowSpec(NamedTuple):
    """Describes a tensor with a row for each class: its dtype and the shape of a row."""

    dtype: torch.dtype
    row: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} rows of shape {self.row}"

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one row."""
        return self.dtype.itemsize * math.prod(self.row)


class CentreTable:
    """Gives class centers and the optimizer state that goes with them by rows; the base of every source.

    Attributes:
        origin: what to call it in an error: a path, or "weight".
        num_classes: C.
        tensors: by name, what has a row for each class: "weight" (C, D), and of the optimizer's state
            "optimizer.momentum_buffer" or "optimizer.exp_avg" and so on.
        values: by name, the state that all classes share, () tensors: "optimizer.step".
        optimizer: class name of the optimizer whose state is here, None where there is none.
        held: the classes whose rows this process can read; all but for live tensors of a group.
    """

    def __init__(
        self,
        origin: str,
        num_classes: int,
        tensors: Mapping[str, RowSpec],
        values: Mapping[str, Tensor],
        optimizer: str | None,
        held: ClassRange | None = None,
    ) -> None:
        self.origin = origin
        self.num_classes = num_classes
        self.tensors = dict(tensors)
        self.values = dict(values)
        self.optimizer = optimizer
        self.held = ClassRange(0, num_classes) if held is None else held

    def take(self, name: str, classes: Tensor) -> Tensor:
        """Return the rows of `classes` (n,) int64 on the CPU, in their order, as a tensor of its own."""
        raise NotImplementedError

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start … stop − 1 of a tensor, on any device; 0 ≤ start < stop ≤ C."""
        return self.take(name, torch.arange(start, stop))

    def read(self, name: str, held: ClassRange) -> Iterator[tuple[int, Tensor]]:
        """Yield (first class, rows) that cover `held`, each of at most CHUNK_BYTES (but one row)."""
        step = max(1, CHUNK_BYTES // max(1, self.tensors[name].row_bytes))
        for start in range(held.start, held.stop, step):
            yield start, self.rows(name, start, min(start + step, held.stop))

    def state_names(self) -> set[str]:
        """Return the names of the optimizer's state, without their prefix."""
        names = {*self.tensors, *self.values}
        return {name.removeprefix(STATE_PREFIX) for name in names if name.startswith(STATE_PREFIX)}


class LiveTable(CentreTable):
    """Holds this process's rows of a weight and of its optimizer state; see `centres_of`."""

    def __init__(self, num_classes: int, start: int, local: dict[str, Tensor], whole: Share) -> None:
        held = ClassRange(start, local[WEIGHT].shape[0])
        super().__init__("weight", num_classes, whole.tensors, whole.values, whole.optimizer, held)
        self.local = local

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.local[name][start - self.held.start : stop - self.held.start]

    def take(self, name: str, classes: Tensor) -> Tensor:
        local = self.local[name]
        return local[(classes - self.held.start).to(local.device)]


class Share(NamedTuple):
    """Says to the other ranks what one rank holds."""

    rows: int
    declared: int | None  # C, where a DTensor says so
    tensors: dict[str, RowSpec]
    values: dict[str, Tensor]
    optimizer: str | None

    def to_json(self) -> dict[str, Any]:
        """Return what JSON can hold; a float is written with all its digits."""
        tensors = {name: [CODES[dtype], row] for name, (dtype, row) in self.tensors.items()}
        values = {name: [CODES[value.dtype], value.item()] for name, value in self.values.items()}
        return {**self._asdict(), "tensors": tensors, "values": values}

    @classmethod
    def from_json(cls, json: dict[str, Any]) -> Share:
        """Return what `to_json` was called on."""
        tensors = {name: RowSpec(DTYPES[code], tuple(row)) for name, (code, row) in json["tensors"].items()}
        values = {
            name: torch.tensor(value, dtype=DTYPES[code]) for name, (code, value) in json["values"].items()
        }
        return cls(**{**json, "tensors": tensors, "values": values})

    def options(self) -> dict[str, str]:
        """Return what must be the same on every rank; a rank without rows may not have stepped."""
        if not self.rows:
            return {}
        texts = {name: str(spec) for name, spec in self.tensors.items()}
        texts |= {name: f"{value.dtype} {value.item()!r}" for name, value in self.values.items()}
        return {"optimizer": f"state {sorted({*texts} - {WEIGHT})}"} | texts


def centres_of(
    weight: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> LiveTable:
    """Make a table of the centers that are being trained; every rank of the group calls this.

    Args:
        weight: (C, D); of a group a DTensor that is Shard(0), or each rank's own plain (num_local, D) in
            order of ranks, as many rows as it has.
        optimizer: one that trains `weight`; its state of it comes along.
        process_group: who holds the other rows of a plain weight; None where it has all of them.

    Raises:
        ValueError, TypeError: ranks disagree on D, dtype or the optimizer's state; the state is not by class,
            or of a dtype that a safetensors file cannot hold.

    Collectives: six small all_gathers. Nothing is copied.
    """
    return live_table(weight, optimizer, group_of(weight, process_group))


def group_of(weight: Tensor, process_group: dist.ProcessGroup | None) -> Group:
    """Return the ranks that hold a weight: those of its mesh if it is a DTensor, else of `process_group`."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor, such as head.weight, got {type(weight).__name__}")
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return Group(process_group)
    placements = tuple(weight.placements)  # type: ignore[attr-defined]
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"weight: expected a DTensor that is Shard(0) over a mesh of one dimension, got {placements} "
            f"over {mesh}"
        )
    if process_group is not None and process_group is not mesh.get_group():
        raise ValueError("process_group: expected None, since a DTensor brings its own; got another group")
    return Group(mesh.get_group())


def local_rows(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: all of a plain one, its shard of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def live_table(weight: Tensor, optimizer: torch.optim.Optimizer | None, group: Group) -> LiveTable:
    """Do what `centres_of` does, for ranks that are already known."""
    with group.all_or_none("these centers"):
        local, share = _share(weight, optimizer)
    group.agree(share.options(), "these centers")
    shares = [Share.from_json(json) for json in group.gather_json(share.to_json())]
    # Every rank has the same shares, so all raise or none.
    num_classes = sum(share.rows for share in shares)
    if num_classes == 0:
        raise ValueError("weight: expected at least one class, got none on any rank")
    for rank, other in enumerate(shares):
        if other.declared not in (None, num_classes):
            raise ValueError(
                f"weight: rank {rank} declares {other.declared} classes, but the ranks hold {num_classes}"
            )
    start = sum(other.rows for other in shares[: group.rank])
    return LiveTable(num_classes, start, local, next(share for share in shares if share.rows))


def _share(weight: Tensor, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Tensor], Share]:
    """Return this process's tensors by name, and what to tell the others about them."""
    rows = local_rows(weight).detach()
    if rows.dim() != 2:
        raise ValueError(f"weight: expected shape (C, D), got {tuple(weight.shape)}")
    local, values = {WEIGHT: rows}, {}
    state = {} if optimizer is None else state_of(weight, optimizer)
    for name, value in state.items():
        held = local_rows(value).detach() if isinstance(value, Tensor) else torch.tensor(value)
        if held.dim() == 0:
            values[STATE_PREFIX + name] = held.cpu()
        elif held.shape[0] == rows.shape[0]:
            local[STATE_PREFIX + name] = held
        else:
            raise ValueError(
                f"optimizer: its state {name!r} of shape {tuple(held.shape)} has not one row for each of the "
                f"{rows.shape[0]} classes here, nor is it one number"
            )
    for name, held in (local | values).items():
        code_of(name, held.dtype)
    specs = {name: RowSpec(held.dtype, tuple(held.shape[1:])) for name, held in local.items()}
    declared = weight.shape[0] if hasattr(weight, "to_local") else None
    kind = None if optimizer is None else type(optimizer).__name__
    return local, Share(rows.shape[0], declared, specs, values, kind)
