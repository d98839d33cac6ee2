"""A training job, as far as its loss head is concerned, and the sizes that follow from it.

B rows of a rank · N rows of all ranks · C classes · D features · S classes that take part on a rank
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from expface_kernels.backends.base import OpConfig
from expface_kernels.checks import (
    DTYPES,
    LARGEST_TENSOR,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_sample_rate,
)
from expface_kernels.distributed.ranges import largest_shard
from expface_kernels.distributed.sampling import sample_size
from expface_kernels.functional import DEFAULT_WORKSPACE_BYTES
from expface_kernels.plan.devices import DEVICES
from expface_kernels.plan.optimizers import FUSED, OPTIMIZERS, SPARSE_TEMPORARY

AUTOCASTS = ("bfloat16", "float16")


@dataclass(frozen=True)
class Job:
    """What is to be trained; ValueError or TypeError, naming the field, where one is out of range.

    On the CPU a rank is a machine of its own.
    """

    classes: int
    """C, of all ranks together."""
    features: int = 512
    """D."""
    batch: int = 256
    """B, rows of each rank."""
    ranks: int = 1
    device: str = "cpu"
    """A name of DEVICES."""
    dtype: str = "float32"
    """Of the centres; embeddings have autocast's if there is one."""
    optimizer: str = "momentum"
    """A name of OPTIMIZERS."""
    weight_decay: float = 0.0
    fused: bool = False
    """The optimizer is made with fused=True."""
    sample_rate: float = 1.0
    """Share of the classes that take part in a step."""
    sparse_grad: bool = False
    autocast: str | None = None
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
    memory_bytes: int | None = None
    """Of a device; None is what DEVICES says, for the CPU what is free on this machine."""
    reserved_bytes: int = 0
    """Of those, what the backbone and everything else takes."""

    def __post_init__(self) -> None:
        for name in ("classes", "features", "batch", "ranks"):
            check_integer(name, getattr(self, name), least=1)
        for name in ("workspace_bytes", "reserved_bytes"):
            check_integer(name, getattr(self, name), least=0)
        if self.memory_bytes is not None:
            check_integer("memory_bytes", self.memory_bytes, least=1)
        check_choice("device", self.device, tuple(DEVICES))
        check_choice("optimizer", self.optimizer, tuple(OPTIMIZERS))
        # What the triton backend takes.
        allowed = tuple(name for name in DTYPES if self.device == "cpu" or name != "float64")
        check_choice("dtype", self.dtype, allowed)
        if self.autocast is not None:
            check_choice("autocast", self.autocast, AUTOCASTS)
        check_sample_rate(self.sample_rate)
        check_flag("fused", self.fused)
        check_flag("sparse_grad", self.sparse_grad)
        check_number("weight_decay", self.weight_decay)
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected a finite number, 0 or more, got {self.weight_decay}")
        if self.fused and self.optimizer not in FUSED:
            raise ValueError(f"fused: expected an optimizer of {FUSED}, got {self.optimizer}")
        if self.fused and self.sparse_grad:
            raise ValueError(
                "fused: expected dense gradients, got sparse_grad, which no fused optimizer takes"
            )
        self._check_reserved()
        self._check_sparse()
        self._check_sizes()

    def _check_sizes(self) -> None:
        """That there can be tensors of centres, of all ranks' rows, of a rank's logits, and its workspace."""
        rows = "batch" if self.ranks == 1 else "batch · ranks"
        for name, size in (
            ("classes · features", self.classes * self.features),
            (f"{rows} · features", self.rows * self.features),
            ("batch · classes", self.batch * self.classes),
            ("workspace_bytes / 8", self.workspace_bytes // 8),
        ):
            if size > LARGEST_TENSOR:
                about = f"some 10**{len(str(size)) - 1}"  # it may be too large for a float
                raise ValueError(f"{name}: expected at most 2**59, which a tensor can hold, got {about}")

    def _check_reserved(self) -> None:
        """Check that the reserved bytes leave something, where it is known of how much."""
        device = DEVICES[self.device]
        memory = device.memory_bytes if self.memory_bytes is None else self.memory_bytes
        if memory is not None and self.reserved_bytes >= device.usable * memory:
            raise ValueError(
                f"reserved_bytes: expected less than {device.usable:.0%} of the device's {memory:,} bytes, "
                f"which can be filled, got {self.reserved_bytes:,}"
            )

    def _check_sparse(self) -> None:
        sparse_only = self.optimizer == "sparse-adam"
        if sparse_only and not self.sparse_grad:
            raise ValueError("optimizer: sparse-adam takes sparse gradients alone, expected sparse_grad")
        if not self.sparse_grad:
            return
        if self.ranks > 1:
            raise ValueError(f"sparse_grad: expected ranks 1, a sharded head has none, got {self.ranks}")
        if self.optimizer not in SPARSE_TEMPORARY or self.weight_decay:
            raise ValueError(
                f"sparse_grad: expected an optimizer of {tuple(SPARSE_TEMPORARY)} without weight decay, got "
                f"{self.optimizer} with {self.weight_decay:g}"
            )

    @property
    def most_ranks(self) -> int:
        """Of which a tensor can hold all rows."""
        return LARGEST_TENSOR // (self.batch * self.features)

    @property
    def rows(self) -> int:
        """N, which every rank sees."""
        return self.batch * self.ranks

    @property
    def local_classes(self) -> int:
        """Of the fullest rank."""
        return largest_shard(self.classes, self.ranks)

    @property
    def active_classes(self) -> int:
        """S of the fullest rank."""
        return sample_size(self.sample_rate, self.local_classes, self.rows)

    @property
    def subset(self) -> bool:
        """Whether centres are chosen by a list."""
        return self.active_classes < self.local_classes or self.sparse_grad

    @property
    def centre_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def row_dtype(self) -> torch.dtype:
        """Of embeddings as the backbone hands them over."""
        return DTYPES[self.autocast or self.dtype]

    @property
    def centre_bytes(self) -> int:
        """Of a rank's centres."""
        return self.local_classes * self.features * self.centre_dtype.itemsize

    @property
    def gradient_bytes(self) -> int:
        """Of their gradient; a sparse one holds its rows' numbers too."""
        if self.sparse_grad:
            return self.active_classes * (self.features * self.centre_dtype.itemsize + 8)
        return self.centre_bytes

    @property
    def capacity_bytes(self) -> int:
        """What the head may use of a device."""
        device = DEVICES[self.device]
        memory = device.memory() if self.memory_bytes is None else self.memory_bytes
        return max(int(device.usable * memory) - self.reserved_bytes, 0)

    def describe(self) -> str:
        sampled = "" if self.sample_rate == 1 else f", sample rate {self.sample_rate:g}"
        sparse = ", sparse gradient" if self.sparse_grad else ""
        cast = f", autocast {self.autocast}" if self.autocast else ""
        return (
            f"C={self.classes:,}, D={self.features:,}, B={self.batch:,} on each of {self.ranks:,} "
            f"{DEVICES[self.device].title}, {self.dtype} centres{cast}, "
            f"{'fused ' if self.fused else ''}{self.optimizer}{sampled}{sparse}"
        )


def op_config_of(job: Job) -> OpConfig:
    """What the head will ask of its backend."""
    autocast = None if job.autocast is None else job.row_dtype
    return OpConfig(64.0, True, job.workspace_bytes, False, autocast)
