"""What a rank holds for its head, item by item, and when.

A step has two peaks: the end of the backward, and the optimizer's update. What is there "always" counts in
both; on the CPU that includes buffers that the backend's pool keeps between steps.

N rows of all ranks · C classes of the fullest rank · S that take part · D features
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from expface_kernels.backends import products
from expface_kernels.backends.base import Request
from expface_kernels.backends.cpu import CpuBackend, TilePlan
from expface_kernels.plan.gpu import backend_plan, gpu_costs
from expface_kernels.plan.job import Job, request_of
from expface_kernels.plan.optimizers import SPARSE_TEMPORARY, Footprint, footprint
from expface_kernels.workshop.traffic import Moved, PeakMemory

ALWAYS, BACKWARD, UPDATE = "always", "backward", "update"
# glibc maps a buffer of its own above this, and gives it back when it is freed. Below it, 1.0 to 1.5 times
# what the target path holds was measured to lie in the heap beside it; half, where only float32 buffers are.
HEAP_LIMIT = 32 * 2**20
HEAP_WASTE, HEAP_WASTE_HALF = 1.2, 0.5


@dataclass(frozen=True)
class Item:
    """Bytes of one rank."""

    name: str
    bytes: int
    when: str
    """ALWAYS, or the only one of the two peaks that has it."""
    how: str
    """How it follows from the job."""


def items_of(job: Job) -> tuple[Item, ...]:
    """All of them that are not empty, the backend's own last."""
    own = _cpu_items(job) if job.device == "cpu" else _gpu_items(job)
    shared = (*_kept(job), *_rows(job), *_sample(job))
    return tuple(item for item in (*shared, *own) if item.bytes)


def divided_bytes(job: Job) -> int:
    """Of them, what more ranks divide."""
    return int((1 + footprint_of(job).state) * job.centre_bytes) + job.gradient_bytes


def peak_bytes(items: tuple[Item, ...]) -> int:
    """The larger of the two peaks."""
    sums = {
        when: sum(item.bytes for item in items if item.when == when) for when in (ALWAYS, BACKWARD, UPDATE)
    }
    return sums[ALWAYS] + max(sums[BACKWARD], sums[UPDATE])


def _kept(job: Job) -> list[Item]:
    """Centres and what belongs to each of them."""
    shape = f"{job.local_classes:,} × {job.features:,} × {job.centre_dtype.itemsize} B"
    state = footprint_of(job).state
    made = f"{job.active_classes:,} rows and their numbers" if job.sparse_grad else shape
    times, of = temporaries_of(job)
    return [
        Item("centres", job.centre_bytes, ALWAYS, shape),
        Item("gradient of centres", job.gradient_bytes, ALWAYS, made),
        Item(
            "optimizer state", int(state * job.centre_bytes), ALWAYS, f"{job.optimizer}: {state:g} × centres"
        ),
        Item("optimizer temporaries", int(times * of), UPDATE, f"{job.optimizer}: {times:g} × gradient"),
    ]


def temporaries_of(job: Job) -> tuple[float, int]:
    """What the optimizer's update holds for a while: so many times so many bytes."""
    if job.sparse_grad:
        return SPARSE_TEMPORARY[job.optimizer], job.gradient_bytes
    return footprint_of(job).temporary, job.centre_bytes


def footprint_of(job: Job) -> Footprint:
    """Of the job's optimizer: torch takes its foreach variants on a GPU alone."""
    way = "fused" if job.fused else "foreach" if job.device != "cpu" else "single"
    return footprint(job.optimizer, job.centre_dtype, way, job.weight_decay)


def _rows(job: Job) -> list[Item]:
    width = job.row_dtype.itemsize
    own = job.batch * job.features * width
    items = [Item("embeddings", own, ALWAYS, f"{job.batch:,} × {job.features:,} × {width} B")]
    if job.ranks > 1:
        # The rows of all ranks, and their gradient in float32, to be summed over ranks.
        gathered = job.rows * job.features * (width + 4)
        how = f"{job.rows:,} × {job.features:,}, their gradient in float32"
        items.append(Item("gathered rows", gathered, BACKWARD, how))
    return items


def _sample(job: Job) -> list[Item]:
    """The list of classes that take part; drawing it is over by the time of the peak."""
    return [Item("class subset", 8 * job.active_classes if job.subset else 0, BACKWARD, "8 B a class")]


