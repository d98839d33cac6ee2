"""Items against what a real head and optimizer take, and against the triton backend's own count."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from expface_kernels.backends import cpu, products
from expface_kernels.plan import Job, plan
from expface_kernels.plan.job import op_config_of
from expface_kernels.plan.memory import TARGET_PATH_BYTES, gpu_costs, items_of, peak_bytes
from expface_kernels.plan.seconds import TARGET_PATH_MOVED
from expface_kernels.workshop.costs import GPUS, costs
from expface_kernels.workshop.recording import Case
from expface_kernels.workshop.traffic import PeakMemory, TrafficCounter
from tests.distributed import run_ranks
from tests.test_plan import measured
from tests.tolerances import EXTRAPOLATED, PLANNED_MEMORY

ROOT = Path(__file__).resolve().parents[2]
WIDE = {"classes": 100_000, "features": 256, "batch": 128}
# Each has something that the others have not: temporaries, state, no workspace, 16 bit, fused, many rows.
_SAMPLE = {"classes": 400_000, "features": 128, "batch": 64, "sample_rate": 0.1}
MEASURED: list[dict[str, Any]] = [
    {"classes": 200_000, "features": 128, "batch": 64, "optimizer": "adam"},
    {**WIDE, "optimizer": "momentum", "workspace_bytes": 0},
    {**WIDE, "optimizer": "sgd", "weight_decay": 1e-4},
    {"classes": 200_000, "features": 128, "batch": 256, "optimizer": "momentum", "dtype": "bfloat16"},
    {**WIDE, "optimizer": "adamw", "fused": True},
    {"classes": 20_000, "features": 512, "batch": 2048, "optimizer": "sgd"},
    {**_SAMPLE, "optimizer": "momentum"},
    {**_SAMPLE, "optimizer": "sgd", "sparse_grad": True},
    {**_SAMPLE, "optimizer": "sparse-adam", "sparse_grad": True},
]
# Many classes; and many rows, of which each rank sees all.
SHARDED_JOBS: list[dict[str, Any]] = [
    {"classes": 200_000, "features": 128, "batch": 64, "ranks": 2, "optimizer": "adam"},
    {"classes": 20_000, "features": 512, "batch": 1024, "ranks": 2, "optimizer": "sgd"},
]


def _assert_planned(job: dict[str, Any], found: int) -> None:
    items = items_of(Job(**job))
    told = {item.name: round(item.bytes / 1e6, 1) for item in items}
    assert peak_bytes(items) == pytest.approx(found, rel=PLANNED_MEMORY), (
        f"{job}: {found / 1e6:.1f} MB, {told}"
    )


@pytest.mark.skipif(not measured.CLEAR_REFS.exists(), reason="peaks are read from Linux's /proc")
def test_the_peak_is_within_15_percent_of_what_is_measured() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_plan.measured"],
        input=json.dumps(MEASURED), cwd=ROOT, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for job, found in zip(MEASURED, json.loads(done.stdout), strict=True):
        _assert_planned(job, found)


@pytest.mark.skipif(not measured.CLEAR_REFS.exists(), reason="peaks are read from Linux's /proc")
def test_so_is_a_ranks_where_two_share_the_classes() -> None:
    for found in run_ranks(2, measured.rank_peaks, SHARDED_JOBS):
        for job, peak in zip(SHARDED_JOBS, found, strict=True):
            _assert_planned(job, peak)


def test_items_follow_the_ranges_and_rows_of_ranks() -> None:
    job = Job(classes=1003, features=64, batch=32, ranks=4, optimizer="adam")
    found = {item.name: item.bytes for item in items_of(job)}
    assert found["centres"] == 251 * 64 * 4  # ⌈1003 / 4⌉
    assert found["gradient of centres"] == found["centres"]
    assert found["optimizer state"] == 2 * found["centres"]
    assert found["embeddings"] == 32 * 64 * 4
    assert found["gathered rows"] == 128 * 64 * (4 + 4)
    assert found["workspace"] == 4 * (251 * 128 + 128 + 251)  # exponentials, a tile's maxima, norms
    assert "class subset" not in found


def test_a_sparse_gradient_holds_the_rows_that_take_part() -> None:
    job = Job(classes=10_000, features=64, batch=32, optimizer="sgd", sample_rate=0.1, sparse_grad=True)
    found = {item.name: item.bytes for item in items_of(job)}
    assert job.active_classes == 1000
    assert found["gradient of centres"] == 1000 * (64 * 4 + 8)
    assert found["class subset"] == 8000
    few = dataclasses.replace(job, sample_rate=1e-4)
    assert few.active_classes == 32  # the batch's own classes must find room


def test_the_cpu_items_are_the_backends_own_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the backend asks its pool for in a step, 16-bit centres included."""
    for dtype in ("float32", "bfloat16"):
        job = Job(
            classes=5000, features=32, batch=16, dtype=dtype, workspace_bytes=2048 * 16 * 4, optimizer="sgd"
        )
        monkeypatch.setattr(cpu, "TILE_CLASSES", (1024, 1024))
        lent: list[int] = []
        allocate = cpu.pool.allocate

        def counted(
            numel: int, of: torch.dtype, lent: list[int] = lent, allocate: Any = allocate
        ) -> torch.Tensor:
            lent.append(numel * of.itemsize)
            return allocate(numel, of)

        with monkeypatch.context() as patched:
            patched.setattr(cpu.pool, "allocate", counted)
            measured.Training(job).step()
        found = {item.name: item.bytes for item in items_of(job)}
        assert lent.count(found["workspace"]) == 1
        assert lent.count(found["tile of logits"]) == 2  # forward, backward
        # Of the two the forward's tile of centres is back in the pool when the backward takes its own.
        assert found.get("tiles of centres", 0) == (2 * 1024 * 32 * 4 if dtype == "bfloat16" else 0)
        assert lent.count(1024 * 32 * 4) == (3 if dtype == "bfloat16" else 0)
        assert found["row operands"] == 2 * 16 * 32 * 4


