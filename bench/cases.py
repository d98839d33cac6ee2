"""What is measured: a shape, a margin and a gradient mode, and the tensors that go with them.

B rows · C classes · D features · x (B, D) embeddings · w (C, D) class centres
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expface_kernels import ArcFace, CombinedMargin, CosFace, ExpFace, NormFace, SphereFace
from expface_kernels.margins import TARGET_GRADIENTS, MarginFunction

MARGINS: dict[str, type] = {
    "expface": ExpFace,
    "arcface": ArcFace,
    "cosface": CosFace,
    "sphereface": SphereFace,
    "combined": CombinedMargin,
    "normface": NormFace,
}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16)
}

# Rows of every stage of training: at 90° nothing is learnt, at 50° with s = 64 nearly all of a row is.
TARGET_DEGREES = (50.0, 90.0)
# Not 1, so that a head which forgets to normalise its rows is caught.
ROW_LENGTH = 3.0


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case, shared by all peers: leaves whose `.grad` a step fills."""

    case: Case
    x: Tensor  # (B, D)
    w: Tensor  # (C, D)
    labels: Tensor  # (B,) int64

    def drop_gradients(self) -> None:
        self.x.grad = self.w.grad = None


@dataclass(frozen=True)
class Case:
    """One forward and backward with both gradients; ValueError where a field is out of range.

    margin: a name of MARGINS, at its default strength. scale: s > 0. target_gradient: "exact" or "detached".
    """

    rows: int
    classes: int
    features: int
    dtype: str = "float32"
    margin: str = "expface"
    scale: float = 64.0
    target_gradient: str = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "classes", "features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name, allowed in (
            ("dtype", DTYPES),
            ("margin", MARGINS),
            ("target_gradient", TARGET_GRADIENTS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {list(allowed)}, got {getattr(self, name)!r}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale: expected a finite number above 0, got {self.scale}")

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.dtype].itemsize

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the two gradients, which every head has to hand out; the inputs have as many."""
        return (self.rows + self.classes) * self.features * self.itemsize

    @property
    def flops(self) -> int:
        """6·B·C·D: three products of 2·B·C·D, the least that a forward and both gradients need."""
        return 6 * self.rows * self.classes * self.features

    def margin_function(self) -> MarginFunction:
        margin: MarginFunction = MARGINS[self.margin]()
        return margin

    def at_most(self, rows: int, classes: int) -> Case:
        """The same kind of case, no larger than this."""
        return dataclasses.replace(self, rows=min(self.rows, rows), classes=min(self.classes, classes))

    def inputs(self) -> Inputs:
        """Tensors drawn from `seed`: centres normal(0, 0.01), target angles spread over TARGET_DEGREES."""
        generator = torch.Generator().manual_seed(self.seed)
        w = torch.empty(self.classes, self.features).normal_(0, 0.01, generator=generator)
        labels = torch.randint(self.classes, (self.rows,), generator=generator)
        low, high = (math.radians(degrees) for degrees in TARGET_DEGREES)
        theta = low + (high - low) * torch.rand(self.rows, 1, generator=generator)
        target = F.normalize(w[labels])
        other = torch.empty(self.rows, self.features).normal_(generator=generator)
        other = F.normalize(other - (other * target).sum(1, keepdim=True) * target)
        x = ROW_LENGTH * (theta.cos() * target + theta.sin() * other)
        dtype = DTYPES[self.dtype]
        return Inputs(self, x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), labels)


DEFAULT = Case(rows=256, classes=100_000, features=512)
TOY = Case(rows=32, classes=600, features=32)
# The shape of the memory sweep; its classes are MEMORY_CLASSES.
MEMORY = Case(rows=128, classes=1_000_000, features=128)
MEMORY_CLASSES = (100_000, 1_000_000, 4_000_000)
# Above this only ours is measured: heads that hold the logits take minutes and 14 GB for one more point of
# a straight line.
LARGEST_WITH_LOGITS = 1_000_000
