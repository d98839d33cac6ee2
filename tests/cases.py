"""Inputs that tests share: batches by what is hard about them, margins, shapes, scales; the plain textbook.

B rows · C classes · D features · x (B, D) embeddings · w (C, D) class centres · y (B,) int64 labels
Values are float64 but exactly representable in float32, so the truth is taken at what a kernel sees.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expface_kernels import (
    ArcFace,
    CombinedMargin,
    CosFace,
    ExpFace,
    NormFace,
    SphereFace,
    margin_cross_entropy,
    reference,
)
from expface_kernels.backends import triton
from expface_kernels.margins import MarginFunction, target_similarity

# Triton's interpreter takes CPU tensors, slowly; `make test-triton` sets TRITON_INTERPRET=1, and then the
# tests of every backend run over its backend alone. Where there is a GPU they run over it as well.
INTERPRETED = triton.interpreted()
GPU = torch.cuda.is_available() and not INTERPRETED
# The backends that the tests of every backend run over; a new one joins by its name.
BACKENDS = ("triton",) if INTERPRETED else ("reference", "cpu", *(["triton"] if GPU else []))
# Those of them that compute in float64, and those with kernels that take a working size in good time.
IN_FLOAT64 = tuple(name for name in BACKENDS if name != "triton")
AT_WORKING_SIZE = tuple(name for name in BACKENDS if name != "reference" and not INTERPRETED)

# Where the triton backend's tests put their tensors.
TRITON_DEVICE = "cpu" if INTERPRETED else "cuda"

# Every margin, with its default and a second parameter, ArcFace in each boundary.
MARGINS: tuple[MarginFunction, ...] = (
    ExpFace(),
    ExpFace(0.5),
    ArcFace(),
    ArcFace(0.3),
    ArcFace(0.5, boundary="monotonic"),
    ArcFace(0.8, boundary="monotonic"),
    ArcFace(0.5, boundary="easy"),
    ArcFace(0.8, boundary="easy"),
    CosFace(),
    CosFace(0.2),
    SphereFace(),
    SphereFace(4.0),
    CombinedMargin(),
    CombinedMargin(1.1, 0.3, 0.2),
    NormFace(),
)

TARGET_GRADIENTS = ("exact", "detached")
SCALES = (1.0, 30.0, 64.0, 128.0)
# The limit of plain float32 sums (70), both sides of it, and one that overflows without a maximum (256).
ALL_SCALES = (1.0, 16.0, 30.0, 64.0, 70.0, 128.0, 256.0)

SHAPES: tuple[tuple[int, int, int], ...] = (
    (1, 1, 8),  # one of each: no negatives
    (1, 2, 8),  # a single negative
    (2, 3, 3),  # the fewest features with more than one tangent (D = 1 has its own test)
    (3, 5, 7),  # nothing a multiple of a vector, all smaller than one
    (8, 16, 32),  # everything a multiple of a vector
    (17, 33, 31),  # one more and one less than vectors
    (5, 1025, 64),  # one class past the smallest tile and past one float32 sum
    (130, 9, 16),  # more rows than classes: labels repeat
    (257, 1031, 512),  # primes at working size, two threads
)
BIG = (257, 1031, 512)
SMALL_SHAPES = tuple(shape for shape in SHAPES if shape != BIG)

KINDS = ("random", "near_centre", "opposite", "learnt", "mixed", "wrong_class")

INIT_STD = 0.01
LEARNT_ANGLE = math.radians(35)
# Distances, in radians, from the centre or its opposite; rows take them in turn.
NEAR_ANGLES = (0.0, 1e-3, 1e-6, 3e-4, 1e-5)


def gen(batch: int, dim: int, classes: int) -> tuple[Tensor, Tensor]:
    """x (B, D) and w (C, D), float64, from sines: the same on every machine and in every language."""
    i = torch.arange(batch, dtype=torch.float64)[:, None]
    j = torch.arange(classes, dtype=torch.float64)[:, None]
    d = torch.arange(dim, dtype=torch.float64)
    return torch.sin(0.7 * i + 1.3 * d + 0.1), torch.cos(0.9 * j + 0.37 * d**2 + 0.2)


def batch(kind: str, rows: int, classes: int, features: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(x, w, y), float64 holding float32 values. kind is one of KINDS, or "flat" (which has 3 classes).

    "random": centres ~ N(0, 0.01²), rows anywhere. "near_centre", "opposite": rows at, and up to 1e-3 rad
    from, their centre or its antipode. "learnt": every row at 35 degrees from its centre. "mixed": all of
    these in turn. "wrong_class": every row lies on another class's centre. "flat": three centres that nearly
    agree, every row opposite to all of them: every logit is near −s, and exp(−128) is no float32.
    """
    g = torch.Generator().manual_seed(seed)
    w = _normal((classes, features), g) * INIT_STD
    y = torch.randint(classes, (rows,), generator=g)
    if kind == "flat":
        assert classes == 3, "flat has 3 classes"
        w = _normal((1, features), g) * INIT_STD + 0.05 * w
    w = w.float().double()
    toward, away = _unit(w[y]), _unit(w[(y + 1) % classes])
    sideways = _unit_tangents(toward, g)
    lengths = torch.exp(_normal((rows, 1), g) * 0.5) * 3  # an embedding's norm carries no meaning
    turn = torch.arange(rows)
    near = torch.tensor(NEAR_ANGLES, dtype=torch.float64)[turn % len(NEAR_ANGLES)][:, None]
    made = {
        "random": _unit(_normal((rows, features), g)),
        "near_centre": _rotated(toward, sideways, near),
        "opposite": -_rotated(toward, sideways, near),
        "learnt": _rotated(toward, sideways, torch.full((rows, 1), LEARNT_ANGLE, dtype=torch.float64)),
        "wrong_class": away,
        "flat": -_rotated(toward, sideways, near),
    }
    order = ("random", "near_centre", "opposite", "learnt", "wrong_class")
    made["mixed"] = torch.stack([made[name] for name in order])[turn % len(order), turn]
    x = made[kind] * lengths
    if kind in ("near_centre", "opposite"):
        # The first rows of each exactly on the axis, which a scaled unit vector misses by a rounding.
        exact = turn % len(NEAR_ANGLES) == 0
        sign = 1.0 if kind == "near_centre" else -1.0
        x = torch.where(exact[:, None], 256 * sign * w[y], x)
    return x.float().double(), w, y


