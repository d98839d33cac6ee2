"""Saving and loading of class centres with their optimizer state, from one process or from a group.

C classes, all of them · D features
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expface_kernels.checkpoint import safetensors_file
from expface_kernels.checkpoint.live import (
    live_table,
    local_rows,
    parameter_group,
    state_of,
    state_that_comes,
)
from expface_kernels.checkpoint.members import Members, members_of
from expface_kernels.checkpoint.publish import publish
from expface_kernels.checkpoint.safetensors_file import Layout, open_centres
from expface_kernels.checkpoint.table import STATE_PREFIX, WEIGHT, CentreTable, RowSpec, chunks
from expface_kernels.distributed.ranges import ClassRange, shard_ranges


def save_centres(
    path: str | os.PathLike[str],
    weight: Tensor | CentreTable,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write all centres and their optimizer state into one safetensors file; every rank calls this.

    Each rank writes its own rows at their place in the file, so `path` must be on a file system that all
    share. The file appears under its name when it is complete and on the disk; until then, and if a rank
    fails, what was there before stays as it was.

    Args:
        path: of the file. It holds "weight" (C, D), and of the optimizer "optimizer.<name>" for each state.
        weight: `head.weight`, or what `centres_of` takes as such; or a table from `open_centres`,
            `open_insightface` or `remap_classes`, of which each rank writes a part.
        optimizer: one that trains `weight`; None saves the centres alone.
        process_group: as in `centres_of`; with a table the ranks that share the work. A plain weight that is
            one rank's share needs it: without it each rank takes its rows for all there are.
        metadata: strings of your own for the file's header, the same on every rank.

    Raises:
        ValueError, TypeError: what cannot be saved, or what ranks disagree on, named. OSError: of the disk.
            RuntimeError: another rank failed, and its error.

    Warns on ranks above 0 of the default group that save a plain weight without `process_group`.

    Peak extra memory: one chunk of 16 MiB on each rank. Collectives: 16 small all_gathers.
    """
    if isinstance(weight, CentreTable):
        if optimizer is not None:
            raise ValueError("optimizer: expected None, since a table brings its own state; got an optimizer")
        members, table = Members(process_group), weight
        held = shard_ranges(table.num_classes, members.size)[members.rank]
        members.together(lambda: _check_held(table, held))
    else:
        members = members_of(weight, process_group)
        _warn_of_a_race(members)
        table = live_table(weight, optimizer, members)
        held = table.held
    _write(Path(path), table, held, members, {} if metadata is None else metadata)


