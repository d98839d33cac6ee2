"""The heads that are compared: a margin, its target gradient, and remedies for the drift of the exact one.

B rows · theta target angle, radians · psi the margin's similarity, cosine units
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from examples.glyphs.model import EMBEDDING_SIZE
from expface_kernels import ArcFace, CosFace, ExpFace, MarginSoftmaxHead, NormFace, SphereFace
from expface_kernels.margins import MarginFunction, target_similarity

MARGINS: dict[str, type[Any]] = {
    "normface": NormFace,
    "sphereface": SphereFace,
    "cosface": CosFace,
    "arcface": ArcFace,
    "expface": ExpFace,
}
SLOPE_OF_COSINE = ("normface", "cosface")  # exact and detached are the same there
MODES = {
    "detached": "detached",
    "exact": "exact",
    "later": "detached first, exact later",
    "floored": "exact, slope floored",
    "rising": "exact, scale rising",
    "detached-rising": "detached, scale rising",  # what the exact one with a rising scale is held against
}
DETACHED, RISING = ("detached", "later", "detached-rising"), ("rising", "detached-rising")
# Up to this share of all steps "later" trains detached and a rising scale rises, from FIRST_SCALE of itself.
SCHEDULE_END = 0.5
FIRST_SCALE = 0.25


class Floored:
    """Wraps a margin so that it never pulls less than cos θ: its slope where that is as steep, else −sin θ.

    The value stays the margin's own. Use it with the exact target gradient.
    """

    def __init__(self, margin: MarginFunction) -> None:
        self.margin = margin

    def __repr__(self) -> str:
        return f"Floored({self.margin!r})"

    def __call__(self, theta: Tensor) -> Tensor:
        steep = slope(self.margin, theta, "exact") <= -torch.sin(theta.detach())
        exact = target_similarity(self.margin, theta, "exact")
        return torch.where(steep, exact, target_similarity(self.margin, theta, "detached"))


def slope(margin: MarginFunction, theta: Tensor, target_gradient: str) -> Tensor:
    """Return dpsi/dθ (B,) under the named target gradient, as training uses it; negative pulls closer."""
    with torch.enable_grad():
        angle = theta.detach().requires_grad_()
        psi = target_similarity(margin, angle, target_gradient)
        return torch.autograd.grad(psi.sum(), angle)[0]


def make_head(
    margin: str, mode: str, m: float | None, scale: float, num_classes: int, seed: int
) -> MarginSoftmaxHead:
    """Make the head as it starts; `follow_schedule` changes it during training. `m` is None for NormFace."""
    psi: MarginFunction = MARGINS[margin]() if m is None else MARGINS[margin](m)
    head = MarginSoftmaxHead(
        EMBEDDING_SIZE,
        num_classes,
        margin=Floored(psi) if mode == "floored" else psi,
        scale=scale,
        target_gradient="detached" if mode in DETACHED else "exact",
        backend="cpu",
        seed=seed,
    )
    follow_schedule(head, mode, scale, 0.0)
    return head


def follow_schedule(head: MarginSoftmaxHead, mode: str, scale: float, done: float) -> None:
    """Set scale and target gradient for the next step, after the share `done` (0 to 1) of all steps."""
    if mode == "later":
        head.target_gradient = "detached" if done < SCHEDULE_END else "exact"
    if mode in RISING:
        head.scale = scale * min(1.0, FIRST_SCALE + (1 - FIRST_SCALE) * done / SCHEDULE_END)


def title(margin: str, mode: str) -> str:
    """Return the title in tables, "ExpFace exact"; without the mode where both modes are equal."""
    name = MARGINS[margin].__name__
    return name if margin in SLOPE_OF_COSINE else f"{name} {MODES[mode]}"
