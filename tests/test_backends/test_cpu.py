"""The cpu backend's own business: tiles, how much of E is kept, threads, instruction sets, memory.

B rows · C classes · D features · E exp(s·cos) (C, B) · T classes of a tile
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from expface_kernels import margin_cross_entropy
from expface_kernels.backends import cpu, native, products
from expface_kernels.backends import workspace as pool
from expface_kernels.backends.base import OpConfig
from expface_kernels.backends.cpu import TilePlan
from tests.cases import ALL_SCALES, KINDS, batch, leaves, truth
from tests.tolerances import assert_close, assert_rows_close, relative_error, row_cap

F32, F64 = torch.float32, torch.float64
extension = native._load()


def _run(
    x: Tensor, w: Tensor, y: Tensor, dtype: torch.dtype = F32, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dw) of the cpu backend, summed over rows."""
    a, b = leaves(x, w, dtype)
    loss = margin_cross_entropy(a, b, y, reduction="sum", backend="cpu", **options)
    loss.backward()
    return loss.detach(), a.grad, b.grad


def _plan(batch: int, classes: int, dtype: torch.dtype, keep: bool, workspace_bytes: int) -> TilePlan:
    return TilePlan.of(batch, 128, classes, dtype, OpConfig(64.0, keep, workspace_bytes, False, None))


# Batches: none, one, a few, the largest whose tile is still longer than the smallest, and past it.
@pytest.mark.parametrize("rows", [0, 1, 7, 128, 2048, 5000])
# Classes: one, around a smallest tile, around a largest, several tiles.
@pytest.mark.parametrize("classes", [1, 1023, 1024, 1025, 16384, 16385, 100_003])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_tiles_cover_all_classes_once_and_stay_small(rows: int, classes: int, dtype: torch.dtype) -> None:
    plan = _plan(rows, classes, dtype, keep=True, workspace_bytes=0)
    tiles = list(plan.tiles())
    assert [start for start, _ in tiles] == [0, *[stop for _, stop in tiles[:-1]]]
    assert tiles[-1][1] == classes
    assert all(start < stop <= start + plan.tile for start, stop in tiles)
    smallest, largest = cpu.TILE_CLASSES
    assert smallest <= plan.tile <= largest
    assert plan.tile * rows <= max(products.TILE_ELEMENTS, smallest * rows)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("budget", [0, 1, 4 * 2**20, 64 * 2**20, 2**40])
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (64, 5000), (100, 100_003), (3000, 2049)])
def test_what_is_kept_is_whole_tiles_within_the_budget_or_everything(
    rows: int, classes: int, budget: int, dtype: torch.dtype
) -> None:
    plan = _plan(rows, classes, dtype, keep=True, workspace_bytes=budget)
    assert plan.kept * rows * dtype.itemsize <= budget
    assert plan.kept == classes or plan.kept % plan.tile == 0
    # The next tile would not have fitted.
    more = min(plan.kept + plan.tile, classes)
    assert plan.kept == classes or more * rows * dtype.itemsize > budget
    e, tile_max, inv = plan.split(torch.empty(plan.numel))
    assert e.shape == (plan.kept, rows)
    assert tile_max.shape == (sum(stop <= plan.kept for _, stop in plan.tiles()), rows)
    assert inv.shape == (plan.kept,)


def test_without_a_backward_nothing_is_kept() -> None:
    assert _plan(64, 5000, F32, keep=False, workspace_bytes=2**40).kept == 0


# 8 rows in tiles of 8 classes, 61 classes: 8 tiles, the last of 5.
TILE_BYTES = 8 * 8 * 4
BUDGETS = (0, TILE_BYTES - 1, TILE_BYTES, 3 * TILE_BYTES + 1, 61 * 8 * 4 - 1, 61 * 8 * 4, 2**30)


@pytest.mark.parametrize("scale", ALL_SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_amount_of_workspace_gives_the_truth(kind: str, scale: float, small_tiles: int) -> None:
    x, w, y = batch(kind, 8, 61, 16)
    right = truth(x, w, y, scale=scale, reduction="sum")
    losses = []
    for budget in BUDGETS:
        loss, dx, dw = _run(x, w, y, scale=scale, workspace_bytes=budget)
        losses.append(loss)
        assert_close(dx, right[1], dtype=F32, what=f"dx, {budget} bytes")
        assert_close(dw, right[2], dtype=F32, what=f"dw, {budget} bytes")
        assert_rows_close(dx, right[1], cap=row_cap(scale), what=f"dx, {budget} bytes")
    assert_close(losses[0], right[0], dtype=F32, what="loss")
    assert all(torch.equal(loss, losses[0]) for loss in losses)  # the forward is the same


@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F64, F64), (torch.bfloat16, F32), (F32, torch.float16)])
def test_partial_keeping_holds_for_every_dtype_and_for_a_subset(
    dtypes: tuple[torch.dtype, torch.dtype], subset: bool, small_tiles: int
) -> None:
    x, w, y = batch("mixed", 8, 61, 16)
    x, w = x.to(dtypes[0]), w.to(dtypes[1])
    classes = torch.unique(torch.cat([y, torch.arange(0, 61, 2)])) if subset else None
    right = truth(x, w, y, class_subset=classes, reduction="sum")
    bytes_kept = 2 * 8 * 8 * (8 if F64 in dtypes else 4)  # two tiles of four or eight
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    loss = margin_cross_entropy(
        a, b, y, class_subset=classes, reduction="sum", workspace_bytes=bytes_kept, backend="cpu"
    )
    loss.backward()
    assert_close(loss, right[0], dtype=loss.dtype, what="loss")
    assert_close(a.grad, right[1], dtype=dtypes[0], what="dx")
    assert_close(b.grad, right[2], dtype=dtypes[1], what="dw")


