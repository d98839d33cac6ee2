"""`python -m expface_kernels COMMAND`: exit code 2, and one line on standard error, for bad input."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from expface_kernels import __version__
from expface_kernels.commands import Parser

PROGRAM = "python -m expface_kernels"
# Name → module with add_parser(subparsers) and main(options) -> int, loaded when it is called; its summary.
COMMANDS = {
    "gradcheck": ("expface_kernels.cli.gradcheck", "judge loss and gradients against float64"),
    "plan": ("expface_kernels.cli.plan", "memory of a rank, seconds of a step, the fewest devices that fit"),
    "curves": ("expface_kernels.cli.curves", "what margins do over the angle: a table and pictures"),
    "info": ("expface_kernels.cli.info", "what this machine has, and which backends can run on it"),
}
EXTRA = "cli"
"""What installs the packages that only the commands need."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    name = next((word for word in argv if not word.startswith("-")), None)
    if name is None and not {"-h", "--help", "--version"}.intersection(argv):
        print(f"{PROGRAM}: expected a command of {', '.join(COMMANDS)} (see --help)", file=sys.stderr)
        return 2
    parser = Parser(prog=PROGRAM, description="Tools of expface_kernels; COMMAND --help says more.")
    parser.add_argument("--version", action="version", version=f"expface_kernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    try:
        command = _added(subparsers, name)
        options = parser.parse_args(argv)
    except ValueError as error:
        return _refuse(name, str(error))
    assert command is not None, "argparse has refused every other name"
    try:
        code: int = command.main(options)
        return code
    except (ValueError, OSError) as error:
        return _refuse(name, _by_options(str(error), options))


def _refuse(command: str | None, message: str) -> int:
    print(f"{PROGRAM} {command}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _by_options(message: str, options: argparse.Namespace) -> str:
    """Name the arguments before a message's first colon as the command line does: `--sample-rate`."""
    names, colon, rest = message.partition(":")
    if not colon or not all(name in vars(options) for name in names.split(", ")):
        return message
    given = ", ".join("--" + name.replace("_", "-") for name in names.split(", "))
    return f"argument {given}:{rest}"


def _added(subparsers: argparse._SubParsersAction[Parser], chosen: str | None) -> ModuleType | None:
    """Add every command to the parser; load and return the chosen one alone."""
    loaded = None
    for name, (path, summary) in COMMANDS.items():
        if name != chosen:
            subparsers.add_parser(name, help=summary)
            continue
        try:
            loaded = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("expface_kernels"):
                raise
            package = error.name.partition(".")[0]
            raise ValueError(f"needs {package}: pip install 'expface_kernels[{EXTRA}]'") from error
        loaded.add_parser(subparsers)
    return loaded


if __name__ == "__main__":
    sys.exit(main())
