"""Remapping of classes: added, dropped and reordered, with the optimizer state of those that stay.

C classes, all of them · D features
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from expface_kernels.checkpoint.table import STATE_PREFIX, WEIGHT, CentreTable
from expface_kernels.checks import INTEGERS, check_integer
from expface_kernels.distributed.module import INIT_STD
from expface_kernels.distributed.sampling import mixed_seed

ADDED = -1
# What torch's optimizers start a row with.
FRESH_STATE = {
    "momentum_buffer": 0.0,  # SGD, RMSprop
    "exp_avg": 0.0,  # Adam and its kin
    "exp_avg_sq": 0.0,
    "max_exp_avg_sq": 0.0,
    "exp_inf": 0.0,  # Adamax
    "square_avg": 0.0,  # RMSprop, Adadelta
    "grad_avg": 0.0,
    "acc_delta": 0.0,
}
# Added classes are drawn in blocks, each from its own seed, so that a value depends neither on how many
# ranks read it nor on where they cut.
BLOCK = 1024
SALT = int.from_bytes(b"remapped", "big")
"""Goes into a block's seed: a head draws its first centers in blocks too, and none may be another's."""


def class_mapping(old: Sequence[Hashable], new: Sequence[Hashable]) -> Tensor:
    """Make the mapping for `remap_classes` from the names of old and new classes, each in label order.

    Returns (C_new,) int64: the old class of the same name, −1 where there is none. ValueError where a name
    occurs twice.
    """
    labels = _labels("old", old)
    return torch.tensor([labels.get(name, ADDED) for name in _labels("new", new)], dtype=torch.int64)


def _labels(argument: str, names: Sequence[Hashable]) -> dict[Hashable, int]:
    """Return the label of each name, in their order."""
    labels: dict[Hashable, int] = {}
    for label, name in enumerate(names):
        if labels.setdefault(name, label) != label:
            raise ValueError(f"{argument}: expected each class once, got {name!r} twice")
    return labels


def remap_classes(
    table: CentreTable,
    old_class: Tensor | Sequence[int],
    *,
    seed: int = 0,
    fresh_state: Mapping[str, float] | None = None,
) -> RemappedTable:
    """Make a table with other classes than `table`, whose rows are made when they are read.

    Args:
        table: from `open_centres`, `open_insightface` or `centres_of`.
        old_class: (C_new,) integers: which class of `table` each new class was, −1 for one that is added.
            Each old class at most once; those not named are dropped. `class_mapping` makes it from names.
        seed: of the added centers, normal(0, 0.01): the same ones however many ranks read them, and others
            than any seed draws for a new head. The same seed and new class give the same center again: where
            classes were added to `table` before and moved since, give another.
        fresh_state: by name, what an added class's optimizer state holds. Known are torch's SGD, Adam, AdamW,
            Adamax, RMSprop and Adadelta, all of which start with 0; needed for any other.

    Numbers that all classes share (Adam's step) stay. An added class then starts with zero moments at a late
    step: with β = (0.9, 0.999) its first update is 3.2 times the learning rate, against 1 in a new training.

    Raises:
        TypeError, ValueError: `old_class` of another dtype or shape, out of range, or with a class twice; a
            state whose fresh value is not known; a table that has only this rank's classes.
    """
    check_integer("seed", seed)
    mapping = _checked_mapping(old_class, table.num_classes)
    if table.held.size != table.num_classes:
        raise ValueError(
            f"{table.origin}: expected a table of all {table.num_classes} classes, got this rank's "
            f"{table.held.size}; save the centers, then remap the file"
        )
    fresh = FRESH_STATE | dict(fresh_state or {})
    for name in table.tensors:
        short = name.removeprefix(STATE_PREFIX)
        if name != WEIGHT and short not in fresh:
            raise ValueError(f"fresh_state: expected a value for {short!r}, got {dict(fresh_state or {})}")
    return RemappedTable(table, mapping, seed, fresh)


def _checked_mapping(old_class: Tensor | Sequence[int], num_classes: int) -> Tensor:
    """Return (C_new,) int64 on the CPU, in which each old class occurs at most once."""
    mapping = torch.as_tensor(old_class)
    if mapping.dim() != 1 or mapping.numel() == 0:
        raise ValueError(f"old_class: expected shape (C_new,), got {tuple(mapping.shape)}")
    if mapping.dtype not in INTEGERS:
        raise TypeError(f"old_class: expected an integer dtype, got {mapping.dtype}")
    mapping = mapping.cpu().long()
    least, most = int(mapping.min()), int(mapping.max())
    if least < ADDED or most >= num_classes:
        wrong = least if least < ADDED else most
        raise ValueError(f"old_class: expected −1 or a class below {num_classes}, got {wrong}")
    kept = mapping[mapping != ADDED]
    classes, counts = kept.unique(return_counts=True)
    if classes.numel() != kept.numel():
        raise ValueError(
            f"old_class: expected each class at most once, got {int(classes[counts > 1][0])} twice"
        )
    return mapping


class RemappedTable(CentreTable):
    """Reads the rows of another table under new class ids; see `remap_classes`."""

    def __init__(self, table: CentreTable, old_class: Tensor, seed: int, fresh: Mapping[str, float]) -> None:
        origin, count = f"{table.origin} (remapped)", old_class.numel()
        super().__init__(origin, count, table.tensors, table.values, table.optimizer)
        self._table = table
        self._old_class = old_class
        self._seed = seed
        self._fresh = fresh

    def take(self, name: str, classes: Tensor) -> Tensor:
        old = self._old_class[classes]
        kept = old != ADDED
        dtype, row = self.tensors[name]
        out = torch.empty((classes.numel(), *row), dtype=dtype)
        out[kept] = self._table.take(name, old[kept]).cpu()
        if name == WEIGHT:
            self._draw(out, ~kept, classes)
        else:
            out[~kept] = self._fresh[name.removeprefix(STATE_PREFIX)]
        return out

    def _draw(self, out: Tensor, added: Tensor, classes: Tensor) -> None:
        """Draw first centers into the rows of `out` where `added`, which are the new `classes`."""
        blocks = classes // BLOCK
        for block in blocks[added].unique().tolist():
            generator = torch.Generator().manual_seed(mixed_seed(self._seed, SALT, block))
            drawn = out.new_empty(BLOCK, *out.shape[1:]).normal_(0, INIT_STD, generator=generator)
            here = added & (blocks == block)
            out[here] = drawn[classes[here] - block * BLOCK]