def tiles_of(job: Job) -> tuple[TilePlan, torch.dtype]:
    """How the cpu backend will cut the job, and what it computes in."""
    wide = torch.promote_types(torch.promote_types(job.row_dtype, job.centre_dtype), torch.float32)
    return TilePlan.of(job.rows, job.features, job.active_classes, wide, request_of(job)), wide


def tile_copies(job: Job) -> tuple[bool, bool]:
    """Whether the cpu backend multiplies copies of a tile's centres, and makes its gradient in a copy."""
    narrow = job.centre_dtype != tiles_of(job)[1]
    return narrow or job.subset, narrow or (job.subset and not job.sparse_grad)


def _cpu_items(job: Job) -> list[Item]:
    plan, wide = tiles_of(job)
    width, tile = wide.itemsize, min(plan.tile, plan.classes)
    unkept = min(plan.tile, plan.classes - plan.kept)
    kept = f"{plan.kept:,} of {plan.classes:,} classes × {plan.batch:,} exponentials"
    copies = sum(tile_copies(job))
    library = products.of(wide)
    return [
        Item("workspace", plan.numel * width, ALWAYS, kept),
        Item("tile of logits", unkept * plan.batch * width, ALWAYS, f"{unkept:,} × {plan.batch:,}"),
        Item(
            "tiles of centres", copies * tile * job.features * width, ALWAYS,
            f"{copies} × {tile:,} × {job.features:,}",
        ),
        Item(
            "results of products", library.own_numel(plan.batch, job.features, tile) * width, ALWAYS,
            f"{library.name}'s own, and a copy of a transposed tile",
        ),
        Item("row operands", 2 * job.rows * job.features * width, ALWAYS, "2 × rows"),
        *_target_path(job),
    ]  # fmt: skip


def _target_path(job: Job) -> list[Item]:
    """O(N·D), in float64. Small buffers come from the C library's heap, which keeps and fragments them."""
    elements = job.rows * job.features
    held = int(row_costs().held * elements)
    how = f"{row_costs().held:.0f} B × {job.rows:,} × {job.features:,}"
    on_heap = 8 * elements < HEAP_LIMIT
    waste = HEAP_WASTE if on_heap else HEAP_WASTE_HALF if 4 * elements < HEAP_LIMIT else 0.0
    return [
        Item("target path in float64", held, ALWAYS if on_heap else BACKWARD, how),
        Item("fragments of the heap", int(waste * held), ALWAYS, f"{waste:g} × that, as measured with glibc"),
    ]


@dataclass(frozen=True)
class RowCosts:
    """Bytes for each element of the rows (N, D) beside what grows with the classes."""

    held: float
    moved: float


@functools.cache
def row_costs() -> RowCosts:
    """Of the cpu backend's step, counted from a run with few classes."""
    rows, features, classes = 256, 64, 32
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(rows, features, generator=g), torch.randn(classes, features, generator=g)
    y = torch.randint(classes, (rows,), generator=g)
    backend, request = CpuBackend(), Request(64.0, True, 0, False, None)
    memory, moved = PeakMemory(), Moved()

    def step() -> tuple[Tensor | None, Tensor | None]:
        out = backend.forward(x, w, y, None, request)
        ones = torch.ones(rows, dtype=torch.float64)
        return backend.backward(x, w, y, None, out.log_l, out.workspace, ones, ones, request, True, True)

    with memory, moved, products.using(products.MM):  # what oneDNN adds is an item of its own
        step()
    return RowCosts(memory.peak / x.numel(), moved.bytes / x.numel())


def _gpu_items(job: Job) -> list[Item]:
    found = gpu_costs(job)
    plan = backend_plan(job)
    workspace = 4 * plan.numel
    # Where all exponentials are kept they are what the backward multiplies.
    chunk = plan.chunk * plan.rows_pad * plan.product.itemsize if plan.kept < plan.classes else 0
    kept = f"norms; {plan.kept:,} of {plan.classes:,} classes × {plan.rows:,} exponentials"
    return [
        Item("workspace", workspace, BACKWARD, kept),
        Item("chunk of probabilities", chunk, BACKWARD, f"{plan.chunk:,} × {plan.rows_pad:,}"),
        Item(
            "rows, sums and tangents",
            found.extra - workspace - chunk,
            BACKWARD,
            "the launches' other tensors",
        ),
    ]
