"""What InsightFace's margin objects compute, told by the name of their class and their attributes.

Theirs turn cosines (N, C) and labels into logits; a margin here maps an angle. The gradient is the detached
one in both: the value with the margin, the slope of cos θ.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

from torch import nn

from expface_kernels.margins import ArcFace, CosFace, ExpFace, Margin, SphereFace

DEFAULT_SCALE = 64.0
USE_INSTEAD = (
    "pass ArcFace(s, margin), CosFace(s, m) or CombinedMarginLoss(s, m1, m2, m3) of InsightFace, "
    "PowerFace(s, m) or SphereFace(s, m) of ExpFace's authors, or a margin of expface_kernels, such as "
    "ExpFace(0.7), and its scale=64"
)


class Recognised(NamedTuple):
    """A margin object in our terms."""

    margin: Margin
    scale: float
    filter_threshold: float
    """Cosines of other classes above it count as 0; 0 for no filter."""


def recognise(margin_loss: Any, scale: float | None = None) -> Recognised:
    """The margin, scale and filter of an object of theirs, as its attributes are now, or of a margin of ours.

    scale: of a margin of ours, which has none; None is 64. Theirs bring `s`.

    ValueError for another class, a subclass too (what it computes may differ), for one of that name that has
    parameters (a head of its own), for a missing attribute or one that is no number, and where theirs raises.
    """
    if isinstance(margin_loss, Margin):
        return Recognised(margin_loss, DEFAULT_SCALE if scale is None else scale, 0.0)
    name = type(margin_loss).__name__
    known = {
        "ArcFace": _arcface,
        "CosFace": lambda loss: CosFace(_number(loss, "m")),
        "CombinedMarginLoss": _combined,
        "PowerFace": lambda loss: ExpFace(_number(loss, "m")),
        "SphereFace": lambda loss: SphereFace(_number(loss, "m")),
    }
    if isinstance(margin_loss, type) or name not in known:
        got = f"the class {margin_loss.__name__} itself" if isinstance(margin_loss, type) else name
        raise ValueError(
            f"margin_loss: expected a margin that is known by its class, got {got}; {USE_INSTEAD}"
        )
    _refuse_parameters(margin_loss, name)
    if scale is not None:
        raise ValueError(f"scale: expected None with a margin that brings its own s, got {scale} with {name}")
    threshold = 0.0
    if name == "CombinedMarginLoss":
        threshold = max(_number(margin_loss, "interclass_filtering_threshold"), 0.0)
    return Recognised(known[name](margin_loss), _number(margin_loss, "s"), threshold)


def _refuse_parameters(margin_loss: Any, name: str) -> None:
    """Theirs have none; heads of other libraries, which own their centres, go by the same names."""
    if not isinstance(margin_loss, nn.Module):
        return
    found = [f"{parameter} {tuple(value.shape)}" for parameter, value in margin_loss.named_parameters()]
    if found:
        raise ValueError(
            f"margin_loss: expected {name} without parameters, as InsightFace's are, got one with "
            f"{', '.join(found)}: a head of its own, whose centres would not train; {USE_INSTEAD}"
        )


def check_margin_loss(margin_loss: Any) -> None:
    """ValueError where `recognise` would raise."""
    recognise(margin_loss)


def warn_of_dropped(margin_loss: Any) -> None:
    """UserWarning where their CombinedMarginLoss has an m1 or m2 that it does not look at."""
    if type(margin_loss).__name__ != "CombinedMarginLoss" or isinstance(margin_loss, Margin):
        return
    m1, m2, m3 = (_number(margin_loss, name) for name in ("m1", "m2", "m3"))
    if m3 > 0 and (m1 != 1 or m2 != 0):
        warnings.warn(
            f"margin_loss: CombinedMarginLoss with m3={m3:g} above 0 is cos θ - m3, as InsightFace computes "
            f"it: m1={m1:g} and m2={m2:g} are dropped. All three count in "
            f"expface_kernels.CombinedMargin({m1:g}, {m2:g}, {m3:g})",
            UserWarning,
            stacklevel=3,
        )


def _arcface(loss: Any) -> Margin:
    """InsightFace's has `margin`, that of ExpFace's authors `m`; radians both."""
    return ArcFace(_number(loss, "m" if hasattr(loss, "m") else "margin"))


def _combined(loss: Any) -> Margin:
    m1, m2, m3 = (_number(loss, name) for name in ("m1", "m2", "m3"))
    if m3 > 0:
        return CosFace(m3)
    if m1 == 1 and m3 == 0:
        return ArcFace(m2)
    raise ValueError(
        "margin_loss: expected CombinedMarginLoss with m3 > 0, or m1 = 1 and m3 = 0, since InsightFace's "
        f"raises for others, got m1={m1:g}, m2={m2:g}, m3={m3:g}; pass "
        f"expface_kernels.CombinedMargin({m1:g}, {m2:g}, {m3:g}) and its scale"
    )


def _number(loss: Any, name: str) -> float:
    owner = type(loss).__name__
    if not hasattr(loss, name):
        raise ValueError(
            f"margin_loss: expected {owner} with the attribute {name!r}, as it has had since 12/2022, got "
            f"one without it; {USE_INSTEAD}"
        )
    value = getattr(loss, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"margin_loss: expected a finite number as {owner}.{name}, got {value!r}")
    return float(value)
