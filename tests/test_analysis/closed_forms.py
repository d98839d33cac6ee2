"""Margins by their published formulas in mpmath, 50 digits: shares nothing with the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mpmath import mp, mpf

from expface_kernels import ArcFace, CombinedMargin, CosFace, ExpFace, NormFace, SphereFace
from expface_kernels.margins import MarginFunction

mp.dps = 50
Number = Any  # mpf


@dataclass(frozen=True)
class Form:
    """A margin, its psi as published, and angles at which psi or its slope breaks."""

    margin: MarginFunction
    psi: Callable[[Number], Number]
    breaks: list[Number] = field(default_factory=list)

    def slope(self, theta: Number) -> Number:
        return mp.diff(self.psi, theta)

    def curvature(self, theta: Number) -> Number:
        return mp.diff(self.psi, theta, 2)

    def smooth_at(self, theta: float) -> bool:
        return all(abs(theta - place) > 1e-6 for place in self.breaks)


def exp_face(m: float) -> Form:
    exponent = mpf(m)
    return Form(ExpFace(m), lambda t: mp.cos(mp.pi * (t / mp.pi) ** exponent))


def arc_face(m: float, boundary: str) -> Form:
    m_ = mpf(m)

    def psi(t: Number) -> Number:
        if boundary == "easy" and t >= mp.pi / 2:
            return mp.cos(t)
        if boundary == "monotonic" and t > mp.pi - m_:
            return mp.cos(t) - m_ * mp.sin(m_)
        return mp.cos(t + m_)

    return Form(ArcFace(m, boundary), psi, {"none": [], "easy": [mp.pi / 2]}.get(boundary, [mp.pi - m_]))


def sphere_face(m: float) -> Form:
    m_ = mpf(m)

    def psi(t: Number) -> Number:
        k = int(mp.floor(m_ * t / mp.pi))
        return (-1) ** k * mp.cos(m_ * t) - 2 * k

    return Form(SphereFace(m), psi, [k * mp.pi / m_ for k in range(1, int(m) + 1)])


def combined(m1: float, m2: float, m3: float) -> Form:
    return Form(CombinedMargin(m1, m2, m3), lambda t: mp.cos(mpf(m1) * t + mpf(m2)) - mpf(m3))


def cos_face(m: float) -> Form:
    return Form(CosFace(m), lambda t: mp.cos(t) - mpf(m))


FORMS = (
    exp_face(0.7),
    exp_face(0.5),
    exp_face(0.3),
    exp_face(0.1),
    exp_face(0.99),
    exp_face(1.0),
    arc_face(0.5, "none"),
    arc_face(1.2, "none"),
    arc_face(0.5, "monotonic"),
    arc_face(0.5, "easy"),
    cos_face(0.35),
    sphere_face(1.5),
    sphere_face(2.7),
    sphere_face(4.0),
    combined(1.0, 0.5, 0.0),
    combined(1.1, 0.3, 0.2),
    Form(NormFace(), mp.cos),
)


def continued_arccos(psi: Number) -> Number:
    """The angle whose cosine, going on downwards by 2 in each further π, is psi."""
    k = mp.floor((1 - psi) / 2)
    return k * mp.pi + mp.acos(psi + 2 * k)
