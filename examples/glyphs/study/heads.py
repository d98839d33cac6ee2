"""The heads that are compared: a margin, what its target gradient is, and ways to mend the exact one.

B rows · theta target angle, radians · psi the margin's similarity, cosine units
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expface_kernels import ArcFace, CosFace, ExpFace, MarginSoftmaxHead, NormFace, SphereFace
from expface_kernels.margins import MarginFunction, target_similarity

from ..model import EMBEDDING_SIZE

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
# Of all steps: until then "later" trains detached and a rising scale rises, from this share of it.
MENDED_UNTIL = 0.5
FIRST_SCALE = 0.25


class Floored:
    """A margin whose pull is never weaker than that of cos θ: dpsi/dθ where it falls as steeply, else −sin θ.

    The value is the margin's own. For use with the exact target gradient.
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
    """dpsi/dθ (B,) as training takes it: with the target gradient that is named; negative pulls closer."""
    with torch.enable_grad():
        angle = theta.detach().requires_grad_()
        psi = target_similarity(margin, angle, target_gradient)
        return torch.autograd.grad(psi.sum(), angle)[0]


def make_head(
    margin: str, mode: str, m: float | None, scale: float, num_classes: int, seed: int
) -> MarginSoftmaxHead:
    """The head as it starts; `follow_schedule` changes it on the way. `m` is None for NormFace."""
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
    """Set what changes during training for the next step, where `done` of all steps (0 to 1) lie behind."""
    if mode == "later":
        head.target_gradient = "detached" if done < MENDED_UNTIL else "exact"
    if mode in RISING:
        head.scale = scale * min(1.0, FIRST_SCALE + (1 - FIRST_SCALE) * done / MENDED_UNTIL)


def title(margin: str, mode: str) -> str:
    """For tables and pictures: "ExpFace exact"; no mode where it makes no difference."""
    name = MARGINS[margin].__name__
    return name if margin in SLOPE_OF_COSINE else f"{name} {MODES[mode]}"
