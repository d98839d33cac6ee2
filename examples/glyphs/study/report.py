"""Writes what came out: report.json, report.md and pictures beside the runs, and a block of a docs page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import plots
from .markdown import markdown
from .plan import Configuration, StudyError
from .store import Store, write_json, write_text
from .tables import tables

BEGIN = "<!-- noise study: `make study` writes what is between these two lines -->"
PICTURES = "pictures"  # beside the page
END = "<!-- end of the noise study -->"
NO_RUNS = "No runs are committed yet: the hypotheses and the method above were written before there were any."


def write_report(store: Store, configuration: Configuration, docs: Path | None) -> str:
    """Report on all runs of `store`; with `docs` fill the marked block of that page too. Says where it is.

    Raises StudyError where there is nothing to report or the page has no block.
    """
    found = tables(configuration, store.load_all())
    if not found["accuracy"]:
        raise StudyError(f"{store.folder}: no run on test is there yet; `run` makes them")
    folder = store.folder / "report"
    if docs is None:
        plots.save_all(found, folder)
        write_text(folder / "report.md", markdown(found, "."))
    else:
        page = filled(_page(docs), block(found), docs)
        plots.save_all(found, docs.parent / PICTURES)
        write_text(docs, page)
    write_json(folder / "report.json", found)
    return f"Report: {docs or folder / 'report.md'}, its data: {folder / 'report.json'}\n{more_seeds(found)}"


def more_seeds(found: dict[str, Any]) -> str:
    """How many differences are undecided, and which runs would narrow them."""
    every = found["differences"]
    wide = [row for row in every if not row["decided"]]
    if not wide:
        return "All differences are decided."
    conditions = sorted({row["condition"] for row in wide})
    heads = sorted({name for row in wide for name in row["heads"]})
    seeds = sorted({seed for row in found["accuracy"] for seed in row["seeds"]})
    more = f"{seeds[-1] + 1} {seeds[-1] + 2}"
    return (
        f"{len(wide)} of {len(every)} differences are undecided. More seeds for them: "
        f"run --seeds {more} --conditions {' '.join(conditions)} --heads {' '.join(heads)}"
    )


def block(found: dict[str, Any]) -> str:
    """What stands between the marks of the page."""
    return markdown(found, PICTURES) if found["accuracy"] else NO_RUNS + "\n"


def filled(page: str, inside: str, path: Path) -> str:
    """The page with `inside` between its marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise StudyError(f"{path}: expected the lines {BEGIN!r} and {END!r}, to write between them")
    return f"{before}{BEGIN}\n\n{inside}\n{END}{after}"


def _page(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise StudyError(f"docs: {path} cannot be read ({error.strerror})") from error
