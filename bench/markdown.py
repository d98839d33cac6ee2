"""How README writes tables, numbers, cases and commands."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import Any

from bench.cases import Case

NOTHING = "–"
WIDTH = 112


def paragraph(text: str, indent: str = "") -> str:
    """Broken into lines; a link or a command stays whole."""
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column to the left."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def link(name: str) -> str:
    return f"[bench/results/{name}](bench/results/{name})"


def machine_of(machine: dict[str, Any]) -> str:
    load_ = machine["load_average"]
    busy = "" if load_ is None else f"; load {load_:g} before the run"
    return (
        f"{machine['cores']} cores of an {machine['cpu']} ({machine['instruction_set']} kernels), "
        f"torch {machine['torch'].partition('+')[0]}{busy}"
    )


def shape_of(case: Case) -> str:
    return f"B = {case.rows:,}, C = {case.classes:,}, D = {case.features:,}"


def seconds_of(value: float) -> str:
    """Two digits, three from 1 on."""
    return f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def megabytes_of(value: float) -> str:
    return f"{value / 1e6:,.0f}"


def bytes_of(value: float) -> str:
    return f"{value / 1e9:.2g} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def typed(command: str) -> str:
    """The command as a user types it, whose files go to `out/` and not over ours."""
    return re.sub(r" --(json|plots) \S+", "", command)
