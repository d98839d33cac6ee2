"""What heads have in common that own the centres of some classes: their range, checks, no replication.

D features
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from expface_kernels.partial_fc.comm import Ranks, check_agreement, tell_of_error
from expface_kernels.partial_fc.ranges import ClassRange
from expface_kernels.partial_fc.replication import refuse_ddp


def _alike(one: Any, other: Any) -> bool:
    """Of one shape, and both DTensors or none."""
    return _described(one) == _described(other)


def _described(value: Any) -> str:
    kind = "a DTensor" if hasattr(value, "to_local") else "a tensor"
    return f"{kind} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


class CentreModule(nn.Module):
    """Base of a module whose parameter `weight` holds this rank's centres, (num_local, D).

    A subclass sets `_ranks` (None: this process has all classes) before anything else, and `_shard`.
    """

    _ranks: Ranks | None
    _shard: ClassRange

    CHECKS: ClassVar[dict[str, Callable[[Any], None]]] = {}
    """What an attribute may be assigned, checked when it is."""
    MARGIN: ClassVar[str] = "margin"
    """The attribute that may be a module or not: torch would not let one replace the other."""
    BUILT: ClassVar[str] = "the head"
    """What ranks are told that they do not build alike."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.CHECKS:
            self._check_assigned(name, value)
        if name == self.MARGIN:
            self.__dict__.pop(name, None)
            self.__dict__.get("_modules", {}).pop(name, None)
        super().__setattr__(name, value)

    def _check_assigned(self, name: str, value: Any) -> None:
        self.CHECKS[name](value)

    @property
    def class_start(self) -> int:
        """First class of this process."""
        return self._shard.start

    @property
    def num_local(self) -> int:
        """Number of classes of this process; 0 on late ranks where there are few classes."""
        return self._shard.size

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module; DistributedDataParallel, which must not replicate shards, gets a RuntimeError."""
        if self._ranks is not None:
            refuse_ddp(self, sys._getframe(1))
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        # torch would tell of tensors that do not mix, and with assign=True take any.
        key = f"{prefix}weight"
        got = state_dict.get(key)
        if self._ranks is None or got is None or _alike(got, self.weight):
            super()._load_from_state_dict(state_dict, prefix, *others)
            return
        errors: list[str] = others[-1]
        errors.append(
            f"{key}: expected {_described(self.weight)}, as this rank's own state_dict() has it, with its "
            f"{self.num_local} classes from {self.class_start} on, got {_described(got)}. Onto any ranks "
            "load_sharded of expface_kernels.checkpoint loads what save_sharded wrote, and load_centres what "
            "save_centres or InsightFace wrote; docs/checkpoints.md has the way from a state_dict with all "
            "classes"
        )

    def _agree(self, told: dict[str, str]) -> None:
        """Where it is built: ValueError on every rank unless all told the same and none failed."""
        if self._ranks is not None:
            check_agreement(told, None, self._ranks, self.BUILT)

    def _tell_of_failure(self, error: Exception) -> None:
        """In `_agree`'s place on a rank that is about to raise: the others raise too."""
        if self._ranks is not None:
            tell_of_error(error, self._ranks, self.BUILT)
