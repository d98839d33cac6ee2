"""The sanitizer can fail: each fault that it is for, in a small kernel and in the real ones, turns it red."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expface_kernels import ArcFace
from expface_kernels.backends.triton import calls, tuning
from tests.cases import INTERPRETED, batch
from tests.sanitizer import SanitizerError, sanitized
from tests.test_backends.triton_steps import BF16, KEEP, run

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
N, BLOCK = 64, 16


@pytest.fixture
def counts() -> Iterator[Counter[str]]:
    seen: Counter[str] = Counter()
    with sanitized(seen):
        yield seen


def _copy(source: Tensor, target: Tensor, n: int = N, wrap: int = N, again: bool = False) -> None:
    from tests.test_backends.sanitized_kernel import copied

    sizes = {"n": n, "wrap": wrap, "AGAIN": again, "BLOCK": BLOCK}
    calls.launch(copied, N // BLOCK, tuning.ROWS, p_from=source, p_to=target, **sizes)


def test_a_clean_launch_is_counted(counts: Counter[str]) -> None:
    source = torch.arange(float(N))
    target = torch.zeros(N)
    _copy(source, target)
    assert torch.equal(source, target)
    assert counts == {"launches": 1, "loads": N, "stores": N}


def test_programs_may_load_what_they_alone_store(counts: Counter[str]) -> None:
    memory = torch.arange(float(N))
    _copy(memory, memory)


# The storage has room for all of it; the view that is passed doesn't.
@pytest.mark.parametrize(
    ("source", "target", "what"),
    [
        (slice(0, N - 4), slice(N, 2 * N), "4 of 16 addresses of a load are outside p_from, from byte 240 "),
        (slice(0, N), slice(N, 2 * N - 1), "1 of 16 addresses of a store are outside p_to, from byte 252 "),
    ],
    ids=["load", "store"],
)  # fmt: skip
def test_an_access_past_the_view(source: slice, target: slice, what: str, counts: Counter[str]) -> None:
    memory = torch.zeros(3 * N)
    with pytest.raises(SanitizerError, match=f"copied: {what}"):
        _copy(memory[source], memory[target])


@pytest.mark.parametrize(
    ("n", "wrap", "again", "what"),
    [
        (N, BLOCK, False, f"{N - BLOCK} stores of two programs to one address"),
        (BLOCK, BLOCK // 2, False, f"{BLOCK // 2} stores of one program to an address that it has stored to"),
        (BLOCK, BLOCK, True, f"{BLOCK} stores of one program to an address that it has stored to"),
    ],
    ids=["two programs", "within one store", "two stores"],
)
def test_two_stores_to_one_address(n: int, wrap: int, again: bool, what: str, counts: Counter[str]) -> None:
    with pytest.raises(SanitizerError, match=f"copied: {what}"):
        _copy(torch.zeros(N), torch.zeros(N), n, wrap, again)


@pytest.mark.parametrize(
    ("source", "target", "what"),
    [(0, BLOCK, "loads of what another program stores"), (BLOCK, 0, "stores to what another program loads")],
    ids=["stored before", "stored after"],
)
def test_a_program_loads_what_another_stores(
    source: int, target: int, what: str, counts: Counter[str]
) -> None:
    memory = torch.zeros(N + BLOCK)
    with pytest.raises(SanitizerError, match=f"copied: {N - BLOCK} {what}"):
        _copy(memory[source:][:N], memory[target:][:N])


def test_what_is_never_written_is_poison(counts: Counter[str]) -> None:
    like = torch.zeros(N)
    for unwritten in (
        torch.empty(N),
        torch.empty_like(like),
        like.new_empty(N),
        torch.empty_strided((N,), (1,)),
    ):
        _copy(like, unwritten, N // 2)
        assert (unwritten[: N // 2] == 0).all()
        assert unwritten[N // 2 :].isnan().all()
    assert (torch.empty(N, dtype=torch.int32) == 2**31 - 1).all()


def _step(workspace_bytes: int) -> None:
    """A bfloat16 step of two blocks of rows and a tile of classes that is not full; several kernels."""
    x, w, y = batch("random", 130, 140, 24)
    run(x.to(BF16), w.to(BF16), y, ArcFace(), workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("workspace_bytes", [0, KEEP])
def test_the_real_kernels_are_clean(workspace_bytes: int, counts: Counter[str]) -> None:
    _step(workspace_bytes)
    assert counts["launches"] >= 5


@pytest.mark.parametrize(
    ("right", "wrong", "what"),
    [
        ("tl.minimum(i_classes, class_end - 1)", "i_classes", "are outside p_"),
        ("* B_pad + i_rows\n", "* B_pad + i_rows % BM\n", "stores of two programs to one address"),
    ],
    ids=["classes not clamped", "sums of all row blocks"],
)  # fmt: skip
def test_a_broken_real_kernel(
    right: str, wrong: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: Counter[str]
) -> None:
    from expface_kernels.backends.triton import kernels

    text = Path(str(kernels.__file__)).read_text()
    assert right in text
    broken = tmp_path / "broken.py"
    broken.write_text(text.replace(right, wrong, 1))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    monkeypatch.setattr(kernels, "forward_tile", importlib.import_module("broken").forward_tile)
    with pytest.raises(SanitizerError, match=f"forward_tile: .*{what}"):
        _step(0)
