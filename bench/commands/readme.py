"""`python -m bench readme`: README's tables and numbers anew from bench/results; `--check` only compares.

Exit code 0, 1 where `--check` finds a difference, 2 for files that cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench import readme
from bench.commands.options import Parser


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m bench readme", description="Write README's numbers from bench/results.")
    p.add_argument("--check", action="store_true", help="change nothing; exit code 1 where README differs")
    return p


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    try:
        text = readme.README.read_text()
        wanted = readme.rendered(text)
    except (ValueError, KeyError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if wanted == text:
        print("README agrees with bench/results")
        return 0
    if options.check:
        print("bench: README differs from bench/results: run `make readme-tables`", file=sys.stderr)
        return 1
    readme.README.write_text(wanted)
    print("README rewritten")
    return 0
