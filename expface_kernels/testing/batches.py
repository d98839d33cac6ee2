"""Batches by what is hard about them; the same on every machine for the same seed.

B rows · C classes · D features · x (B, D) embeddings · w (C, D) class centres · y (B,) int64 labels
Values are float64 but exactly representable in float32, so the truth is taken at what a kernel sees.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KINDS = ("random", "near_centre", "opposite", "learnt", "spread", "mixed", "wrong_class")

INIT_STD = 0.01
LEARNT_ANGLE = math.radians(35)
# Distances, in radians, from the centre or its opposite; rows take them in turn.
NEAR_ANGLES = (0.0, 1e-3, 1e-6, 3e-4, 1e-5)


def batch(kind: str, rows: int, classes: int, features: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(x, w, y), float64 holding float32 values. kind is one of KINDS, or "flat" (which has 3 classes).

    "random": centres ~ N(0, 0.01²), rows anywhere. "near_centre", "opposite": rows at, and up to 1e-3 rad
    from, their centre or its antipode. "learnt": every row at 35 degrees from its centre. "spread": rows at
    even distances over (0, 180) degrees from their own centres. "wrong_class": every row lies on another
    class's centre. "mixed": all of these but "spread" in turn. "flat": three centres that nearly agree, every
    row opposite to all of them: every logit is near −s, and exp(−128) is no float32.
    """
    g = torch.Generator().manual_seed(seed)
    w = _normal((classes, features), g) * INIT_STD
    y = torch.randint(classes, (rows,), generator=g, device="cpu")
    if kind == "flat":
        assert classes == 3, "flat has 3 classes"
        w = _normal((1, features), g) * INIT_STD + 0.05 * w
    w = w.float().double()
    toward, away = _unit(w[y]), _unit(w[(y + 1) % classes])
    sideways = _unit_tangents(toward, g)
    lengths = torch.exp(_normal((rows, 1), g) * 0.5) * 3  # an embedding's norm carries no meaning
    turn = torch.arange(rows, device="cpu")
    near = torch.tensor(NEAR_ANGLES, dtype=torch.float64, device="cpu")[turn % len(NEAR_ANGLES)][:, None]
    made = {
        "random": _unit(_normal((rows, features), g)),
        "near_centre": _rotated(toward, sideways, near),
        "opposite": -_rotated(toward, sideways, near),
        "learnt": _rotated(toward, sideways, torch.full_like(near, LEARNT_ANGLE)),
        "wrong_class": away,
        "flat": -_rotated(toward, sideways, near),
    }
    order = ("random", "near_centre", "opposite", "learnt", "wrong_class")
    made["mixed"] = torch.stack([made[name] for name in order])[turn % len(order), turn]
    # Shifted by chance, so that no row stands at 90 degrees and the like, where margins change their course.
    shift = torch.rand(1, generator=g, dtype=torch.float64, device="cpu")
    made["spread"] = _rotated(toward, sideways, math.pi * ((turn + shift) / rows)[:, None])
    x = made[kind] * lengths
    if kind in ("near_centre", "opposite"):
        # The first rows of each exactly on the axis, which a scaled unit vector misses by a rounding.
        exact = turn % len(NEAR_ANGLES) == 0
        sign = 1.0 if kind == "near_centre" else -1.0
        x = torch.where(exact[:, None], 256 * sign * w[y], x)
    return x.float().double(), w, y


def _normal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64, device="cpu")


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
