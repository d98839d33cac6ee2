"""`curves`: pictures of margins side by side, and a table of what happens where. Prints with rich."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from expface_kernels.analysis.curves import Description, Interval, Peak, describe, label
from expface_kernels.commands import add_json, console, write_json
from expface_kernels.margin_spec import FORMS, MARGINS, margin_argument
from expface_kernels.margins import MarginFunction


def add_parser(subparsers: Any) -> None:
    """Add the command `curves` to the subparsers of an argparse parser."""
    parser = subparsers.add_parser(
        "curves",
        help="draw margins side by side and say where they penalise, fall, rise",
        description="Draw similarity, penalties, target gradients, pull and decision boundary of each margin "
        "with its published default, a picture a view, and print where each falls, penalises most and pulls "
        "too little. Angles in degrees; in the JSON, radians.",
    )
    parser.add_argument(
        "--margin",
        type=margin_argument,
        action="append",
        default=[],
        metavar="MARGIN",
        help=f"one more, {FORMS}; may be given again",
    )
    parser.add_argument("--only", action="store_true", help="the margins of --margin alone")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/curves"),
        metavar="DIR",
        help="of the pictures (default out/curves)",
    )
    add_json(parser)


def main(options: argparse.Namespace) -> int:
    """Describe, draw, print; returns 0. ValueError or OSError, one line, before anything is drawn."""
    if options.only and not options.margin:
        raise ValueError("only: expected at least one --margin beside it")
    margins = [*([] if options.only else (make() for make in MARGINS.values())), *options.margin]
    descriptions = [_described(margin) for margin in margins]
    try:
        from expface_kernels.analysis import plots
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("expface_kernels"):
            raise
        raise ValueError(f"needs {error.name}: pip install 'expface_kernels[analysis]'") from error
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"out: expected a directory, got the file {options.out}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"out: expected a directory that can be made, got {options.out}: {error.strerror}"
        ) from error
    files = plots.draw_views(margins, options.out)
    data = {"unit": "radians", "margins": [description.as_dict() for description in descriptions]}
    write_json(options.json, data)
    out = console()
    out.print(_table(descriptions))
    out.print(f"Pictures: {', '.join(file.name for file in files)} in {options.out}/", soft_wrap=True)
    return 0


def _described(margin: MarginFunction) -> Description:
    try:
        return describe(margin)
    except Exception as error:  # a user's margin may raise anything
        text = str(error).removeprefix("margin: ")
        raise ValueError(f"margin: {label(margin)}: {text or type(error).__name__}") from error


def _table(descriptions: Sequence[Description]) -> Table:
    table = Table(
        title="Margins; angles in degrees",
        caption="weak pull: where the exact gradient pulls less towards the own class than the others push",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("margin", min_width=22)
    for column in ("psi falls on", "largest angular penalty", "cosine penalty", "weak pull", "exact slope"):
        table.add_column(column)
    for found in descriptions:
        angular, cosine = found.angular_peak, found.cosine_peak
        table.add_row(
            escape(found.margin),
            _intervals(found.falls),
            f"{math.degrees(angular.size):.1f} {_where(angular)}",
            f"{cosine.size:.3f} {_where(cosine)}",
            _intervals(found.weak),
            _slope_events(found),
        )
    return table


def _slope_events(found: Description) -> str:
    events = [f"turns at {math.degrees(angle):.1f}" for angle in found.turns]
    events += [f"vanishes at {math.degrees(angle):.1f}" for angle in found.vanishes]
    events += [f"psi jumps by {jump.size:+.3f} at {math.degrees(jump.angle):.1f}" for jump in found.jumps]
    return ", ".join(events) or "never 0"


def _intervals(intervals: Sequence[Interval]) -> str:
    return (
        ", ".join(f"{math.degrees(start):.1f}–{math.degrees(end):.1f}" for start, end in intervals)
        or "nowhere"
    )


def _where(peak: Peak) -> str:
    if (peak.start, peak.end) == (0.0, math.pi):
        return "everywhere"
    if peak.start == peak.end:
        return f"at {math.degrees(peak.start):.1f}"
    return f"on {_intervals([Interval(peak.start, peak.end)])}"
