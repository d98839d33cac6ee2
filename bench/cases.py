"""A case says what is measured: a shape, a margin and a gradient mode; `inputs` draws its tensors.

B rows · C classes · D features · x (B, D) embeddings · w (C, D) class centers
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expface_kernels.checks import DTYPES
from expface_kernels.margin_spec import MARGINS
from expface_kernels.margins import TARGET_GRADIENTS, MarginFunction

DEVICES = ("cpu", "cuda")
AUTOCASTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# Every stage of training: at 90° nothing is learned, at 50° with s = 64 a row is nearly well classified.
TARGET_DEGREES = (50.0, 90.0)
# Not 1, so that a head that forgets to normalize its rows is caught.
ROW_LENGTH = 3.0


@dataclass(frozen=True)
class Inputs:
    """Holds the tensors of a case, shared by all peers: leaves whose `.grad` a step fills."""

    case: Case
    x: Tensor  # (B, D)
    w: Tensor  # (C, D)
    labels: Tensor  # (B,) int64

    def drop_gradients(self) -> None:
        self.x.grad = self.w.grad = None

    def of(self, case: Case) -> Inputs:
        """Return the same tensors for another case of the same shape."""
        return dataclasses.replace(self, case=case)

    def subset(self) -> Tensor | None:
        """Draw S sorted classes (S,) int64, the labels' own among them; None where all take part."""
        case = self.case
        if case.sample_rate == 1:
            return None
        generator = torch.Generator(case.device).manual_seed(case.seed)
        priority = torch.rand(case.classes, generator=generator, device=case.device)
        priority[self.labels] = 2
        return priority.topk(case.taking_part).indices.sort().values


@dataclass(frozen=True)
class Case:
    """Describes one forward and backward with both gradients; raises ValueError for a field out of range.

    margin: a name of MARGINS, at its default strength. scale: s > 0. target_gradient: "exact" or "detached".
    autocast: the dtype of torch.autocast around the forward, a name of AUTOCASTS, or None for none.
    backward: False for the forward alone, without autograd, as in an evaluation.
    sample_rate: the share of the classes that take part, as in partial FC; 1 for all.
    """

    rows: int
    classes: int
    features: int
    dtype: str = "float32"
    margin: str = "expface"
    scale: float = 64.0
    target_gradient: str = "exact"
    seed: int = 0
    device: str = "cpu"
    autocast: str | None = None
    backward: bool = True
    sample_rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rows", "classes", "features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name, allowed in (
            ("dtype", DTYPES),
            ("margin", MARGINS),
            ("target_gradient", TARGET_GRADIENTS),
            ("device", DEVICES),
            ("autocast", (None, *AUTOCASTS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {list(allowed)}, got {getattr(self, name)!r}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale: expected a finite number above 0, got {self.scale}")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate: expected above 0 and at most 1, got {self.sample_rate}")

    @property
    def product_dtype(self) -> torch.dtype:
        """The products multiply in autocast's dtype, else in the inputs' own."""
        return DTYPES[self.dtype] if self.autocast is None else AUTOCASTS[self.autocast]

    @property
    def itemsize(self) -> int:
        """One element takes so many bytes."""
        return DTYPES[self.dtype].itemsize

    @property
    def taking_part(self) -> int:
        """S classes take part: the sampled share, or as many as there are rows if that is more."""
        least = min(self.rows, self.classes)
        return max(int(self.sample_rate * self.classes), least)

    @property
    def input_bytes(self) -> int:
        """Embeddings and centers take so many bytes."""
        return (self.rows + self.classes) * self.features * self.itemsize

    @property
    def gradient_bytes(self) -> int:
        """The two gradients, which every head has to hand out, take as many bytes as the inputs, or none."""
        return self.input_bytes if self.backward else 0

    @property
    def flops(self) -> int:
        """A step needs at least 6·B·S·D, three products of 2·B·S·D; a forward alone needs one."""
        return (6 if self.backward else 2) * self.rows * self.taking_part * self.features

    def margin_function(self) -> MarginFunction:
        margin: MarginFunction = MARGINS[self.margin]()
        return margin

    @property
    def shape(self) -> tuple[int, int, int, str, bool]:
        """All peers of one comparison have this in common: (B, C, D, dtype, whether a backward follows)."""
        return self.rows, self.classes, self.features, self.dtype, self.backward

    def describe(self) -> str:
        """Name the shape and everything that differs between cases, for titles."""
        under = f" under {self.autocast} autocast" if self.autocast else ""
        under += " on a GPU" if self.device == "cuda" else ""
        return (
            f"B={self.rows:,}, C={self.classes:,}, D={self.features:,}, {self.dtype}{under}, "
            f"{self.margin}, s={self.scale:g}, {self.target_gradient} gradient"
            + ("" if self.backward else ", forward alone")
        )

    def at_most(self, rows: int, classes: int) -> Case:
        """Shrink rows and classes to no more than these."""
        return dataclasses.replace(self, rows=min(self.rows, rows), classes=min(self.classes, classes))

    def inputs(self) -> Inputs:
        """Draw tensors from `seed`: centers normal(0, 0.01), target angles spread over TARGET_DEGREES.

        The same on every run on a device. Under autocast they hold values that its dtype can hold, so that
        float64 truth is taken at what the products see.
        """
        generator = torch.Generator(self.device).manual_seed(self.seed)
        w = torch.empty(self.classes, self.features, device=self.device).normal_(0, 0.01, generator=generator)
        labels = torch.randint(self.classes, (self.rows,), generator=generator, device=self.device)
        low, high = (math.radians(degrees) for degrees in TARGET_DEGREES)
        theta = low + (high - low) * torch.rand(self.rows, 1, generator=generator, device=self.device)
        target = F.normalize(w[labels])
        other = torch.empty(self.rows, self.features, device=self.device).normal_(generator=generator)
        other = F.normalize(other - (other * target).sum(1, keepdim=True) * target)
        x = ROW_LENGTH * (theta.cos() * target + theta.sin() * other)
        x, w = (t.to(self.product_dtype).to(DTYPES[self.dtype]).requires_grad_() for t in (x, w))
        return Inputs(self, x, w, labels)


DEFAULT = Case(rows=256, classes=100_000, features=512)
