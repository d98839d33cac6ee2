"""Trains runs in parallel processes of one thread each: two at once beat one of two threads by a tenth."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from examples.glyphs.dataset import Glyphs, load

from .plan import Configuration, Run, StudyError, evaluated
from .training import train_run

# A process reads these when it starts. The allocator keeps the pages of a step for the next one; returning
# them to the system and faulting them in again took a tenth of the training time.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**26),
}


def train_all(
    runs: Sequence[Run], configuration: Configuration, workers: int
) -> Generator[tuple[Run, dict[str, Any]], None, None]:
    """Train `runs`, `workers` at a time, and yield each with its record as it finishes.

    A run that raises ends all of them with a StudyError. No worker outlives this generator or its process.
    """
    with _environment(ENVIRONMENT):
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
        before = set(multiprocessing.active_children())
        try:
            futures = {pool.submit(_train, configuration, run): run for run in runs}
            for future in as_completed(futures):
                if error := future.exception():
                    name = futures[future].name
                    raise StudyError(f"{name}: {type(error).__name__}: {error}") from error
                yield futures[future], future.result()
        finally:
            # Its own thread joins them: two that wait for one process leave it listed for a while.
            for worker in set(multiprocessing.active_children()) - before:
                worker.terminate()
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _start_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train(configuration: Configuration, run: Run) -> dict[str, Any]:
    return train_run(evaluated(_glyphs(), configuration), configuration, run)


@cache
def _glyphs() -> Glyphs:
    return load()
