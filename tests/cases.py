"""Inputs that tests share: margins, shapes, scales; batches and baselines are `expface_kernels.testing`'s.

B rows · C classes · D features · x (B, D) embeddings · w (C, D) class centres
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expface_kernels import (
    ArcFace,
    CombinedMargin,
    CosFace,
    ExpFace,
    NormFace,
    SphereFace,
    margin_cross_entropy,
)
from expface_kernels.backends import triton
from expface_kernels.margins import MarginFunction
from expface_kernels.testing.baselines import eager, leaves, naive_loss, truth  # noqa: F401
from expface_kernels.testing.batches import KINDS, batch  # noqa: F401

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


def gen(rows: int, dim: int, classes: int) -> tuple[Tensor, Tensor]:
    """x (B, D) and w (C, D), float64, from sines: the same on every machine and in every language."""
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    j = torch.arange(classes, dtype=torch.float64)[:, None]
    d = torch.arange(dim, dtype=torch.float64)
    return torch.sin(0.7 * i + 1.3 * d + 0.1), torch.cos(0.9 * j + 0.37 * d**2 + 0.2)


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
