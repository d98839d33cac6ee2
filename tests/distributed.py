"""Runs functions on the ranks of a process group, in processes that are started once for all tests.

    results = run_ranks(3, step, *arguments)        # step(group, *arguments) on ranks 0, 1, 2

    with bare_processes(2, connect, *arguments) as (processes, ends): …   # no groups, fit to be killed

Four worker processes wait for work; a group of n ranks is the last n of them, so that a rank of the group is
no rank of the default group. Functions must be importable (top level of a module), arguments and results
picklable. After a failure the workers are stopped, and the next test starts new ones.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import multiprocessing as mp
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MOST_RANKS = 4
GROUP_TIMEOUT = timedelta(seconds=90)
DEADLINE = 120.0  # seconds that one call may take, the start of the processes not counted
START_DEADLINE = 180.0


class RankFailed(AssertionError):
    """What happened on a rank, with its traceback."""


class Workers:
    """MOST_RANKS processes, each with a group for every number of ranks."""

    def __init__(self) -> None:
        context = _context()
        self._folder = tempfile.TemporaryDirectory(prefix="expface-ranks-")
        store = str(Path(self._folder.name) / "store")
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(MOST_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)
        self._collect(self._ends, START_DEADLINE)

    def run(
        self, size: int, target: Callable[..., Any], arguments: tuple[Any, ...], deadline: float
    ) -> list[Any]:
        ends = self._ends[MOST_RANKS - size :]
        work = pickle.dumps((size, target.__module__, target.__qualname__, arguments))
        for end in ends:
            end.send_bytes(work)
        return self._collect(ends, deadline)

    def _collect(self, ends: list[Connection], deadline: float) -> list[Any]:
        """One answer from each; RankFailed with all that is known as soon as one fails or time is over."""
        until = time.monotonic() + deadline
        answers: dict[Connection, Any] = {}
        failures: list[str] = []
        waiting = list(ends)
        while waiting:
            ready = wait(waiting, timeout=max(until - time.monotonic(), 0))
            if not ready:
                failures += [f"rank {ends.index(end)}: no answer in time" for end in waiting]
                break
            for end in ready:
                assert isinstance(end, Connection)
                waiting.remove(end)
                try:
                    failed, answer = pickle.loads(end.recv_bytes())
                except EOFError:
                    failed, answer = True, "its process ended"
                if failed:
                    failures.append(f"rank {ends.index(end)}: {answer}")
                    until = min(until, time.monotonic() + 2)  # others may have more to say, or hang
                else:
                    answers[end] = answer
        if failures:
            self.stop()
            raise RankFailed("\n".join(failures))
        return [answers[end] for end in ends]

    def stop(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _context() -> Any:
    """Imports cost more than all else: a server makes them once, and forks before torch has threads."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "expface_kernels"])
    return context


_workers: list[Workers] = []


def run_ranks(
    size: int, target: Callable[..., Any], *arguments: Any, deadline: float = DEADLINE
) -> list[Any]:
    """What target(group, *arguments) returns on each of `size` ranks, 1 to 4, by rank."""
    if not _workers:
        _workers.append(Workers())
    try:
        return _workers[0].run(size, target, arguments, deadline)
    except RankFailed:
        _workers.clear()
        raise


@contextlib.contextmanager
def bare_processes(
    size: int, target: Callable[..., Any], *arguments: Any
) -> Iterator[tuple[list[Any], list[Connection]]]:
    """target(rank, folder, end, *arguments) in `size` new processes: these, and our ends of their pipes.

    folder: theirs alone, for a dist.FileStore. They are killed at the end.
    """
    context = _context()
    processes, ends = [], []
    with tempfile.TemporaryDirectory(prefix="expface-bare-") as folder:
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(rank, folder, theirs, *arguments), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
        try:
            yield processes, ends
        finally:
            for process in processes:
                process.kill()
                process.join()


@atexit.register
def _stop() -> None:
    for workers in _workers:
        workers.stop()


def _work(rank: int, store: str, end: Connection) -> None:
    """A worker's life."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, MOST_RANKS),
        rank=rank,
        world_size=MOST_RANKS,
        timeout=GROUP_TIMEOUT,
    )
    groups = [
        dist.new_group(list(range(MOST_RANKS - size, MOST_RANKS)), timeout=GROUP_TIMEOUT)
        for size in range(1, MOST_RANKS + 1)
    ]
    _lend_nan()
    end.send_bytes(pickle.dumps((False, None)))
    while True:
        try:
            size, module, name, arguments = pickle.loads(end.recv_bytes())
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            target = getattr(importlib.import_module(module), name)
            answer = (False, target(groups[size - 1], *arguments))
        except BaseException:
            answer = (True, traceback.format_exc())
        end.send_bytes(pickle.dumps(answer))


def _lend_nan() -> None:
    """As conftest does for tests in this process: memory from the pool holds NaN, not an older step's."""
    from expface_kernels.backends import workspace

    allocate = workspace.allocate
    workspace.allocate = lambda numel, dtype: allocate(numel, dtype).fill_(torch.nan)
