"""The folder of a study: its configuration and one JSON for each run, whole or not there at all.

<folder>/study.json          the configuration, written before the first run
<folder>/runs/<name>.json    one run: its configuration, machine, epochs, result
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .plan import Configuration, Run, StudyError

SCHEMA = 1
"""Version of a run's JSON: raised when a field changes its meaning or goes, or when code that decides a
result and is in no field changes (see plan.py)."""


class Store:
    """Reads and writes a study's folder. Nothing that is there is ever changed."""

    def __init__(self, folder: Path, configuration: Configuration) -> None:
        self.folder = folder
        self.configuration = configuration.as_json()

    def open(self) -> None:
        """Begin the study here, or go on with it. StudyError if the folder has another configuration."""
        path = self.folder / "study.json"
        if path.exists():
            self._same(path, self.configuration, _read(path), "configuration")
        else:
            write_json(path, self.configuration)

    def path(self, run: Run) -> Path:
        return self.folder / "runs" / f"{run.name}.json"

    def load(self, run: Run) -> dict[str, Any] | None:
        """The run's JSON, or None where it was not made yet.

        Raises StudyError for a file that is damaged or is of another run, configuration or schema.
        """
        path = self.path(run)
        if not path.exists():
            return None
        record = _read(path)
        for key, expected in (
            ("schema", SCHEMA),
            ("configuration", self.configuration),
            ("run", run.as_json()),
        ):
            self._same(path, expected, record.get(key), key)
        return record

    def load_all(self) -> dict[Run, dict[str, Any]]:
        """Every run that is here, in the order of their names. Raises StudyError as `load` does."""
        found = {}
        for path in sorted((self.folder / "runs").glob("*.json")):
            try:
                run = Run(**_read(path)["run"])
            except (KeyError, TypeError) as error:
                raise StudyError(f"{path}: expected the JSON of a run, and its fields") from error
            if self.path(run) != path:
                raise StudyError(f"{path}: expected the run {path.stem}, got {run.name}")
            record = self.load(run)
            assert record is not None
            found[run] = record
        return found

    def save(self, run: Run, record: dict[str, Any]) -> None:
        """Write a finished run, with what it was."""
        what = {"schema": SCHEMA, "run": run.as_json(), "configuration": self.configuration}
        write_json(self.path(run), {**what, **record})

    def _same(self, path: Path, expected: Any, got: Any, name: str) -> None:
        difference = first_difference(expected, got, name)
        if difference:
            raise StudyError(
                f"{path} is of another study: {difference}. Nothing was changed; give another --out, "
                f"or the options that it was begun with."
            )


def first_difference(expected: Any, got: Any, name: str) -> str | None:
    """Where two plain values first differ, in words; None where they don't."""
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in [*expected, *(key for key in got if key not in expected)]:
            found = first_difference(expected.get(key), got.get(key), f"{name}.{key}")
            if found:
                return found
        return None
    return None if expected == got else f"{name}: expected {expected!r}, got {got!r}"


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, in one line."""
    write_text(path, json.dumps(value) + "\n")


def write_text(path: Path, text: str) -> None:
    """All of it or nothing: a stop in the middle leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} cannot be read ({error}); delete it to make it again") from error
    if not isinstance(value, dict):
        raise StudyError(
            f"{path}: expected a JSON object, got {type(value).__name__}; delete it to make it again"
        )
    return value
