"""What the commands share: how they print and write JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 120  # columns of a table that goes to a file


def console() -> Console:
    """Standard output; as wide as a table needs where that is no terminal."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(width=PLAIN_WIDTH, highlight=False)


def table(*columns: str, left: int = 1) -> Table:
    """A table whose first `left` columns are text, the others numbers."""
    made = Table()
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right")
    return made


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=_json_path, metavar="PATH", help="write the result there too")


def _json_path(text: str) -> Path:
    """Before anything is computed: somewhere that can be written to."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a directory that exists, got {text!r}")
    return path


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def gigabytes(nbytes: float) -> str:
    """As GB, or MB below one: 3 digits."""
    return f"{nbytes / 1e9:,.3g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.3g} MB"
