"""What commands share: a parser of few words, numbers as people write them, tables and JSON."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PLAIN_WIDTH = 120
"""Columns of a table that goes to a file."""
_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage; exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def whole(text: str) -> int:
    """Read a whole number, 0 or more: 1000000, 1_000_000, 1e6 or 1M."""
    return _number(text, r"(?P<suffix>[kmg]?)", "250000 or 250k")


def count(text: str) -> int:
    """Read a whole number above 0, in the same forms."""
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text!r}")
    return number


def byte_count(text: str) -> int:
    """Read bytes, 0 or more, in the same forms and as 256M, 8GB (powers of 1000), 256MiB (of 1024)."""
    return _number(text, r"(?P<suffix>[kmg]i?|)b?", "268435456, 256MiB or 8GB")


def _number(text: str, unit: str, example: str) -> int:
    found = re.fullmatch(r"(?P<number>[0-9._]+(?:e[+-]?[0-9]+)?) ?" + unit, text.strip(), re.IGNORECASE)
    try:
        if found is None:
            raise ValueError
        digits, factor = found["number"], _SUFFIXES.get(found["suffix"].lower(), 1)
        # Through a float only where it is written as one: a float holds 53 bits.
        number = int(digits) * factor if digits.replace("_", "").isdecimal() else float(digits) * factor
        if number != int(number):
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a whole number such as {example}, got {text!r}") from None
    return int(number)


def console() -> Console:
    """Return standard output, as wide as a table needs where that is no terminal."""
    from rich.console import Console

    out = Console(highlight=False)
    return out if out.is_terminal else Console(width=PLAIN_WIDTH, highlight=False)


def table(*columns: str, left: int = 1) -> Table:
    """Return a table whose first `left` columns are text, the others numbers."""
    from rich.table import Table

    made = Table()
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right")
    return made


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json PATH`."""
    parser.add_argument("--json", type=_json_path, metavar="PATH", help="write the result there too")


def _json_path(text: str) -> Path:
    """Refuse, before anything is computed, what cannot be written to."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a directory that exists, got {text!r}")
    return path


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """Write `data`, where a path was given."""
    if path is not None:
        path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def gigabytes(nbytes: float) -> str:
    """Write bytes as GB, or MB below one, with 3 digits."""
    return f"{nbytes / 1e9:,.3g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.3g} MB"
