"""Class centres and optimizer state that are being trained, in this process or spread over a group.

C classes, all of them · D features
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from expface_kernels.checkpoint.members import Members, members_of
from expface_kernels.checkpoint.safetensors_file import CODES, DTYPES, code_of
from expface_kernels.checkpoint.table import STATE_PREFIX, WEIGHT, CentreTable, RowSpec
from expface_kernels.distributed.ranges import ClassRange


def centres_of(
    weight: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> LiveTable:
    """The centres that are being trained, as a table; every rank of the group calls this.

    Args:
        weight: (C, D); of a group a DTensor that is Shard(0), or each rank's own plain (num_local, D) in
            order of ranks, as many rows as it has.
        optimizer: one that trains `weight`; its state of it comes along.
        process_group: who holds the other rows of a plain weight; None where it has all of them.

    Raises:
        ValueError, TypeError: ranks disagree on D, dtype or the optimizer's state; the state is not by class,
            or of a dtype that a safetensors file cannot hold.

    Collectives: four small all_gathers. Nothing is copied.
    """
    return live_table(weight, optimizer, members_of(weight, process_group))


class LiveTable(CentreTable):
    """The rows that this process holds of a weight and of its optimizer state; see `centres_of`."""

    def __init__(self, whole: _Whole, start: int, local: dict[str, Tensor]) -> None:
        self.num_classes = whole.num_classes
        self.tensors = whole.tensors
        self.values = whole.values
        self.optimizer = whole.optimizer
        self.held = ClassRange(start, local[WEIGHT].shape[0])
        self.origin = "weight"
        self.local = local

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.local[name][start - self.held.start : stop - self.held.start]

    def take(self, name: str, classes: Tensor) -> Tensor:
        local = self.local[name]
        return local[(classes - self.held.start).to(local.device)]


def local_rows(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of a plain one, its shard of a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def state_of(weight: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state of `weight` by name, without what is None; ValueError if it does not train it."""
    parameter_group(weight, optimizer)
    state = optimizer.state.get(weight, {})
    return {name: value for name, value in state.items() if value is not None}


def parameter_group(weight: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's group that holds `weight`."""
    for group in optimizer.param_groups:
        if any(parameter is weight for parameter in group["params"]):
            return group
    raise ValueError(
        f"optimizer: expected one that trains weight, got a {type(optimizer).__name__} without it"
    )


def state_that_comes(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> set[str] | None:
    """Names of the state that an optimizer will have after a step; None where that is not known here."""
    if type(optimizer) is torch.optim.SGD:
        return {"momentum_buffer"} if group["momentum"] else set()
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
        return {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if group["amsgrad"] else set())
    return None


class _Part(NamedTuple):
    """What one rank says of its share."""

    size: int  # rows
    declared: int | None  # C, where a DTensor says so
    tensors: dict[str, RowSpec]
    values: dict[str, Tensor]
    optimizer: str | None

    def told(self) -> dict[str, Any]:
        """Itself as JSON, exactly: a float is written with all its digits."""
        tensors = {name: [CODES[dtype], row] for name, (dtype, row) in self.tensors.items()}
        values = {name: [CODES[value.dtype], value.item()] for name, value in self.values.items()}
        return {**self._asdict(), "tensors": tensors, "values": values}

    @classmethod
    def heard(cls, told: dict[str, Any]) -> _Part:
        """The same again."""
        tensors = {name: RowSpec(DTYPES[code], tuple(row)) for name, (code, row) in told["tensors"].items()}
        values = {
            name: torch.tensor(value, dtype=DTYPES[code]) for name, (code, value) in told["values"].items()
        }
        return cls(**{**told, "tensors": tensors, "values": values})


class _Whole(NamedTuple):
    """What all shares together are."""

    num_classes: int
    tensors: dict[str, RowSpec]
    values: dict[str, Tensor]
    optimizer: str | None


def live_table(weight: Tensor, optimizer: torch.optim.Optimizer | None, members: Members) -> LiveTable:
    """`centres_of` for ranks that are already known."""
    local, part = members.together(lambda: _share(weight, optimizer))
    parts = [_Part.heard(told) for told in members.gather(part.told())]
    start = sum(other.size for other in parts[: members.rank])
    return LiveTable(_join(parts), start, local)


def _share(weight: Tensor, optimizer: torch.optim.Optimizer | None) -> tuple[dict[str, Tensor], _Part]:
    """This process's tensors by name, and what to tell the others of them."""
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
    name_of_optimizer = None if optimizer is None else type(optimizer).__name__
    return local, _Part(rows.shape[0], declared, specs, values, name_of_optimizer)


def _join(parts: list[_Part]) -> _Whole:
    """The whole of what the ranks hold; every rank gets the same parts, so all raise or none."""
    num_classes = sum(part.size for part in parts)
    if num_classes == 0:
        raise ValueError("weight: expected at least one class, got none on any rank")
    for rank, part in enumerate(parts):
        if part.declared not in (None, num_classes):
            raise ValueError(
                f"weight: rank {rank} declares {part.declared} classes, but the ranks hold {num_classes}"
            )
    # An empty rank may not have stepped: what it lacks says nothing.
    holders = [(rank, part) for rank, part in enumerate(parts) if part.size]
    first_rank, first = holders[0]
    for rank, part in holders[1:]:
        for name in sorted({*first.tensors, *first.values, *part.tensors, *part.values}):
            ours, theirs = _show(first, name), _show(part, name)
            if ours != theirs:
                raise ValueError(f"{name}: rank {first_rank} has {ours}, rank {rank} has {theirs}")
    return _Whole(num_classes, first.tensors, first.values, first.optimizer)


def _show(part: _Part, name: str) -> str:
    if name in part.tensors:
        dtype, row = part.tensors[name]
        return f"{dtype} rows of shape {row}"
    if name in part.values:
        return f"{part.values[name].dtype} {part.values[name].item()!r}"
    return "none"
