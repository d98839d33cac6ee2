"""`python -m bench compare A.json B.json`: is B slower, or does it hold more memory, than A?

Exit code 0, 1 where something is worse by more than the threshold, 2 for bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import show
from bench.commands.options import Parser, at_least
from bench.compare import THRESHOLD, compare, load, print_comparison


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m bench compare", description="What got worse from one result file to another.")
    p.add_argument("before", type=Path, metavar="A.json")
    p.add_argument("after", type=Path, metavar="B.json")
    p.add_argument(
        "--threshold", type=float, default=THRESHOLD, help=f"of a change, as a part (default: {THRESHOLD:g})"
    )
    return p


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    try:
        at_least("threshold", options.threshold, 0)
        comparison = compare(load(options.before), load(options.after), options.threshold)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print_comparison(comparison, show.output())
    return 1 if comparison.regressions else 0
