"""What a rank holds for its head, item by item, and when.

A step has two peaks: the end of the backward, and the optimizer's update. What is there "always" counts in
both; on the CPU that includes buffers that the backend's pool keeps between steps. On a GPU the triton
backend's launches are counted, without data and without a GPU.

N rows of all ranks · C classes of the fullest rank · S that take part · D features
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from expface_kernels.backends import products
from expface_kernels.backends.cpu import TilePlan
from expface_kernels.plan.job import Job, op_config_of
from expface_kernels.plan.optimizers import SPARSE_TEMPORARY, Footprint, footprint

if TYPE_CHECKING:
    from expface_kernels.backends.triton.plan import Plan as SizePlan
    from expface_kernels.workshop.costs import Costs, Gpu, Step

ALWAYS, BACKWARD, UPDATE = "always", "backward", "update"
TARGET_PATH_BYTES = 79
"""What the cpu backend's target path holds for each number of the rows (N, D), as measured."""
# glibc maps a buffer of its own above this, and gives it back when it is freed. Below it, 1.0 to 1.5 times
# what the target path holds was measured to lie in the heap beside it; half, where only float32 buffers are.
HEAP_LIMIT = 32 * 2**20
HEAP_WASTE, HEAP_WASTE_HALF = 1.2, 0.5
# From here on each further chunk of classes costs what the one before did: counts of the classes whose
# exponentials are kept, and half and all of so many chunks more, say what any number costs.
COUNTED_CHUNKS = 32


@dataclass(frozen=True)
class Item:
    """One thing that a rank holds."""

    name: str
    bytes: int
    when: str
    """ALWAYS, or the only one of the two peaks that has it."""
    how: str
    """How it follows from the job."""


def items_of(job: Job) -> tuple[Item, ...]:
    """Return all items that are not empty, the backend's own last."""
    own = _cpu_items(job) if job.device == "cpu" else _gpu_items(job)
    return tuple(item for item in (*_centre_items(job), *_row_items(job), *own) if item.bytes)


def peak_bytes(items: tuple[Item, ...]) -> int:
    """Return the larger of the two peaks."""
    sums = dict.fromkeys((ALWAYS, BACKWARD, UPDATE), 0)
    for item in items:
        sums[item.when] += item.bytes
    return sums[ALWAYS] + max(sums[BACKWARD], sums[UPDATE])


def footprint_of(job: Job) -> Footprint:
    """Return that of the job's optimizer: torch takes its foreach variants on a GPU alone."""
    way = "fused" if job.fused else "foreach" if job.device != "cpu" else "single"
    return footprint(job.optimizer, way, job.weight_decay)


def temporaries_of(job: Job) -> tuple[float, int]:
    """Return what the optimizer's update holds for a while: so many times so many bytes."""
    if job.sparse_grad:
        return SPARSE_TEMPORARY[job.optimizer], job.gradient_bytes
    return footprint_of(job).temporary, job.centre_bytes


def _centre_items(job: Job) -> list[Item]:
    shape = f"{job.local_classes:,} × {job.features:,} × {job.centre_dtype.itemsize} B"
    state = int(footprint_of(job).state)
    made = f"{job.active_classes:,} rows and their numbers" if job.sparse_grad else shape
    times, of = temporaries_of(job)
    temporaries = f"{job.optimizer}: {times:g} × gradient"
    return [
        Item("centres", job.centre_bytes, ALWAYS, shape),
        Item("gradient of centres", job.gradient_bytes, ALWAYS, made),
        Item("optimizer state", state * job.centre_bytes, ALWAYS, f"{job.optimizer}: {state} × centres"),
        Item("optimizer temporaries", int(times * of), UPDATE, temporaries),
    ]


def _row_items(job: Job) -> list[Item]:
    width = job.row_dtype.itemsize
    own = job.batch * job.features * width
    items = [Item("embeddings", own, ALWAYS, f"{job.batch:,} × {job.features:,} × {width} B")]
    if job.ranks > 1:
        # The rows of all ranks, and their gradient in float32, to be summed over ranks.
        gathered = job.rows * job.features * (width + 4)
        how = f"{job.rows:,} × {job.features:,}, their gradient in float32"
        items.append(Item("gathered rows", gathered, BACKWARD, how))
    subset = 8 * job.active_classes if job.subset else 0
    return [*items, Item("class subset", subset, BACKWARD, "8 B a class")]


def tiles_of(job: Job) -> tuple[TilePlan, torch.dtype]:
    """Return how the cpu backend will cut the job, and what it computes in."""
    wide = torch.promote_types(torch.promote_types(job.row_dtype, job.centre_dtype), torch.float32)
    return TilePlan.of(job.rows, job.features, job.active_classes, wide, op_config_of(job)), wide


def tile_copies(job: Job) -> tuple[bool, bool]:
    """Return whether the cpu backend multiplies copies of a tile's centres, and copies of its gradient."""
    narrow = job.centre_dtype != tiles_of(job)[1]
    return narrow or job.subset, narrow or (job.subset and not job.sparse_grad)


