"""Which rank holds which classes: pure arithmetic, no torch."""

from __future__ import annotations

from typing import NamedTuple


class ClassRange(NamedTuple):
    """The classes start, …, stop − 1 of one rank; size may be 0."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        """One past the last class."""
        return self.start + self.size


def shard_ranges(num_classes: int, world_size: int) -> list[ClassRange]:
    """One range a rank, as DTensor's Shard(0) cuts them: ⌈C/W⌉ classes each, late ranks fewer or none.

    `head.weight` is cut so, and torch.distributed.checkpoint counts on it. ValueError for less than one
    class or rank.
    """
    _check(num_classes, world_size)
    chunk = largest_shard(num_classes, world_size)
    starts = [min(rank * chunk, num_classes) for rank in range(world_size)]
    return [ClassRange(start, min(chunk, num_classes - start)) for start in starts]


def largest_shard(num_classes: int, world_size: int) -> int:
    """⌈C/W⌉, classes of the first of `shard_ranges`."""
    return -(-num_classes // world_size)


def insightface_ranges(num_classes: int, world_size: int) -> list[ClassRange]:
    """One range a rank, as InsightFace's PartialFC_V2 cuts them: sizes differ by one at most, larger first.

    Its checkpoint files, one a rank, hold these rows. ValueError for less than one class or rank.
    """
    _check(num_classes, world_size)
    size, rest = divmod(num_classes, world_size)
    return [
        ClassRange(size * rank + min(rank, rest), size + (1 if rank < rest else 0))
        for rank in range(world_size)
    ]


def _check(num_classes: int, world_size: int) -> None:
    for name, value in (("num_classes", num_classes), ("world_size", world_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
