"""`python -m expface_kernels.analysis curves`: exit code 2, and one line on standard error, for bad input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from expface_kernels.analysis import cli

PROGRAM = "python -m expface_kernels.analysis"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = Parser(prog=PROGRAM)
    cli.add_parser(parser.add_subparsers(dest="command", metavar="COMMAND", required=True))
    options = parser.parse_args(argv)
    try:
        return cli.main(options)
    except (ValueError, OSError) as error:
        print(f"{PROGRAM} {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