def _cpu_items(job: Job) -> list[Item]:
    plan, wide = tiles_of(job)
    width, tile = wide.itemsize, min(plan.tile, plan.classes)
    unkept = min(plan.tile, plan.classes - plan.kept)
    copies = sum(tile_copies(job))
    library = products.of(wide)
    # The target path works in float64; the C library's heap keeps its small buffers and fragments them.
    elements = job.rows * job.features
    held, on_heap = TARGET_PATH_BYTES * elements, 8 * elements < HEAP_LIMIT
    waste = HEAP_WASTE if on_heap else HEAP_WASTE_HALF if 4 * elements < HEAP_LIMIT else 0.0
    return [
        Item("workspace", plan.numel * width, ALWAYS,
             f"{plan.kept:,} of {plan.classes:,} classes × {plan.batch:,} exponentials"),
        Item("tile of logits", unkept * plan.batch * width, ALWAYS, f"{unkept:,} × {plan.batch:,}"),
        Item("tiles of centres", copies * tile * job.features * width, ALWAYS,
             f"{copies} × {tile:,} × {job.features:,}"),
        Item("results of products", library.own_numel(plan.batch, job.features, tile) * width, ALWAYS,
             f"{library.name}'s own, and a copy of a transposed tile"),
        Item("row operands", 2 * elements * width, ALWAYS, "2 × rows"),
        Item("target path in float64", held, ALWAYS if on_heap else BACKWARD,
             f"{TARGET_PATH_BYTES} B × {job.rows:,} × {job.features:,}"),
        Item("fragments of the heap", int(waste * held), ALWAYS,
             f"{waste:g} × that, as measured with glibc"),
    ]  # fmt: skip


def _gpu_items(job: Job) -> list[Item]:
    extra, plan = gpu_costs(job).extra, backend_plan(job)
    workspace = 4 * plan.numel
    # Where all exponentials are kept they are what the backward multiplies.
    chunk = plan.chunk * plan.rows_pad * plan.product.itemsize if plan.kept < plan.classes else 0
    kept = f"norms; {plan.kept:,} of {plan.classes:,} classes × {plan.rows:,} exponentials"
    rest = extra - workspace - chunk
    return [
        Item("workspace", workspace, BACKWARD, kept),
        Item("chunk of probabilities", chunk, BACKWARD, f"{plan.chunk:,} × {plan.rows_pad:,}"),
        Item("rows, sums and tangents", rest, BACKWARD, "the launches' other tensors"),
    ]


def gpu_of(device: str) -> Gpu:
    """Return its rates; ValueError where Triton, whose launches are counted, is not installed."""
    try:
        from expface_kernels.workshop.costs import GPUS
    except ModuleNotFoundError as error:
        raise ValueError(
            f"device: {device} is modelled by its launches, which needs Triton installed"
        ) from error
    return GPUS[device]


def backend_plan(job: Job) -> SizePlan:
    """Return the sizes of the triton backend's call."""
    from expface_kernels.backends.triton.plan import Plan

    x = torch.empty(job.rows, job.features, dtype=job.row_dtype, device="meta")
    w = torch.empty(job.active_classes, job.features, dtype=job.centre_dtype, device="meta")
    return Plan.of(x, w, job.active_classes, op_config_of(job), indexed=job.subset)


@functools.lru_cache(maxsize=256)
def gpu_costs(job: Job) -> Costs:
    """Return the costs of one forward and backward on a rank, over the classes that take part."""
    gpu = gpu_of(job.device)
    classes, plan = job.active_classes, backend_plan(job)
    start = 0 if plan.kept == classes else plan.kept
    rest = (classes - start) % plan.chunk  # the last chunk, which need not be full, is part of each count
    fewer, more = (start + chunks * plan.chunk + rest for chunks in (COUNTED_CHUNKS // 2, COUNTED_CHUNKS))
    if more >= classes:
        return _counted(job, gpu, classes)
    times = (classes - more) / (more - fewer)
    return _extrapolated(_counted(job, gpu, fewer), _counted(job, gpu, more), times)


def _counted(job: Job, gpu: Gpu, classes: int) -> Costs:
    from expface_kernels.workshop.costs import costs
    from expface_kernels.workshop.recording import Case

    case = Case(
        job.rows, classes, job.features, job.row_dtype, job.centre_dtype, subset=job.subset,
        workspace_bytes=job.workspace_bytes, product_dtype=op_config_of(job).product_dtype,
    )  # fmt: skip
    return costs(case, gpu.arch)


def _extrapolated(fewer: Costs, more: Costs, times: float) -> Costs:
    """Return `more`, and `times` what it has beyond `fewer`, which launches the same kernels."""

    def grow(first: Costs | Step, second: Costs | Step, names: tuple[str, ...]) -> dict[str, Any]:
        pairs = {name: (getattr(first, name), getattr(second, name)) for name in names}
        return {name: after + int(times * (after - before)) for name, (before, after) in pairs.items()}

    counts = ("calls", "flops", "read", "written")
    steps = (
        dataclasses.replace(second, **grow(first, second, counts))
        for first, second in zip(fewer.steps, more.steps, strict=True)
    )
    # Forward and backward have a peak each, and either may grow faster.
    grown = grow(fewer, more, ("peak", "gradient", "forward_peak"))
    grown["peak"] = max(grown["peak"], grown["forward_peak"])
    return dataclasses.replace(more, steps=tuple(steps), **grown)
