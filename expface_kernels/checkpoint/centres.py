"""Saving and loading of class centers with their optimizer state, from one process or from a group.

C classes, all of them · D features
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from expface_kernels.checkpoint.files import Layout, open_centres, written_whole
from expface_kernels.checkpoint.optimizer_state import expected_state, parameter_group, state_of
from expface_kernels.checkpoint.table import (
    STATE_PREFIX,
    WEIGHT,
    CentreTable,
    RowSpec,
    group_of,
    live_table,
    local_rows,
)
from expface_kernels.distributed.group import Group
from expface_kernels.distributed.ranges import ClassRange, shard_ranges


def save_centres(
    path: str | os.PathLike[str],
    weight: Tensor | CentreTable,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write all centers and their optimizer state into one safetensors file; every rank calls this.

    Each rank writes its own rows at their place in the file, so `path` must be on a file system that all
    share. The file appears under its name when it is complete and on the disk; until then, and if a rank
    fails, what was there before stays as it was.

    Args:
        path: of the file. It holds "weight" (C, D), and of the optimizer "optimizer.<name>" for each state.
        weight: `head.weight`, or what `centres_of` takes as such; or a table from `open_centres`,
            `open_insightface` or `remap_classes`, of which each rank writes a part.
        optimizer: one that trains `weight`; None saves the centers alone.
        process_group: as in `centres_of`; with a table the ranks that share the work. A plain weight that is
            one rank's share needs it: without it each rank takes its rows for all there are.
        metadata: strings of your own for the file's header, the same on every rank.

    Raises:
        ValueError, TypeError: what cannot be saved, or what ranks disagree on, named. OSError: of the disk.
            RuntimeError: another rank failed, and its error.

    Warns on ranks above 0 of the default group that save a plain weight without `process_group`.

    Peak extra memory: one chunk of 16 MiB on each rank. Collectives: 18 small all_gathers.
    """
    if isinstance(weight, CentreTable):
        if optimizer is not None:
            raise ValueError("optimizer: expected None, since a table brings its own state; got an optimizer")
        group, table = Group(process_group), weight
        held = shard_ranges(table.num_classes, group.size)[group.rank]
    else:
        group = group_of(weight, process_group)
        _warn_of_a_race(group)
        table = live_table(weight, optimizer, group)
        held = table.held
    path = Path(path)
    with group.all_or_none("to save"):
        _check_held(table, held)
        if group.rank == 0:
            _check_place(path)
        layout = Layout(table, {} if metadata is None else metadata)
    group.agree(layout.options, "to save")
    with written_whole(path, group) as temporary:
        with group.all_or_none("to save"):
            if group.rank == 0:
                layout.create(temporary)
        with group.all_or_none("to save"):
            layout.write(temporary, table, held, with_values=group.rank == 0)


