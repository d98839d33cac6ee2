"""The processes that share one checkpoint: who they are, and failing together instead of hanging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from expface_kernels.distributed.group import Group

T = TypeVar("T")


class Members:
    """The members of one process group, or this process alone where the group is None.

    Each method is called by every member; each is two all_gathers, of lengths and of a few hundred bytes a
    rank. What is said is JSON: to read what another process sent runs no code.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self._group = Group(group)
        self.rank, self.size = self._group.rank, self._group.size

    @property
    def first(self) -> bool:
        """This process does what only one may do."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, of what JSON can hold, in order of ranks."""
        return self._group.gather_json(value)

    def agree(self, told: dict[str, str]) -> None:
        """ValueError on every rank, naming ranks and values, unless all say the same."""
        self._group.agree(told, "this checkpoint")

    def together(self, action: Callable[[], T]) -> T:
        """Do it on every rank; where it fails on one, every rank raises, saying which and why."""
        error: Exception | None = None
        try:
            result = action()
        except Exception as caught:  # whatever it is, the others must not wait for this rank
            error = caught
        texts = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
        if failed:
            raise RuntimeError("; ".join(f"rank {rank} failed: {text}" for rank, text in failed))
        return result


def members_of(weight: Tensor, process_group: dist.ProcessGroup | None) -> Members:
    """The ranks that hold a weight: those of its mesh if it is a DTensor, else of `process_group`."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor, such as head.weight, got {type(weight).__name__}")
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return Members(process_group)
    placements = tuple(weight.placements)  # type: ignore[attr-defined]
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"weight: expected a DTensor that is Shard(0) over a mesh of one dimension, got {placements} "
            f"over {mesh}"
        )
    if process_group is not None and process_group is not mesh.get_group():
        raise ValueError("process_group: expected None, since a DTensor brings its own; got another group")
    return Members(mesh.get_group())
