"""A plan of a job, the smallest number of devices that fits, and what to change first."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from expface_kernels.checks import LARGEST_TENSOR
from expface_kernels.plan.devices import Rates, calibrate
from expface_kernels.plan.job import Job
from expface_kernels.plan.memory import Item, items_of, peak_bytes, tiles_of
from expface_kernels.plan.optimizers import FUSED, SPARSE_TEMPORARY
from expface_kernels.plan.seconds import Work, work_of

SAMPLED_RATE = 0.1
KEEP_ALL, FUSED_NAME, AUTOCAST = "a workspace for all exponentials", "fused=True", "autocast bfloat16"
HARMLESS = (KEEP_ALL, FUSED_NAME, AUTOCAST)
"""Changes that make a step faster and alter the loss by rounding at most."""
LIGHTER = {
    "adam": "momentum",
    "adamw": "momentum",
    "rmsprop": "momentum",
    "adagrad": "sgd",
    "momentum": "sgd",
}
"""Optimizer → one with less state."""
WORTHWHILE = 0.03
"""Share of a step's seconds that a change must save to be advised for a job that fits."""


@dataclass(frozen=True)
class Plan:
    """Memory and seconds of one rank."""

    job: Job
    items: tuple[Item, ...]
    work: tuple[Work, ...]

    @functools.cached_property
    def peak(self) -> int:
        """Bytes."""
        return peak_bytes(self.items)

    @property
    def fits(self) -> bool:
        return self.peak <= self.job.capacity_bytes

    @functools.cached_property
    def seconds(self) -> float:
        return sum(work.seconds for work in self.work)

    @property
    def flops(self) -> int:
        return sum(work.flops for work in self.work)


@dataclass(frozen=True)
class Change:
    """A plan of the same job with one thing changed."""

    name: str
    plan: Plan


@dataclass(frozen=True)
class Advice:
    """What follows from a plan."""

    smallest_ranks: int | None
    """Devices that fit, each with the job's batch; None where no number does."""
    changes: tuple[Change, ...]
    """That could be made, those that leave the results alone first."""
    first: str
    """What to change first, a sentence."""


def plan(job: Job, rates: Rates | None = None) -> Plan:
    """Memory and seconds of the fullest rank. rates: of a CPU; None measures this one, half a second.

    ValueError for a GPU where Triton is not installed.
    """
    if job.device == "cpu" and rates is None:
        rates = calibrate(job.rows, job.features, tiles_of(job)[1], torch.get_num_threads())
    return Plan(job, items_of(job), work_of(job, rates))


def advise(found: Plan, rates: Rates | None = None) -> Advice:
    """rates: as `plan` took them."""
    smallest = smallest_ranks(found.job)
    changes = tuple(Change(name, plan(job, rates)) for name, job in _changes(found.job, smallest))
    first = _for_speed(found, changes) if found.fits else _for_memory(found, changes, smallest)
    return Advice(smallest, changes, first)


def smallest_ranks(job: Job) -> int | None:
    """Return the fewest devices, of 1, 2, 4, ..., whose memory the job fits; None where no number does.

    Each device keeps its batch. More ranks divide the centres, but bring more rows, which every rank sees:
    once the peak grows, it goes on growing.
    """
    ranks, before = 1, math.inf
    while ranks <= job.most_ranks:
        peak = peak_bytes(items_of(_on(job, ranks)))
        if peak <= job.capacity_bytes:
            return ranks
        if peak > before:
            return None
        ranks, before = 2 * ranks, peak
    return None


def _on(job: Job, ranks: int) -> Job:
    """A sharded head has no sparse gradient, and sparse-adam is then adam."""
    if ranks == 1 or not job.sparse_grad:
        return dataclasses.replace(job, ranks=ranks)
    optimizer = "adam" if job.optimizer == "sparse-adam" else job.optimizer
    return dataclasses.replace(job, ranks=ranks, sparse_grad=False, optimizer=optimizer)


def _changes(job: Job, smallest: int | None) -> list[tuple[str, Job]]:
    """(what is changed, the job then): first what changes no result, last what changes training most."""
    found: list[tuple[str, dict[str, Any]]] = []
    if job.workspace_bytes:
        found.append(("workspace_bytes=0", {"workspace_bytes": 0}))
    everything = 8 * min(job.rows * job.active_classes, LARGEST_TENSOR)
    if job.workspace_bytes < everything:
        found.append((KEEP_ALL, {"workspace_bytes": everything}))
    if job.optimizer in FUSED and not job.fused and not job.sparse_grad:
        found.append((FUSED_NAME, {"fused": True}))
    ranks = smallest if smallest is not None and smallest > job.ranks else 2 * job.ranks
    if ranks <= job.most_ranks:
        found.append((f"{ranks} devices", {"ranks": ranks}))
    if job.device != "cpu" and job.autocast is None and job.dtype == "float32":
        found.append((AUTOCAST, {"autocast": "bfloat16"}))
    if job.optimizer in LIGHTER:
        found.append((f"optimizer {LIGHTER[job.optimizer]}", {"optimizer": LIGHTER[job.optimizer]}))
    if job.sample_rate > SAMPLED_RATE:
        sparse = job.ranks == 1 and job.optimizer in SPARSE_TEMPORARY and not job.weight_decay
        name, changed = f"sample_rate={SAMPLED_RATE}", {"sample_rate": SAMPLED_RATE}
        if sparse and not job.sparse_grad:
            name, changed = f"{name}, sparse_grad=True", {**changed, "sparse_grad": True}
        if sparse and job.fused:  # no fused optimizer takes a sparse gradient
            name, changed = f"{name}, fused=False", {**changed, "fused": False}
        found.append((name, changed))
    if job.dtype in ("float32", "float64"):
        name = "bfloat16" if job.dtype == "float32" else "float32"
        found.append((f"{name} centres", {"dtype": name}))
    if job.batch > 1:
        found.append((f"batch {job.batch // 2}", {"batch": job.batch // 2}))
    return [(name, _replaced(job, changed)) for name, changed in found]


def _replaced(job: Job, changed: dict[str, Any]) -> Job:
    ranks = changed.pop("ranks", None)
    return dataclasses.replace(job if ranks is None else _on(job, ranks), **changed)


def _for_memory(found: Plan, changes: tuple[Change, ...], smallest: int | None) -> str:
    largest = max(found.items, key=lambda item: item.bytes)
    share = f"the largest item is {largest.name}, {largest.bytes / found.peak:.0%}"
    for change in changes:
        if change.plan.fits:
            return f"{change.name}: then it fits ({share})"
    if smallest is not None:
        return f"{smallest} devices: no single change is enough on {found.job.ranks} ({share})"
    best = min(changes, key=lambda change: change.plan.peak)
    return f"{best.name}, which saves most: no number of devices is enough without ({share})"


def _for_speed(found: Plan, changes: tuple[Change, ...]) -> str:
    """The fastest of those changes that leave the loss alone but for rounding."""
    able = [change for change in changes if change.name in HARMLESS and change.plan.fits]
    best = min(able, key=lambda change: change.plan.seconds, default=None)
    if best is None or best.plan.seconds > (1 - WORTHWHILE) * found.seconds:
        return "nothing: it fits"
    saved = 1 - best.plan.seconds / found.seconds
    return f"nothing for memory, it fits; for speed {best.name}: {saved:.0%} less time"
