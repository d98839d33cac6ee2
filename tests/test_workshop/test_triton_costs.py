"""The cost model against what kernels really load and store, and the sizes that the package promises.

B rows · C classes · D features. Bytes are counted in the interpreter: every address that a launch touches.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from expface_kernels.backends.triton import TritonBackend, calls, plan, tuning
from expface_kernels.workshop import costs
from expface_kernels.workshop.recording import Case
from expface_kernels.workshop.traffic import TrafficCounter
from tests.cases import INTERPRETED, batch

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LARGE = Case(1024, 1_000_000, 512)
PRODUCT = 2 * 1024 * 1_000_000 * 512


class Touched:
    """The bytes that launches load and store, each address once a launch."""

    def __init__(self) -> None:
        self.read: dict[str, int] = {}
        self.written: dict[str, int] = {}
        self.loads: set[int] = set()
        self.stores: set[int] = set()
        self.bytes_read = self.bytes_written = 0

    def add(self, name: str) -> None:
        self.read[name] = self.read.get(name, 0) + len(self.loads)
        self.written[name] = self.written.get(name, 0) + len(self.stores)
        self.loads, self.stores = set(), set()


def _bytes(pointers: Any, mask: Any) -> set[int]:
    width = pointers.dtype.scalar.element_ty.primitive_bitwidth // 8
    first = np.unique(pointers.data[mask.data.astype(bool)] if mask is not None else pointers.data)
    return {int(address) + i for address in first for i in range(width)}


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> Touched:
    from triton.runtime import interpreter

    seen, builder, run = Touched(), interpreter.interpreter_builder, calls.launch
    load, store = type(builder).create_masked_load, type(builder).create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        seen.loads |= _bytes(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.stores |= _bytes(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_launch(kernel: Any, programs: int, tile: Any, **arguments: Any) -> None:
        run(kernel, programs, tile, **arguments)
        seen.add(kernel.fn.__name__)

    monkeypatch.setattr(type(builder), "create_masked_load", counted_load)
    monkeypatch.setattr(type(builder), "create_masked_store", counted_store)
    for module in ("forward", "backward", "launch"):
        monkeypatch.setattr(f"expface_kernels.backends.triton.{module}.launch", counted_launch)
    return seen


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("workspace_bytes", [0, 2**30])
@pytest.mark.parametrize(
    "options",
    [
        {"x_dtype": F32, "w_dtype": F32},
        {"x_dtype": BF16, "w_dtype": BF16},
        {"x_dtype": F16, "w_dtype": F16},
        {"x_dtype": BF16, "w_dtype": F32, "product_dtype": BF16},
        {"x_dtype": F16, "w_dtype": F32, "product_dtype": F16},
        {"subset": True},
        {"find_hardest": True},
        {"scale": 128.0},
        {"scale": 128.0, "find_hardest": True, "subset": True},
    ],
    ids=str,
)
def test_bytes_of_a_step_are_those_that_its_kernels_touch(
    options: dict[str, Any], workspace_bytes: int, touched: Touched
) -> None:
    case = Case(20, 130, 24, **options, workspace_bytes=workspace_bytes)
    expected = {step.name: step for step in costs.costs(case, "interpreter").steps}
    x, w, y = batch("random", 20, 130, 24)
    # No label twice: as many tangents as rows.
    x, w, y = x.to(case.x_dtype), w.to(case.w_dtype), torch.arange(20)
    subset = torch.arange(130) if case.subset else None
    config = case.config
    out = TritonBackend().forward(x, w, y, subset, config)
    g = torch.ones(20, dtype=torch.float64)
    TritonBackend().backward(x, w, y, subset, out.log_l, out.workspace, g, g, config, True, True)
    others = {name for name in expected if name == costs.OPERATORS or name.startswith("library")}
    assert set(touched.read) == expected.keys() - others
    for name, count in touched.written.items():
        assert count == expected[name].written, name
    for name, count in touched.read.items():
        assert count == expected[name].read, name


def _outside(function: Any) -> Any:
    """Without the modes that are on: copies that the interpreter and a CPU's library make are not ours."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            result = function(*args, **kwargs)
        gc.collect()  # the interpreter leaves cycles that hold a launch's arguments
        return result

    return call


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    "options", [{}, {"workspace_bytes": 2**30}, {"scale": 128.0}, {"w_dtype": F32}], ids=str
)
def test_torchs_operators_move_what_the_model_says(
    options: dict[str, Any], small_tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(40, 300, 24, **options)  # three chunks
    expected = {step.name: step for step in costs.costs(case, "interpreter").steps}[costs.OPERATORS]
    for module in ("forward", "backward", "launch"):
        monkeypatch.setattr(f"expface_kernels.backends.triton.{module}.launch", _outside(calls.launch))
    monkeypatch.setattr("expface_kernels.backends.triton.backward.add_mm_f32", _outside(calls.add_mm_f32))
    x, w, y = batch("random", 40, 300, 24)
    x, w, y = x.to(case.x_dtype), w.to(case.w_dtype), torch.arange(40)
    with TrafficCounter() as moved:
        out = TritonBackend().forward(x, w, y, None, case.config)
        g, h = torch.empty_like(out.log_l), torch.empty_like(out.theta)
        arguments = (out.log_l, out.workspace, g, h, case.config, True, True)
        TritonBackend().backward(x, w, y, None, *arguments)
    assert expected.read == moved.bytes
    assert moved.bytes > 40 * 24 * (8 + 4 + 8)  # Σ p·wn, from float32 to float64


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """What is there already need not be looked through."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.usefixtures("quick_collections")
@pytest.mark.parametrize("workspace_bytes", [0, 2**30])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("scale", [64.0, 128.0])
def test_peak_of_a_step_is_that_of_the_allocations_really_made(
    scale: float, dtype: torch.dtype, workspace_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(40, 300, 24, dtype, dtype, scale, workspace_bytes=workspace_bytes)
    result = costs.costs(case, "interpreter")
    for module in ("forward", "backward", "launch"):
        monkeypatch.setattr(f"expface_kernels.backends.triton.{module}.launch", _outside(calls.launch))
    monkeypatch.setattr("expface_kernels.backends.triton.backward.add_mm_f32", _outside(calls.add_mm_f32))
    x, w, y = batch("random", 40, 300, 24)
    x, w, y = x.to(dtype), w.to(dtype), torch.arange(40)
    config = case.config
    with costs.PeakMemory() as memory:
        out = TritonBackend().forward(x, w, y, None, config)
        g, h = torch.ones_like(out.log_l), torch.ones_like(out.theta)
        dx, dw = TritonBackend().backward(x, w, y, None, out.log_l, out.workspace, g, h, config, True, True)
    assert dx is not None
    assert dw is not None
    assert memory.peak == result.peak
    assert result.gradient == dw.nbytes


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_bytes_and_flops_of_the_library_product_are_those_of_its_arguments(dtype: torch.dtype) -> None:
    total, p, w = torch.zeros(5, 7), torch.ones(11, 5, dtype=dtype), torch.ones(11, 7, dtype=dtype)
    flops, read, written = costs.library_product(p.T, w)
    assert flops == 2 * 5 * 11 * 7
    assert read == total.nbytes + p.nbytes + w.nbytes
    assert written == total.nbytes
    if dtype == F32:  # 16-bit operands are cast first on the CPU
        with TrafficCounter() as moved:
            calls.add_mm_f32(total, p.T, w)
        assert moved.bytes == read + written


@pytest.mark.parametrize("kept", [False, True])
def test_a_step_at_a_million_classes_keeps_to_its_budget(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rules' tiles: what a GPU was tuned to may move more and be faster."""
    monkeypatch.setattr(tuning, "table", dict)
    case = Case(1024, 1_000_000, 512, workspace_bytes=2**50 if kept else 0)
    result = costs.costs(case, "sm_90")
    products, gigabytes = (3.2, 13.6) if kept else (4.2, 12.6)
    assert result.flops <= products * PRODUCT
    assert result.flops >= (3 if kept else 4) * PRODUCT
    # The norms' pass over w is 1 GB of it.
    assert (12.8 if kept else 12.288) * 1e9 < result.moved <= gigabytes * 1e9
    operators = sum(step.read for step in result.steps if step.name == costs.OPERATORS)
    assert 0 < operators <= 0.01 * result.moved  # sums over tiles, casts of rows
    if not kept:
        assert result.extra <= 400e6


@pytest.mark.parametrize(
    "options",
    [{"w_dtype": F32, "product_dtype": BF16}, {"x_dtype": F16, "w_dtype": F16}, {"subset": True}],
    ids=["float32 master", "float16", "class list"],
)
def test_a_small_batch_copies_no_more_centres_than_a_chunk_of_p_has_room_for(options: dict[str, Any]) -> None:
    case = Case(128, 1_000_000, 512, **options)
    # P' and the copy, 12 bytes a class (norms, shifts, segments), sums and rows.
    assert costs.costs(case, "sm_90").extra <= plan.CHUNK_BYTES + 12 * case.classes + 10e6


@pytest.mark.parametrize("scale", [0.5, 1.0, 64.0, 128.0])
def test_a_scale_that_keeps_nothing_holds_no_room_for_it(scale: float) -> None:
    case = Case(1024, 200_000, 512, scale=scale, workspace_bytes=2**28)
    held = costs.costs(case, "sm_90").forward_peak
    assert (held > 2**28 - 2**20) == (plan.SMALLEST_KEPT_SCALE <= scale <= plan.LARGEST_PLAIN_SCALE)


def test_the_roofline_of_a_large_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "table", dict)  # by the rules, whatever has been measured
    result = costs.costs(LARGE, "sm_90")
    assert 5.3 < result.milliseconds(costs.GPUS["h100"]) < 6.5
    assert "library product, dX" in costs.report(result, "h100")


@pytest.mark.parametrize("name", list(costs.GPUS))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_gpu_and_dtype_has_a_report(name: str, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "256", "--classes", "100000", "--features", "128"]
    assert costs.main(["--gpu", name, "--dtype", dtype, *sizes]) == 0
    assert f"together, on {name}" in capsys.readouterr().out


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    with costs.PeakMemory() as memory:
        a = torch.empty(100, device="meta")
        b = a.view(10, 10)
        del a
        c = torch.empty(50, device="meta")
        del b
        torch.empty(25, device="meta")
        del c
    assert (memory.peak, memory.now) == (600, 0)