def _normal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _unit(v: Tensor) -> Tensor:
    return v / torch.linalg.vector_norm(v, dim=1, keepdim=True)


def _unit_tangents(at: Tensor, g: torch.Generator) -> Tensor:
    """(B, D) random unit vectors orthogonal to the rows of `at`; 0 where D = 1 leaves none."""
    if at.shape[1] == 1:
        return torch.zeros_like(at)
    v = _normal(tuple(at.shape), g)
    return _unit(v - (v * at).sum(1, keepdim=True) * at)


def _rotated(at: Tensor, sideways: Tensor, angle: Tensor) -> Tensor:
    return torch.cos(angle) * at + torch.sin(angle) * sideways


def leaves(x: Tensor, w: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Fresh leaf copies of x and w in `dtype` that want gradients."""
    return (
        x.detach().to(dtype, copy=True).requires_grad_(),
        w.detach().to(dtype, copy=True).requires_grad_(),
    )


def device_of(backend: str) -> str:
    """Where that backend's tensors have to be."""
    return TRITON_DEVICE if backend == "triton" else "cpu"


def loss_on(
    backend: str,
    x: Tensor,
    w: Tensor,
    y: Tensor,
    margin: MarginFunction | None = None,
    *,
    class_subset: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """margin_cross_entropy on the backend's own device; tensors, the loss and gradients are on the CPU."""
    device = device_of(backend)
    subset = None if class_subset is None else class_subset.to(device)
    loss = margin_cross_entropy(
        x.to(device), w.to(device), y.to(device), margin, backend=backend, class_subset=subset, **options
    )
    assert isinstance(loss, Tensor)
    return loss.cpu()


def truth(
    x: Tensor, w: Tensor, y: Tensor, margin: MarginFunction | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dw) of the float64 reference, at the values that x and w store."""
    x, w = leaves(x, w, torch.float64)
    loss = reference.margin_cross_entropy(x, w, y, margin, **options)
    loss.sum().backward()
    return loss.detach(), x.grad, w.grad


def textbook_loss(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    margin: MarginFunction,
    *,
    scale: float = 64.0,
    reduction: str = "mean",
    target_gradient: str = "exact",
) -> Tensor:
    """What everyone writes first, in x's dtype: normalise, cosines, arccos, margin, F.cross_entropy.

    Shares nothing with the package but the margin. Finite only away from cos θ = ±1.
    """
    cos = F.normalize(x) @ F.normalize(w).T
    rows = torch.arange(x.shape[0])
    theta = torch.arccos(cos[rows, y])
    logits = cos.index_put((rows, y), target_similarity(margin, theta, target_gradient))
    return F.cross_entropy(scale * logits, y, reduction=reduction)


def eager(
    x: Tensor, w: Tensor, y: Tensor, margin: MarginFunction, *, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dw) of the textbook in `dtype`: the yardstick of tolerances.assert_close."""
    x, w = leaves(x, w, dtype)
    loss = textbook_loss(x, w, y, margin, **options)
    loss.sum().backward()
    return loss.detach(), x.grad, w.grad
