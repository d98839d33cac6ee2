"""Tables and progress: by rich where it is installed, else plain text, as on a bare GPU machine."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Protocol

PLAIN_WIDTH = 140  # columns of a table that goes to a file
HAS_RICH = importlib.util.find_spec("rich") is not None

Advance = Callable[[float], None]


class Output(Protocol):
    """Where a report goes."""

    def line(self, text: str) -> None: ...

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
        """The first column to the left, the others to the right."""


class Rich:
    """Title and caption outside the table, which would break them at its own width."""

    def __init__(self, file: IO[str] | None = None) -> None:
        from rich.console import Console

        self._console = Console(file=file)
        if not self._console.is_terminal:
            self._console = Console(file=file, width=PLAIN_WIDTH)

    def line(self, text: str) -> None:
        self._console.print(text, markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
        from rich.markup import escape
        from rich.table import Table

        table = Table()
        for i, column in enumerate(columns):
            table.add_column(escape(column), justify="right" if i else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        self._console.print(f"\n{title}", style="bold", markup=False)
        self._console.print(table)
        if caption:
            self.line(caption)


class Plain:
    def __init__(self, file: IO[str] | None = None) -> None:
        self._file = file

    def line(self, text: str) -> None:
        print(text, file=self._file or sys.stdout, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
        cells = [[cell.replace("\n", " ") for cell in row] for row in (columns, *rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        self.line(f"\n{title}")
        for row in cells:
            first, *others = (
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            self.line("  ".join([first, *others]).rstrip())
        if caption:
            self.line(caption)


def output(file: IO[str] | None = None) -> Output:
    """To the file, or to stdout as it is then."""
    return Rich(file) if HAS_RICH else Plain(file)


class Progress(Protocol):
    """How far a run has come."""

    def task(self, description: str, total: float) -> Advance:
        """A bar of its own; the function returned moves it on."""

    def note(self, text: str) -> None:
        """What is being done now."""


class Silent:
    """Shows nothing."""

    def task(self, description: str, total: float) -> Advance:
        return lambda amount: None

    def note(self, text: str) -> None:
        pass


class _Lines:
    """Notes as lines on stderr."""

    def task(self, description: str, total: float) -> Advance:
        return lambda amount: None

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars with the time left on stderr if that is a terminal; else, notes as lines."""
    if not HAS_RICH or not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    class Shown:
        def task(self, description: str, total: float) -> Advance:
            task = bars.add_task(description, total=total)
            return lambda amount: bars.advance(task, amount)

        def note(self, text: str) -> None:
            bars.console.print(text, markup=False)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        yield Shown()
