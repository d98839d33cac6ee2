"""The results of a study: one JSONL file, whose first line is the configuration and each other line a run.

Runs are appended one by one. A last line without its end was cut off while it was written: it is ignored, and
the next run overwrites it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plan import Configuration, Run, StudyError

SCHEMA = 2
"""Version of the file. Raise it when a field is removed or changes its meaning, or when code changes that
decides a result but is stored in no field (see plan.py)."""


class Results:
    """Reads runs from a file and appends to it; what is there never changes."""

    def __init__(self, path: Path, configuration: Configuration) -> None:
        self.path = path
        self._header = {"schema": SCHEMA, "configuration": configuration.as_json()}

    def load(self) -> dict[Run, dict[str, Any]]:
        """Return every complete run, in the order of their names; empty where there is no file yet.

        Raises StudyError for a damaged file, or one with another configuration or schema.
        """
        lines = self._complete_lines()
        if not lines:
            return {}
        difference = first_difference(self._header, self._parse(0, lines[0]), "study")
        if difference:
            raise StudyError(
                f"{self.path} is of another study: {difference}. Nothing was changed; give another --out, "
                f"or the options that it was begun with."
            )
        found: dict[Run, dict[str, Any]] = {}
        for number, line in enumerate(lines[1:], 1):
            record = self._parse(number, line)
            try:
                found[Run(**record["run"])] = record
            except (KeyError, TypeError) as error:
                raise StudyError(f"{self.path}:{number + 1}: expected a run and its fields") from error
        return {run: found[run] for run in sorted(found, key=lambda run: run.name)}

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Return those of `runs` that are not here. StudyError where one is here at another m or s."""
        here = {run.name: run for run in self.load()}
        for run in runs:
            difference = first_difference(run.as_json(), here.get(run.name, run).as_json(), run.name)
            if difference:
                raise StudyError(f"{self.path} is of another study: {difference}. Nothing was changed.")
        return [run for run in runs if run.name not in here]

    def append(self, run: Run, record: dict[str, Any]) -> None:
        """Write a finished run to disk, after the configuration if it is the first one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = sum(len(line) + 1 for line in self._complete_lines())
        with self.path.open("ab") as file:
            file.truncate(whole)
            if not whole:
                file.write(_as_line(self._header))
            file.write(_as_line({"run": run.as_json(), **record}))
            file.flush()
            os.fsync(file.fileno())

    def _complete_lines(self) -> list[bytes]:
        return self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise StudyError(f"{self.path}:{number + 1}: expected JSON ({error}); remove the line") from error
        if not isinstance(value, dict):
            raise StudyError(f"{self.path}:{number + 1}: expected an object, got {type(value).__name__}")
        return value


def first_difference(expected: Any, got: Any, name: str) -> str | None:
    """Say where two plain values first differ; None where they are equal."""
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in [*expected, *(key for key in got if key not in expected)]:
            found = first_difference(expected.get(key), got.get(key), f"{name}.{key}")
            if found:
                return found
        return None
    return None if expected == got else f"{name}: expected {expected!r}, got {got!r}"


def _as_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