def load_centres(
    source: str | os.PathLike[str] | CentreTable,
    weight: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Copy centres, and the optimizer's state of them, into a weight; every rank calls this.

    Each rank reads its own rows only, whatever number of ranks wrote them. Everything is checked on every
    rank before the first value changes.

    Args:
        source: a file that `save_centres` wrote, or a table from `open_centres`, `open_insightface` or
            `remap_classes`.
        weight: `head.weight`, or what `centres_of` takes as such; its values are overwritten in place.
        optimizer: one that trains `weight`: its state of `weight` is replaced (its hyperparameters are not).
            None loads the centres alone.
        process_group: as in `centres_of`.

    Raises:
        FileNotFoundError, ValueError: no file, truncated, other C, D, dtype or state than expected; both are
            named. RuntimeError: another rank failed.

    Peak extra memory: one chunk of 16 MiB, and the state of this rank's rows. Collectives: 12 small
    all_gathers.
    """
    members = members_of(weight, process_group)
    live = live_table(weight, None, members)
    opened = None if isinstance(source, CentreTable) else members.together(lambda: open_centres(source))
    table = source if isinstance(source, CentreTable) else opened
    assert table is not None
    try:
        members.together(lambda: _check_fits(table, live, weight, optimizer))
        state = members.together(lambda: {} if optimizer is None else _read_state(table, live.held, weight))
        members.together(lambda: _copy_rows(table, WEIGHT, live.held, live.local[WEIGHT]))
    finally:
        if opened is not None:
            opened.close()
    if optimizer is not None:
        optimizer.state[weight] = {
            name: _place(value, weight, optimizer) if value.dim() == 0 else value
            for name, value in state.items()
        }


def _warn_of_a_race(members: Members) -> None:
    """A plain weight does not say whether other ranks hold the rest of it, but they all would write one file.

    Nothing is said on rank 0, since it alone saves a weight that all ranks have.
    """
    if members.group is None and dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        warnings.warn(
            f"process_group: rank {dist.get_rank()} saves a plain weight as one of all classes; if ranks "
            "share the classes, pass their group, or each of them replaces the others' file",
            stacklevel=3,
        )


def _check_held(table: CentreTable, held: ClassRange) -> None:
    if held.size and not (table.held.start <= held.start and held.stop <= table.held.stop):
        raise ValueError(
            f"{table.origin}: expected a table with the classes {held.start} to {held.stop - 1}, got "
            f"{table.held.start} to {table.held.stop - 1} in this process; for the centres of a group pass "
            "their weight, not a table"
        )


def _write(
    path: Path, table: CentreTable, held: ClassRange, members: Members, metadata: Mapping[str, str]
) -> None:
    """Header by the first rank, rows by each, rename by the first."""
    token = members.gather(uuid.uuid4().hex)[0]
    temporary = path.with_name(f".{path.name}.{token}.tmp")

    def laid_out() -> Layout:
        if members.first:
            _check_place(path)
        return Layout(table, metadata)

    layout = members.together(laid_out)
    members.agree(layout.told)
    try:
        members.together(lambda: layout.create(temporary) if members.first else None)
        members.together(lambda: layout.write(temporary, table, held, with_values=members.first))
        members.together(lambda: publish(temporary, path) if members.first else None)
    except BaseException:
        if members.first:
            temporary.unlink(missing_ok=True)
        raise


def _check_place(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no directory {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"path: expected a file, {path} is a directory")


def _check_fits(
    table: CentreTable, live: CentreTable, weight: Tensor, optimizer: torch.optim.Optimizer | None
) -> None:
    """Everything that can be known before a value changes."""
    if table.num_classes != live.num_classes:
        raise ValueError(
            f"{table.origin}: expected {live.num_classes} classes as in weight, got {table.num_classes}; "
            "remap_classes adds, drops and reorders classes"
        )
    theirs, ours = table.tensors[WEIGHT], live.tensors[WEIGHT]
    if theirs.row != ours.row:
        raise ValueError(f"{table.origin}: expected D = {ours.row[0]} as in weight, got {theirs.row[0]}")
    if theirs.dtype != ours.dtype:
        raise ValueError(
            f"{table.origin}: expected {ours.dtype} as in weight, got {theirs.dtype}; "
            "convert the module first"
        )
    _check_held(table, live.held)
    if optimizer is not None:
        _check_state(table, weight, optimizer)


def _check_state(table: CentreTable, weight: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """That the table's state is of the kind that this optimizer keeps."""
    kind = type(optimizer).__name__
    present, got = state_of(weight, optimizer), table.state_names()
    if not got and table.optimizer != kind:
        raise ValueError(
            f"{table.origin}: expected the state of {kind}, got none of it; pass optimizer=None for the "
            "centres alone"
        )
    expected = set(present) or state_that_comes(optimizer, parameter_group(weight, optimizer))
    # A file without state was saved before the first step.
    fits = _may_fit(type(optimizer), table.optimizer) if expected is None else expected == got
    if got and not fits:
        names = "" if expected is None else f"{sorted(expected)} "
        raise ValueError(
            f"{table.origin}: expected the state {names}of {kind}, got {sorted(got)} of "
            f"{table.optimizer or 'an optimizer'}; pass optimizer=None for the centres alone"
        )
    for name, value in present.items():
        theirs = table.tensors.get(STATE_PREFIX + name)
        if isinstance(value, Tensor) and value.dim() and theirs is not None:
            ours = RowSpec(value.dtype, tuple(value.shape[1:]))
            if theirs != ours:
                raise ValueError(f"{table.origin}: expected {name!r} as {ours}, got {theirs}")


def _may_fit(ours: type, theirs: str | None) -> bool:
    """Whether an optimizer, whose state is not known yet, may be of theirs' kind: two of torch's are not."""
    known = ours is getattr(torch.optim, ours.__name__, None) and hasattr(torch.optim, theirs or "")
    return not known or theirs == ours.__name__


def _read_state(table: CentreTable, held: ClassRange, weight: Tensor) -> dict[str, Tensor]:
    """The table's state of the classes `held`, as new tensors that are sharded as `weight` is."""
    state = {}
    for name, spec in table.tensors.items():
        if name != WEIGHT:
            local = torch.empty((held.size, *spec.row), dtype=spec.dtype, device=local_rows(weight).device)
            _copy_rows(table, name, held, local)
            state[name.removeprefix(STATE_PREFIX)] = _like(weight, local, table.num_classes)
    for name, value in table.values.items():
        state[name.removeprefix(STATE_PREFIX)] = value.clone()
    return state


@torch.no_grad()
def _copy_rows(table: CentreTable, name: str, held: ClassRange, into: Tensor) -> None:
    """The rows `held` of a tensor into `into`, which has just these, a chunk at a time."""
    for start, stop in chunks(table, name, held, safetensors_file.CHUNK_BYTES):
        into[start - held.start : stop - held.start].copy_(table.rows(name, start, stop))


def _like(weight: Any, local: Tensor, num_classes: int) -> Tensor:
    """This rank's rows as a DTensor where `weight` is one."""
    if not hasattr(weight, "to_local"):
        return local
    from torch.distributed.tensor import DTensor

    shape = torch.Size((num_classes, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride
    )


def _place(value: Tensor, weight: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """A number of the state where torch's optimizers keep it: on the CPU, but for fused and captured ones."""
    group = parameter_group(weight, optimizer)
    near = group.get("capturable") or group.get("fused")
    return value.to(local_rows(weight).device) if near else value
