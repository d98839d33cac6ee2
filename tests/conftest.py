"""Fixtures of the whole suite: global state is put back after every test, and tiles can be made small."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from expface_kernels.backends import cpu, workspace
from expface_kernels.backends.triton import plan
from tests.cases import BACKENDS, GPU, INTERPRETED
from tests.interpreter import patch_once_a_launch

if INTERPRETED:
    patch_once_a_launch()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--need-gpu", action="store_true", help="fail where there is no GPU, in place of skipping"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--need-gpu") and not GPU:
        raise pytest.UsageError("--need-gpu: torch sees no GPU, or TRITON_INTERPRET is set")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread, unless a test asks for more: spinning pools on shared cores (xdist) cost 3×."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _lent_memory_holds_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that the pool lends hold NaN, not by chance the right values of an earlier step."""
    allocate = workspace.allocate
    monkeypatch.setattr(workspace, "allocate", lambda numel, dtype: allocate(numel, dtype).fill_(torch.nan))


@pytest.fixture(autouse=True)
def _fresh_memory_of_kernels_holds_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for what the triton backend allocates: integers hold a number that is no index."""
    if not (INTERPRETED or GPU):
        return
    from expface_kernels.backends.triton.launch import Call

    empty = Call.empty

    def filled(self: Call, *args: Any) -> torch.Tensor:
        made = empty(self, *args)
        with _disable_current_modes():  # nobody counts this
            made.fill_(torch.nan if made.is_floating_point() else -(2**30))
        return made

    monkeypatch.setattr(Call, "empty", filled)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend in turn."""
    return request.param


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of 8 classes, so that a small input has many of them (triton: chunks of 128); returns the 8."""
    monkeypatch.setattr(cpu, "TILE_CLASSES", (8, 8))
    monkeypatch.setattr(plan, "CHUNK_BYTES", 0)
    return 8