@pytest.mark.parametrize(("rows", "features"), [(256, 64), (512, 128)])
def test_the_target_path_holds_and_moves_what_was_measured(rows: int, features: int) -> None:
    """Linear in N·D: a step over few classes."""
    x, w, y = torch.randn(rows, features), torch.randn(32, features), torch.randint(32, (rows,))
    backend, config = cpu.CpuBackend(), op_config_of(Job(classes=32, workspace_bytes=0))
    ones = torch.ones(rows, dtype=torch.float64)
    # What oneDNN adds is an item of its own.
    with PeakMemory() as memory, TrafficCounter() as moved, products.using(products.MM):
        out = backend.forward(x, w, y, None, config)
        backend.backward(x, w, y, None, out.log_l, out.workspace, ones, ones, config, True, True)
    assert memory.peak == pytest.approx(TARGET_PATH_BYTES * x.numel(), rel=PLANNED_MEMORY)
    assert moved.bytes == pytest.approx(TARGET_PATH_MOVED * x.numel(), rel=PLANNED_MEMORY)


GPU_JOBS: list[dict[str, Any]] = [
    {"classes": 50_000, "dtype": "bfloat16", "batch": 512},
    {"classes": 50_000, "autocast": "float16", "workspace_bytes": 0},
    {"classes": 50_000, "sample_rate": 0.25, "ranks": 4},
    # Many classes cost what a part of them foretells.
    {"classes": 9_000_000, "batch": 1024, "autocast": "bfloat16"},
    {"classes": 9_000_000, "batch": 1024, "dtype": "bfloat16", "workspace_bytes": 10**11},
    {"classes": 9_000_000, "batch": 4096, "sample_rate": 0.7, "workspace_bytes": 0},
]


@pytest.mark.parametrize("options", GPU_JOBS, ids=str)
def test_a_gpus_items_and_work_are_the_backends_own_count(options: dict[str, Any]) -> None:
    job = Job(device="h100", **options)
    case = Case(
        job.rows, job.active_classes, 512, job.row_dtype, job.centre_dtype,
        workspace_bytes=job.workspace_bytes, subset=job.subset,
        product_dtype=None if job.autocast is None else job.row_dtype,
    )  # fmt: skip
    direct, foretold = costs(case, GPUS["h100"].arch), gpu_costs(job)
    for name in ("peak", "forward_peak", "extra", "flops", "moved"):
        assert getattr(foretold, name) == pytest.approx(getattr(direct, name), rel=EXTRAPOLATED), name
    found = {item.name: item.bytes for item in plan(job).items}
    names = ("workspace", "chunk of probabilities", "rows, sums and tangents")
    assert sum(found.get(name, 0) for name in names) == foretold.extra
    assert all(size > 0 for size in found.values())