def load_centres(
    source: str | os.PathLike[str] | CentreTable,
    weight: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Copy centers, and the optimizer's state of them, into a weight; every rank calls this.

    Each rank reads its own rows only, whatever number of ranks wrote them. Everything is checked on every
    rank before the first value changes.

    Args:
        source: a file that `save_centres` wrote, or a table from `open_centres`, `open_insightface` or
            `remap_classes`.
        weight: `head.weight`, or what `centres_of` takes as such; its values are overwritten in place.
        optimizer: one that trains `weight`: its state of `weight` is replaced (its hyperparameters are not).
            None loads the centers alone.
        process_group: as in `centres_of`.

    Raises:
        FileNotFoundError, ValueError: no file, truncated, other C, D, dtype or state than expected; both are
            named. RuntimeError: another rank failed.

    Peak extra memory: one chunk of 16 MiB, and the state of this rank's rows. Collectives: 12 small
    all_gathers.
    """
    group = group_of(weight, process_group)
    live = live_table(weight, None, group)
    with contextlib.ExitStack() as opened:
        with group.all_or_none("to load"):
            table = source if isinstance(source, CentreTable) else opened.enter_context(open_centres(source))
            _check_fits(table, live, weight, optimizer)
        with group.all_or_none("to load"):
            state = {} if optimizer is None else _read_state(table, live.held, weight, optimizer)
        with group.all_or_none("to load"):
            _copy_rows(table, WEIGHT, live.held, live.local[WEIGHT])
    if optimizer is not None:
        optimizer.state[weight] = state


def _warn_of_a_race(group: Group) -> None:
    """Warn where ranks may write over each other's file: a plain weight does not say whether it is a share.

    Rank 0 is not warned, since it alone saves a weight that all ranks have.
    """
    if group.process_group is None and dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        warnings.warn(
            f"process_group: rank {dist.get_rank()} saves a plain weight as one of all classes; if ranks "
            "share the classes, pass their group, or each of them replaces the others' file",
            stacklevel=3,
        )


def _check_held(table: CentreTable, held: ClassRange) -> None:
    if held.size and not (table.held.start <= held.start and held.stop <= table.held.stop):
        raise ValueError(
            f"{table.origin}: expected a table with the classes {held.start} to {held.stop - 1}, got "
            f"{table.held.start} to {table.held.stop - 1} in this process; for the centers of a group pass "
            "their weight, not a table"
        )


def _check_place(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: there is no directory {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"path: expected a file, {path} is a directory")


def _check_fits(
    table: CentreTable, live: CentreTable, weight: Tensor, optimizer: torch.optim.Optimizer | None
) -> None:
    """Check everything that can be known before a value changes."""
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
    """Check that the table's state is of the kind that this optimizer keeps."""
    kind = type(optimizer).__name__
    present, got = state_of(weight, optimizer), table.state_names()
    if not got and table.optimizer != kind:
        raise ValueError(
            f"{table.origin}: expected the state of {kind}, got none of it; pass optimizer=None for the "
            "centers alone"
        )
    expected = expected_state(optimizer, parameter_group(weight, optimizer), [weight])
    # A file without state was saved before the first step.
    fits = _may_fit(type(optimizer), table.optimizer) if expected is None else expected == got
    if got and not fits:
        names = "" if expected is None else f"{sorted(expected)} "
        raise ValueError(
            f"{table.origin}: expected the state {names}of {kind}, got {sorted(got)} of "
            f"{table.optimizer or 'an optimizer'}; pass optimizer=None for the centers alone"
        )
    for name, value in present.items():
        theirs = table.tensors.get(STATE_PREFIX + name)
        if isinstance(value, Tensor) and value.dim() and theirs is not None:
            ours = RowSpec(value.dtype, tuple(value.shape[1:]))
            if theirs != ours:
                raise ValueError(f"{table.origin}: expected {name!r} as {ours}, got {theirs}")


def _may_fit(ours: type, theirs: str | None) -> bool:
    """Tell whether an optimizer with a state not yet known may be of theirs' kind; two of torch's are not."""
    known = ours is getattr(torch.optim, ours.__name__, None) and hasattr(torch.optim, theirs or "")
    return not known or theirs == ours.__name__


def _read_state(
    table: CentreTable, held: ClassRange, weight: Tensor, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return the table's state of the classes `held`, as new tensors that are sharded as `weight` is."""
    device = local_rows(weight).device
    state = {}
    for name, spec in table.tensors.items():
        if name != WEIGHT:
            local = torch.empty((held.size, *spec.row), dtype=spec.dtype, device=device)
            _copy_rows(table, name, held, local)
            state[name.removeprefix(STATE_PREFIX)] = _like(weight, local, table.num_classes)
    group = parameter_group(weight, optimizer)
    for name, value in table.values.items():
        # torch's optimizers keep a number on the CPU, but for fused and captured ones.
        near = group.get("capturable") or group.get("fused")
        state[name.removeprefix(STATE_PREFIX)] = value.to(device if near else "cpu", copy=True)
    return state


@torch.no_grad()
def _copy_rows(table: CentreTable, name: str, held: ClassRange, into: Tensor) -> None:
    """Copy the rows `held` of a tensor into `into`, which has just these, a chunk at a time."""
    for start, rows in table.read(name, held):
        into[start - held.start :][: rows.shape[0]].copy_(rows)


def _like(weight: Any, local: Tensor, num_classes: int) -> Tensor:
    """Return this rank's rows as a DTensor where `weight` is one."""
    if not hasattr(weight, "to_local"):
        return local
    from torch.distributed.tensor import DTensor

    shape = torch.Size((num_classes, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride
    )
