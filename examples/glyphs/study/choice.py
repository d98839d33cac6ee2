"""Each head's m and s, for clean and for wrong labels: the try that is best on validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .plan import CHOICE, Cell, Chosen, Configuration, Head, Run, StudyError, Try, choices, head_name

SCORED_AT = "0.001"  # FAR of the true accept rate that decides


def scores(records: Mapping[Run, dict[str, Any]], head: Head, condition: str) -> dict[Try, float]:
    """Validation TAR of each try of `head` under `condition` that was trained; 0 where training diverged."""
    found = {}
    for run, record in records.items():
        if run.stage == CHOICE and run.head == head and run.condition == condition:
            found[run.m, run.scale] = record["result"]["tar"][SCORED_AT] if record["result"] else 0.0
    return found


def choose(
    configuration: Configuration, records: Mapping[Run, dict[str, Any]], wanted: Sequence[Cell]
) -> Chosen:
    """The best try of each choice, the first of equal ones. StudyError if one was not trained."""
    chosen = {}
    for head, condition in choices(wanted):
        tries = configuration.tries[head[0]]
        tried = scores(records, head, condition)
        missing = len(set(tries) - set(tried))
        if missing:
            raise StudyError(f"{head_name(head)}, {condition}: {missing} of its tries are not trained yet")
        chosen[head, condition] = max(tries, key=lambda entry: tried[entry])
    return chosen
