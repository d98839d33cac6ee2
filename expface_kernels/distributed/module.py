"""What heads have in common that own the centres of some classes: first values, DTensor, guards.

The guards look at who is calling: DistributedDataParallel and FSDP ask every submodule for its parameters,
which is the only thing that they do to a head inside a larger module, and offer no other hook.

C classes of all ranks · D features
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from expface_kernels.distributed.group import Group
from expface_kernels.distributed.ranges import ClassRange
from expface_kernels.distributed.sampling import mixed_seed

INIT_STD = 0.01
SEED_ROWS = 8192
"""Rows that one seed draws: whichever rank holds a class, and however many there are, it starts the same."""
DRAW_ROWS = 16
"""torch draws normals 16 at a time: of rows by sixteens the first are the same however many follow."""


@torch.no_grad()
def initialize(local_weight: Tensor, shard: ClassRange, seed: int) -> None:
    """Fill (num_local, D) with the rows `shard` of the initial centres, normal(0, 0.01).

    They depend on seed, D and dtype alone, not on the device. Extra memory: 8192 rows.
    """
    dtype, features = local_weight.dtype, local_weight.shape[1]
    for block in range(shard.start // SEED_ROWS, -(-shard.stop // SEED_ROWS)):
        first = block * SEED_ROWS
        start, stop = max(first, shard.start), min(first + SEED_ROWS, shard.stop)
        if start >= stop:
            continue
        generator = torch.Generator("cpu").manual_seed(seed if block == 0 else mixed_seed(seed, block))
        rows = -(-(stop - first) // DRAW_ROWS) * DRAW_ROWS
        drawn = torch.empty((rows, features), dtype=dtype, device="cpu").normal_(
            0, INIT_STD, generator=generator
        )
        local_weight[start - shard.start : stop - shard.start].copy_(drawn[start - first : stop - first])


def sharded_parameter(local_weight: Tensor, num_classes: int, group: Group) -> nn.Parameter:
    """A (num_classes, D) DTensor, Shard(0), as a parameter; this rank holds local_weight (num_local, D)."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    # Where a meta tensor will be is not known, but what its group can send is.
    device = group.device if local_weight.is_meta else local_weight.device
    mesh = DeviceMesh.from_group(group.process_group, device.type)
    features = local_weight.shape[1]
    whole = DTensor.from_local(
        local_weight,
        mesh,
        [Shard(0)],
        run_check=False,
        shape=torch.Size((num_classes, features)),
        stride=(features, 1),
    )
    return nn.Parameter(whole)


def _alike(one: Any, other: Any) -> bool:
    """Of one shape, and both DTensors or none."""
    return _described(one) == _described(other)


def _described(value: Any) -> str:
    kind = "a DTensor" if hasattr(value, "to_local") else "a tensor"
    return f"{kind} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


class CentreModule(nn.Module):
    """Base of a module whose parameter `weight` holds this rank's centres, (num_local, D).

    A subclass sets `_group` (None: this process has all classes) before anything else, and `_shard`.
    """

    _group: Group | None
    _shard: ClassRange

    CHECKS: ClassVar[dict[str, Callable[[Any], object]]] = {}
    """What an attribute may be assigned, checked when it is."""
    MARGIN: ClassVar[str] = "margin"
    """The attribute that may be a module or not: torch would not let one replace the other."""
    FIXED: ClassVar[tuple[str, ...]] = ()
    """Attributes that keep the value that they were built with."""
    BUILT: ClassVar[str] = "the head"
    """What ranks are told that they do not build alike."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.CHECKS:
            self.CHECKS[name](value)
        if name in self.FIXED and name in self.__dict__ and value != self.__dict__[name]:
            raise AttributeError(
                f"{name}: expected {self.__dict__[name]}, with which {type(self).__name__} was built, got "
                f"{value!r}; build another one"
            )
        if name == self.MARGIN:
            self.__dict__.pop(name, None)
            self.__dict__.get("_modules", {}).pop(name, None)
        super().__setattr__(name, value)

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
        """As of any module; DDP and FSDP, which must not take shards for their own, get a RuntimeError."""
        if self._group is not None:
            _refuse_wrappers(self, sys._getframe(1))
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        # torch would tell of tensors that do not mix, and with assign=True take any.
        key = f"{prefix}weight"
        got = state_dict.get(key)
        if self._group is None or got is None or _alike(got, self.weight):
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
        if self._group is not None:
            self._group.agree(told, self.BUILT)

    def _tell_of_failure(self, error: Exception) -> None:
        """In `_agree`'s place on a rank that is about to raise: the others raise too."""
        if self._group is not None:
            self._group.refuse(error, self.BUILT)

    def __getstate__(self) -> dict[str, Any]:
        # The group first: it says what to save instead of a pickle, where torch speaks of its ProcessGroup.
        return {"_group": self._group, **self.__dict__}


