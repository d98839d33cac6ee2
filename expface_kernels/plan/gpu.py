"""The triton backend's cost model, asked about a job. It runs the launch code, without data or a GPU."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import torch

from expface_kernels.plan.job import Job, request_of

if TYPE_CHECKING:
    from expface_kernels.backends.triton.plan import Plan as SizePlan
    from expface_kernels.workshop.costs import Costs, Gpu, Step


def gpu_of(device: str) -> Gpu:
    """Its rates; ValueError where Triton, whose launches are counted, is not installed."""
    try:
        from expface_kernels.workshop.costs import GPUS
    except ModuleNotFoundError as error:
        raise ValueError(
            f"device: {device} is modelled by its launches, which needs Triton installed"
        ) from error
    return GPUS[device]


# From here on each further chunk of classes costs what the one before did: counts of the classes whose
# exponentials are kept, and half and all of so many chunks more, say what any number costs. The last chunk,
# which need not be full, is part of each.
COUNTED_CHUNKS = 32


@functools.lru_cache(maxsize=256)
def gpu_costs(job: Job) -> Costs:
    """Of one forward and backward on a rank, over the classes that take part."""
    gpu_of(job.device)
    classes, plan = job.active_classes, backend_plan(job)
    start = 0 if plan.kept == classes else plan.kept
    rest = (classes - start) % plan.chunk
    fewer, more = (start + chunks * plan.chunk + rest for chunks in (COUNTED_CHUNKS // 2, COUNTED_CHUNKS))
    if more >= classes:
        return _counted(job, classes)
    return _extrapolated(_counted(job, fewer), _counted(job, more), (classes - more) / (more - fewer))


def backend_plan(job: Job) -> SizePlan:
    """The sizes of the backend's call."""
    from expface_kernels.backends.triton.plan import Plan

    x = torch.empty(job.rows, job.features, dtype=job.row_dtype, device="meta")
    w = torch.empty(job.active_classes, job.features, dtype=job.centre_dtype, device="meta")
    return Plan.of(x, w, job.active_classes, request_of(job), indexed=job.subset)


def _counted(job: Job, classes: int) -> Costs:
    from expface_kernels.workshop.costs import costs
    from expface_kernels.workshop.recording import Case

    case = Case(
        job.rows,
        classes,
        job.features,
        job.row_dtype,
        job.centre_dtype,
        workspace_bytes=job.workspace_bytes,
        subset=job.subset,
        product_dtype=request_of(job).product_dtype,
    )
    return costs(case, gpu_of(job.device).arch)


def _extrapolated(fewer: Costs, more: Costs, times: float) -> Costs:
    """more, and `times` what it has more than fewer, which launches the same kernels."""
    from expface_kernels.workshop.costs import Costs

    def on(first: int, second: int) -> int:
        return second + int(times * (second - first))

    def grown(first: Step, second: Step) -> Step:
        return dataclasses.replace(
            second,
            calls=on(first.calls, second.calls),
            flops=on(first.flops, second.flops),
            read=on(first.read, second.read),
            written=on(first.written, second.written),
        )

    # Forward and backward have a peak each, and either may grow faster.
    forward = on(fewer.forward_peak, more.forward_peak)
    return Costs(
        steps=tuple(grown(*pair) for pair in zip(fewer.steps, more.steps, strict=True)),
        peak=max(on(fewer.peak, more.peak), forward),
        gradient=on(fewer.gradient, more.gradient),
        forward_peak=forward,
    )
