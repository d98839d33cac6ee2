"""How long a step of the head takes: work counted in FLOPs and bytes, over the device's rates.

Each kind of work takes the longer of its FLOPs and its bytes, and they follow each other: launches, waiting
for other ranks and the backbone are not in it.

N rows of all ranks · C classes of the fullest rank · S that take part · D features
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from expface_kernels.plan.devices import DEVICES, Rates
from expface_kernels.plan.job import Job
from expface_kernels.plan.memory import (
    footprint_of,
    gpu_costs,
    gpu_of,
    temporaries_of,
    tile_copies,
    tiles_of,
)

TARGET_PATH_MOVED = 1172
"""Bytes that the cpu backend's target path moves for each number of the rows (N, D), as measured."""


@dataclass(frozen=True)
class Work:
    """One kind of work of a step."""

    name: str
    flops: int
    bytes: int
    """Read, written or sent."""
    seconds: float


def work_of(job: Job, rates: Rates | None) -> tuple[Work, ...]:
    """Return all of a step's work on the fullest rank. rates: of a CPU; a GPU's come with it."""
    if job.device == "cpu":
        assert rates is not None, "a CPU's rates are measured"
        own = _cpu_work(job, rates)
    else:
        own = _gpu_work(job)
    return (*own, *_collectives(job))


def _update(job: Job) -> tuple[int, int]:
    """Return the bytes that the optimizer moves, and of them those in fresh memory."""
    touched = job.gradient_bytes if job.sparse_grad else job.centre_bytes
    times, of = temporaries_of(job)
    return int(footprint_of(job).moved * touched), int(times * of)


def _cpu_work(job: Job, rates: Rates) -> list[Work]:
    plan, wide = tiles_of(job)
    logits = job.rows * plan.classes * wide.itemsize
    centres = plan.classes * job.features * wide.itemsize
    again = (plan.classes - plan.kept) / plan.classes
    product = 2 * job.rows * plan.classes * job.features

    def work(name: str, flops: float, moved: float, fresh: float = 0.0) -> Work:
        seconds = max(flops / rates.flops, moved / rates.bandwidth) + fresh / rates.fresh
        return Work(name, int(flops), int(moved + fresh), seconds)

    moved, temporary = _update(job)
    # A dense gradient of a sample starts from zeros, in memory that is new in every step.
    zeros = job.gradient_bytes if job.subset and not job.sparse_grad else 0
    # Centres are copied in the forward and in the backward.
    narrow = plan.classes * job.features * job.centre_dtype.itemsize
    of_centres, of_gradient = tile_copies(job)
    copies = (2 * of_centres + of_gradient) * (centres + narrow)
    steps = [
        work("products, forward", product, centres + logits),
        work("products, again", again * product, again * (centres + logits)),
        work("products, dX and dW", 2 * product, 2 * (centres + logits)),
        work("norms, exponentials, projection", 0, (4 + again) * centres + 2 * (1 + again) * logits),
        work("copies of centres", 0, copies, zeros),
        work("target path", 0, TARGET_PATH_MOVED * job.rows * job.features),
        work(f"update, {job.optimizer}", 0, moved, temporary),
    ]
    return [step for step in steps if step.flops or step.bytes]


def _gpu_work(job: Job) -> list[Work]:
    gpu = gpu_of(job.device)
    steps = [
        Work(s.name, s.flops, s.read + s.written, s.milliseconds(gpu) / 1e3) for s in gpu_costs(job).steps
    ]
    moved, _ = _update(job)
    zeros = job.gradient_bytes if job.subset and not job.sparse_grad else 0
    for name, nbytes in (("zeros of the gradient", zeros), (f"update, {job.optimizer}", moved)):
        if nbytes:
            steps.append(Work(name, 0, nbytes, nbytes / (gpu.bandwidth * 1e12)))
    return steps


def _collectives(job: Job) -> list[Work]:
    """Rows and labels of all ranks, log l and theta (a sum: there and back), the gradient of the rows."""
    if job.ranks == 1:
        return []
    element = torch.float64.itemsize
    others = job.rows - job.batch
    sent = {
        "gather rows": others * (job.features * job.row_dtype.itemsize + element),
        "combine log l and theta": 2 * 2 * job.rows * element * (job.ranks - 1) // job.ranks,
        "scatter the rows' gradient": others * job.features * 4,
    }
    link = DEVICES[job.device].link
    return [Work(name, 0, nbytes, nbytes / link) for name, nbytes in sent.items()]
