"""Runs side by side, each in a process of one thread: two at once beat one of two threads by a tenth."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan import Run, StudyError

ROOT = Path(__file__).resolve().parents[3]
# Read by a process when it starts. The allocator keeps a step's pages for the next one: handing them back and
# faulting them in again was a tenth of the time of a training.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**26),
}


@dataclass(frozen=True)
class Event:
    """What a worker says: `run` is at `share` (0 to 1) of its steps; `done` at its end, with what it left."""

    run: Run
    share: float
    done: dict[str, Any] | None = None


def train_all(runs: Sequence[Run], size: str, folder: Path, workers: int) -> Generator[Event, None, None]:
    """Train `runs` in that order, `workers` at a time, and say how far they are; to be closed.

    A worker that fails ends it with a StudyError; what was finished stays. No worker outlives this.
    """
    waiting: queue.SimpleQueue[Run] = queue.SimpleQueue()
    events: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
    for run in runs:
        waiting.put(run)
    with _processes(min(workers, len(runs)), size, folder) as processes:
        for process in processes:
            threading.Thread(target=_serve, args=(process, waiting, events), daemon=True).start()
        left = len(runs)
        while left:
            event = events.get()
            if isinstance(event, Exception):
                raise event
            left -= event.done is not None
            yield event


@contextmanager
def _processes(count: int, size: str, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "examples.glyphs.study.worker", size, str(folder.resolve())]
    processes: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                    env={**os.environ, **ENVIRONMENT},
                    start_new_session=True,  # Ctrl-C is for us; we end them
                )
            )
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _serve(
    process: subprocess.Popen[str],
    waiting: queue.SimpleQueue[Run],
    events: queue.SimpleQueue[Event | Exception],
) -> None:
    """Hand one worker run after run. In a thread of its own; whatever goes wrong arrives as an event."""
    try:
        while True:
            try:
                run = waiting.get_nowait()
            except queue.Empty:
                return
            for event in _one(process, run):
                events.put(event)
    except Exception as error:
        events.put(error)


def _one(process: subprocess.Popen[str], run: Run) -> Iterator[Event]:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):  # it has ended: reading says so below
        process.stdin.write(json.dumps(run.as_json()) + "\n")
        process.stdin.flush()
    yield Event(run, 0.0)
    for line in process.stdout:
        message = json.loads(line)
        if "error" in message:
            raise StudyError(f"{run.name}: {message['error']}")
        if "done" in message:
            yield Event(run, 1.0, message)
            return
        yield Event(run, message["step"] / message["of"])
    raise StudyError(f"{run.name}: its worker ended with exit status {process.wait()}")
