"""Command-line arguments that the programs share: a parser with one-line errors, and checked values."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line, and where to read more, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def positive_integer(text: str) -> int:
    """Parse an integer of at least 1."""
    return _integer(text, 1)


def seed(text: str) -> int:
    """Parse an integer of at least 0."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
    return value


def failed(error: object, status: int) -> int:
    """Print `error` in one line and return `status`, for `return failed(…)` in a program's main."""
    print(f"error: {error}", file=sys.stderr)
    return status


def make_folder(option: str, folder: Path) -> None:
    """Make `folder` and its parents; ValueError naming `option` where that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: expected a folder, got {folder} ({error.strerror})") from error


def make_file(option: str, path: Path) -> None:
    """Make sure that `path` can be written, before long work; ValueError naming `option` where it cannot."""
    try:
        path.touch()
    except OSError as error:
        raise ValueError(
            f"{option}: expected a file that can be written, got {path} ({error.strerror})"
        ) from error
