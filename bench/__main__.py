"""`python -m bench`: exit code 0, 1 where a peer was wrong or a measurement failed, 2 for bad input."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# Each is imported when it is asked for: not every machine has what all of them need.
COMMANDS = {
    "sweep": ("bench.commands.sweep", "main"),
    "gpu": ("bench.commands.sweep", "gpu_main"),
    "compare": ("bench.commands.compare", "main"),
    "plots": ("bench.commands.plots", "main"),
    "readme": ("bench.commands.readme", "main"),
}
SINGLE = ("bench.commands.single", "main")
QUICK = "--quick"
"""Asks for the quick sweep, with or without the word "sweep" before it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Of the command that the first argument names; without one, the quick sweep or a single case."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        module, function = COMMANDS[argv.pop(0)]
    else:
        module, function = COMMANDS["sweep"] if QUICK in argv else SINGLE
    code: int = getattr(importlib.import_module(module), function)(argv)
    return code


if __name__ == "__main__":
    sys.exit(main())
