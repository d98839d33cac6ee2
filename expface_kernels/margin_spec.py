"""Margins by text, for command lines: `arcface:0.5`, `arcface:m=0.5,boundary=monotonic`, `module:Class`.

The names of this package win over a module of the same name; write such a module as `package.arcface:Class`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math

from expface_kernels.margins import (
    ArcFace,
    CombinedMargin,
    CosFace,
    ExpFace,
    Margin,
    MarginFunction,
    NormFace,
    SphereFace,
)

MARGINS: dict[str, type[Margin]] = {
    "expface": ExpFace,
    "arcface": ArcFace,
    "cosface": CosFace,
    "sphereface": SphereFace,
    "combined": CombinedMargin,
    "normface": NormFace,
}
"""The margins of this package, by the names that command lines use."""

FORMS = "NAME, NAME:VALUE, NAME:KEY=VALUE,… or module:Class"


def parse_margin(text: str) -> MarginFunction:
    """The margin that `text` names.

    text: a name of MARGINS, after a colon its parameters in order or as key=value, separated by commas; or
    `module:attribute`, where a class is called without arguments and anything else callable is the margin.

    ValueError, one line, for an unknown name, a parameter that the margin does not have or that is out of
    range, a module that cannot be imported, an attribute that it lacks or that is no margin.
    """
    name, colon, rest = text.strip().partition(":")
    if name.lower() in MARGINS:
        return _of_ours(name.lower(), rest)
    if not colon:
        raise ValueError(f"margin: expected {FORMS}, NAME one of {', '.join(MARGINS)}, got {text!r}")
    return _of_a_module(name, rest)


def margin_argument(text: str) -> MarginFunction:
    """`parse_margin` as the `type` of an argparse option, which shows only this kind of error's text."""
    try:
        return parse_margin(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("margin: ")) from error


def _of_ours(name: str, rest: str) -> Margin:
    margin = MARGINS[name]
    known = list(inspect.signature(margin).parameters)
    values: dict[str, float | str] = {}
    for place, part in enumerate(part.strip() for part in rest.split(",") if part.strip()):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            if place >= len(known):
                raise ValueError(f"margin: {name} has {len(known)} parameters {_listed(known)}, got {rest!r}")
            key, value = known[place], key
        if key not in known:
            raise ValueError(f"margin: {name} does not take {key!r}, its parameters are {_listed(known)}")
        if key in values:
            raise ValueError(f"margin: {name} got {key!r} twice")
        values[key] = _number_or_word(value)
    try:
        return margin(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"margin: {error}") from error


def _listed(names: list[str]) -> str:
    return f"({', '.join(names)})" if names else "(none)"


def _number_or_word(text: str) -> float | str:
    try:
        number = float(text)
    except ValueError:
        return text
    if not math.isfinite(number):
        raise ValueError(f"margin: expected a finite parameter, got {text!r}")
    return number


def _of_a_module(name: str, attribute: str) -> MarginFunction:
    text = f"{name}:{attribute}"
    try:
        margin = importlib.import_module(name)
        for part in attribute.split("."):
            margin = getattr(margin, part)
        made = margin() if isinstance(margin, type) else margin
    except Exception as error:  # the user's own code may raise anything while it is imported
        raise ValueError(f"margin: {text!r} cannot be made: {type(error).__name__}: {error}") from error
    if not callable(made):
        raise ValueError(f"margin: {text!r} must be callable, theta -> psi, got {type(made).__name__}")
    return made