@pytest.mark.parametrize("scale", [64.0, 128.0])
def test_exponentials_made_again_are_as_good_as_kept_ones(scale: float) -> None:
    # float32 holds log2 l ≈ 185 (s = 128) to 8e-6 only: shifting by it must not cost that.
    errors = {0: 0.0, 2**30: 0.0}
    for seed in range(8):
        x, w, y = batch("random", 130, 9, 16, seed=seed)
        right = truth(x, w, y, scale=scale, reduction="sum")
        for budget in errors:
            errors[budget] += relative_error(_run(x, w, y, scale=scale, workspace_bytes=budget)[1], right[1])
    assert errors[0] <= 1.5 * errors[2**30]


def test_repeated_labels_meet_at_the_edges_of_tiles(small_tiles: int) -> None:
    x, w, _ = batch("random", 12, 24, 8)
    y = torch.tensor([7, 7, 8, 8, 8, 0, 0, 23, 23, 15, 16, 7])
    right = truth(x, w, y, reduction="sum")
    for budget in (0, 12 * 8 * 4, 2**30):
        for got, expected in zip(_run(x, w, y, workspace_bytes=budget), right, strict=True):
            assert_close(got, expected, dtype=F32)


@pytest.fixture(params=extension.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    chosen = extension.instruction_set()
    extension.use_instruction_set(request.param)
    yield request.param
    extension.use_instruction_set(chosen)


@pytest.mark.parametrize("kind", ["random", "learnt", "mixed"])
def test_every_instruction_set_gives_the_truth(instruction_set: str, kind: str) -> None:
    x, w, y = batch(kind, 33, 1031, 40)
    right = truth(x, w, y, reduction="sum")
    for dtype in (F32, F64):
        for got, expected in zip(_run(x, w, y, dtype), right, strict=True):
            assert_close(got, expected, dtype=dtype)


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("kind", ["random", "learnt"])
def test_one_thread_and_two_agree(kind: str, budget: int) -> None:
    x, w, y = batch(kind, 64, 1031, 40)  # past the size below which one thread does it all
    right = truth(x, w, y, reduction="sum")
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(_run(x, w, y, workspace_bytes=budget))
    for alone, shared, again, expected in zip(*results, right, strict=True):
        assert_close(shared, expected, dtype=F32)
        assert relative_error(shared, alone.double()) < 2e-6
        assert torch.equal(shared, again)


@pytest.mark.parametrize("rows", [16, 40])
def test_a_row_does_not_depend_on_the_rows_beside_it(rows: int) -> None:
    x, w, y = batch("mixed", rows, 200, 16)
    whole = _run(x, w, y)[1]
    part = _run(x[:5], w, y[:5])[1]
    assert_rows_close(part, whole[:5].double(), cap=1e-5)


def _record(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    right: Callable[..., Any] = getattr(owner, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return right(*args, **kwargs)

    monkeypatch.setattr(owner, name, recorded)
    return calls


def test_frozen_centres_get_no_gradient_buffer_and_a_frozen_row_no_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w, y = batch("random", 8, 61, 16)
    expected = _run(x, w, y)
    buffers = _record(monkeypatch, cpu, "_WeightGradient")
    finishes = _record(monkeypatch, cpu, "_input_gradient")

    a = x.float().requires_grad_()
    margin_cross_entropy(a, w.float(), y, reduction="sum", backend="cpu").backward()
    assert torch.equal(a.grad, expected[1])
    assert (len(buffers), len(finishes)) == (0, 1)

    b = w.float().requires_grad_()
    margin_cross_entropy(x.float(), b, y, reduction="sum", backend="cpu").backward()
    assert torch.equal(b.grad, expected[2])
    assert (len(buffers), len(finishes)) == (1, 1)


def _largest_allocation(step: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of the largest block that torch or the pool hands out during `step`."""
    lent = _record(monkeypatch, pool, "allocate")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        step()
    torch_blocks = [event.nbytes() for event in _memory_events(seen)]
    pool_blocks = [numel * dtype.itemsize for numel, dtype in lent]
    assert torch_blocks, "the profiler saw no allocation: this test would prove nothing"
    assert pool_blocks, "the pool lent nothing: this test would prove nothing"
    return max(torch_blocks + pool_blocks)


def _memory_events(seen: torch.profiler.profile) -> list[Any]:
    return [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]


def test_without_a_workspace_no_block_comes_near_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "TILE_CLASSES", (64, 64))
    rows, classes, features = 64, 4096, 4
    x, w, y = batch("random", rows, classes, features)
    every_logit = rows * classes * 4
    largest = _largest_allocation(lambda: _run(x, w, y, workspace_bytes=0), monkeypatch)
    assert largest <= classes * features * 4  # dw; a sixteenth of the logits
    largest = _largest_allocation(lambda: _run(x, w, y, workspace_bytes=2**30), monkeypatch)
    assert largest >= every_logit  # and the measure does see the exponentials where they are kept


def test_no_grad_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "TILE_CLASSES", (64, 64))
    x, w, y = batch("random", 64, 4096, 4)
    a, b = leaves(x, w)

    def step() -> None:
        with torch.no_grad():
            margin_cross_entropy(a, b, y, backend="cpu")

    assert _largest_allocation(step, monkeypatch) * 8 <= 64 * 4096 * 4


def test_topk_over_tiles_finds_what_a_full_sort_finds(small_tiles: int) -> None:
    x, w, _ = batch("random", 6, 61, 16)
    cos = (x / x.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T
    for k in (1, 7, 8, 9, 61):  # less than a tile, one, more, all
        best, classes = cpu.CpuBackend().topk(x, w, k)
        right = cos.topk(k, dim=1)
        assert torch.equal(classes, right.indices)
        assert_close(best, right.values, dtype=F64)
