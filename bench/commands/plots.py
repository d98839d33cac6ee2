"""`python -m bench plots SWEEP.json FOLDER`: the pictures of a sweep that was made before."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import plots
from bench.commands.options import Parser, folder_to_write
from bench.compare import load
from bench.sweep_result import Sweep


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m bench plots", description="Draw a sweep's four PNGs.")
    p.add_argument("sweep", type=Path, metavar="SWEEP.json")
    p.add_argument("folder", type=Path, metavar="FOLDER")
    return p


def main(argv: Sequence[str]) -> int:
    """Exit code 0, or 2 for bad input."""
    options = parser().parse_args(argv)
    try:
        if (reason := plots.unavailable()) is not None:
            raise ValueError(reason)
        sweep = load(options.sweep)
        if not isinstance(sweep, Sweep):
            raise ValueError(f"{options.sweep}: expected a sweep, got a single case")
        if not options.folder.is_dir():
            raise ValueError(f"folder: there is no directory {options.folder}")
        folder_to_write("folder", options.folder)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    for path in plots.draw(sweep, options.folder):
        print(f"wrote {path}")
    return 0
