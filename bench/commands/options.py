"""What the commands share: one line for bad input, peers and files from the command line."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bench import machine, peers
from bench.cases import Case
from bench.peers.base import terms
from bench.plans import Preset

OUT = Path("out")
"""Where a run writes that was not told where: a folder of the current one, made when it is needed."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong, and which command's options count, in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench: {message} (see {self.prog} --help)\n")


def add_peers(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    parser.add_argument(
        "--peers",
        nargs="+",
        default=list(default),
        metavar="PEER",
        help=f"of {', '.join(peers.names())}, ours@BYTES (workspace), package.module:ATTRIBUTE "
        f"(default: {' '.join(default)})",
    )


def checked_peers(names: Sequence[str], preset: Preset) -> tuple[str, ...]:
    """The names, once each; ValueError for an unknown one, or where none can run the smallest shape."""
    names = tuple(dict.fromkeys(names))
    smallest = preset.grid.cases()[0]
    found = [peers.get(name) for name in names]
    reasons = [peer.why_not(terms(peer, smallest)) for peer in found]
    if all(reasons):
        raise ValueError(f"none of the peers can run: {reasons[0]}")
    return names


def check_fits(case: Case) -> None:
    """ValueError where not even inputs and gradients have room."""
    need, free = 2 * case.input_bytes, machine.available_bytes(case.device)
    if free is not None and need > free:
        raise ValueError(
            f"B={case.rows}, C={case.classes}, D={case.features} does not fit: inputs and gradients take "
            f"{need / 1e9:.4g} GB, {free / 1e9:.3g} GB are free"
        )


def file_to_write(name: str, path: Path) -> Path:
    """The path; ValueError where no file can be written there."""
    if path.is_dir():
        raise ValueError(f"{name}: expected a file, got the directory {path}")
    _writable(name, path)
    there = path.exists()
    try:
        path.open("a").close()  # what may be written is more than modes say, on /proc for one
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be written ({error.strerror})") from error
    if not there:
        path.unlink()
    return path


def folder_to_write(name: str, path: Path) -> Path:
    """The path, of a folder that is there now; ValueError where none can be made or no file written there."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{name}: expected a directory, got the file {path}")
    _writable(name, path)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be made ({error.strerror})") from error
    try:
        tempfile.TemporaryFile(dir=path).close()  # as above
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be written to ({error.strerror})") from error
    return path


def in_out(name: str, file: str) -> Path:
    """The path of that name in OUT, which is there now; ValueError, of the option `name`, without it."""
    return folder_to_write(name, OUT) / file


def _writable(name: str, path: Path) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{name}: there is no directory {path.parent}")
    existing = path if path.exists() else path.parent
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{name}: {existing} cannot be written")


def at_least(name: str, value: float, least: float) -> None:
    """ValueError below; for NaN and infinity too."""
    if not value >= least:
        raise ValueError(f"{name}: expected at least {least:g}, got {value:g}")
    if value == math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value:g}")
