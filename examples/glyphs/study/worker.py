"""A worker's side: one process of one thread that trains run after run, as it is told on stdin.

    in    one line of JSON a run: its fields
    out   one line of JSON: {"step": n, "of": N} on the way, {"done": name, …} or {"error": text} at its end

It ends when stdin does, so it does not outlive who started it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..dataset import COMPACT_FILE, load
from ..training import Step
from .plan import Run, evaluated, full, quick
from .store import Store
from .training import train_run

REPORT_SECONDS = 1.0


def main(size: str, folder: str) -> None:
    """Serve until stdin ends. `size` is "full" or "quick"."""
    torch.set_num_threads(1)
    configuration = full() if size == "full" else quick()
    store = Store(Path(folder), configuration)
    glyphs = evaluated(load(COMPACT_FILE), configuration)
    for line in sys.stdin:
        run = Run(**json.loads(line))
        try:
            record = train_run(glyphs, configuration, run, _reporter())
            store.save(run, record)
        except Exception as error:  # whatever it is, who started this must hear of it
            say({"error": f"{type(error).__name__}: {error}"})
            raise
        say({"done": run.name, **{key: record[key] for key in ("seconds", "result", "failed")}})


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _reporter() -> Callable[[Step], None]:
    """Says how far a run is, at most once a second."""
    last = time.monotonic()

    def report(step: Step) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= REPORT_SECONDS:
            last = now
            say({"step": step.number, "of": step.of})

    return report


if __name__ == "__main__":
    main(*sys.argv[1:])