_DDP, _FSDP = "torch.nn.parallel.distributed", "torch.distributed.fsdp."


def _refuse_wrappers(head: nn.Module, caller: FrameType | None) -> None:
    """RuntimeError if `caller` is DistributedDataParallel or FSDP, about to take in parameters of the head.

    A user who has it ignore them may go on.
    """
    while caller is not None:
        name, seen = caller.f_globals.get("__name__", ""), caller.f_locals
        if name == _DDP:
            wrapper: Any = seen.get("self")
            ignored = getattr(wrapper, "parameters_to_ignore", None)
            if ignored is not None and hasattr(wrapper, "module"):
                ours = {id(parameter) for parameter in head._parameters.values()}
                taken = [
                    n for n, p in wrapper.module.named_parameters() if id(p) in ours and n not in ignored
                ]
                if taken:
                    raise RuntimeError(_ddp_message(taken))
        elif name.startswith(_FSDP):
            if "ignored_params" in seen:
                ignored_ids = {id(parameter) for parameter in seen["ignored_params"] or ()}
                if any(id(parameter) not in ignored_ids for parameter in head._parameters.values()):
                    raise RuntimeError(_FSDP_MESSAGE)
        else:
            return
        caller = caller.f_back


def _ddp_message(taken: list[str]) -> str:
    return (
        "DistributedDataParallel: expected a module without a sharded head, got one with "
        f"{', '.join(taken)}. Each rank holds classes of its own, which DDP would overwrite with rank 0's: "
        "wrap the backbone only, backbone = DistributedDataParallel(backbone), and call "
        "head(backbone(images), labels)"
    )


_FSDP_MESSAGE = (
    "FSDP: expected a module without a sharded head, got one. Each rank holds classes of its own already, "
    "which FSDP would cut again: shard the backbone only, or fully_shard(model, ignored_params={head.weight})"
)


class NoClasses(torch.autograd.Function):
    """What a shard without classes adds: nothing, but its gradients are there, 0, for the collectives and
    the optimizer to find."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        rows = x.shape[0]
        return x.new_full((rows,), -torch.inf, dtype=torch.float64), x.new_zeros(rows, dtype=torch.float64)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_log_l: Tensor, g_theta: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(w)


class SameWeight(torch.autograd.Function):
    """Identity whose backward refuses a sharded weight that an optimizer has changed since.

    torch sees that on a plain weight; what `to_local()` gives has a version counter of its own.
    """

    @staticmethod
    def forward(ctx: Any, log_l: Tensor, weights: list[Tensor]) -> Tensor:
        ctx.weight, ctx.version = weights[0], weights[0]._version  # in a list: not saved, only looked at
        return log_l.view_as(log_l)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        if ctx.weight._version != ctx.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace "
                f"operation: the head's weight is at version {ctx.weight._version}; expected version "
                f"{ctx.version}. Call backward before the optimizer steps"
            )
        return g, None
