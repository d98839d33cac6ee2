"""How long it still takes: images trained a second, from what was trained so far or from some steps now."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import torch

from ..dataset import load
from ..model import make_net
from ..training import Recipe, Step, train
from .data import training_rows
from .heads import make_head
from .plan import FINAL, Configuration, Run, full, images
from .recorder import EpochRecorder
from .store import Store
from .workers import ENVIRONMENT, ROOT

WARM_UPS, STEPS = 3, 20
BATCH = 256


class Pace:
    """Time left at `rate` images a second and core; without a rate, at that of the updates."""

    def __init__(self, rate: float | None, workers: int) -> None:
        self._rate = rate
        self._workers = workers
        self._start = time.monotonic()
        self._trained = 0.0

    def update(self, trained: float) -> None:
        """`trained` images since the beginning, by all workers together."""
        self._trained = trained

    def text(self, left: float) -> str:
        """ "2 h 10 min" for `left` images; "?" as long as there is no rate."""
        if self._rate is not None:
            a_second = self._rate * self._workers
        else:
            a_second = self._trained / max(time.monotonic() - self._start, 1e-3)
        if a_second <= 0:
            return "? min"
        minutes = round(left / a_second / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


LEAST_SECONDS = 0.05  # a record has one decimal


def measured_rate(store: Store, configuration: Configuration) -> float:
    """Images a second of one core: the median of the runs that are there, else of some steps timed now."""
    rates = [
        images(run, configuration) / max(record["seconds"], LEAST_SECONDS)
        for run, record in store.load_all().items()
        if record["failed"] is None
    ]
    return statistics.median(rates) if rates else time_steps_apart()


def time_steps_apart() -> float:
    """The same of some steps in a process of its own, set up as a worker's is; takes about 10 seconds."""
    command = [sys.executable, "-m", "examples.glyphs.study.pace"]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def time_steps() -> float:
    """Images a second over `STEPS` steps of the full study's first run, in this process."""
    torch.set_num_threads(1)
    run = Run(FINAL, "clean", "expface", "exact", 0.7, 32.0, 0)
    rows = training_rows(load().train, full(), run)
    head = make_head("expface", "exact", 0.7, 32.0, rows.num_classes, 0)
    count = BATCH * (WARM_UPS + STEPS)
    recorder = EpochRecorder(rows.is_noisy)
    times = []

    def after(step: Step) -> None:
        recorder.add(step, head)
        times.append(time.perf_counter())

    recipe = Recipe(epochs=1, batch=BATCH)
    for _ in train(make_net(0), head, rows.images[:count], rows.labels[:count], recipe, after):
        pass
    return BATCH * STEPS / (times[-1] - times[WARM_UPS - 1])


if __name__ == "__main__":
    print(time_steps())
