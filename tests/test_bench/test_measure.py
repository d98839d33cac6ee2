from __future__ import annotations

import gc
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import measure
from bench.cases import Case
from bench.measure import fault_in_pages, round_order, time_run

INPUTS = Case(rows=2, classes=3, features=2).inputs()


def test_over_two_rounds_all_have_the_same_mean_place() -> None:
    names = ["a", "b", "c", "d"]
    for round_ in range(0, 8, 2):
        first, second = round_order(names, round_), round_order(names, round_ + 1)
        assert {first.index(name) + second.index(name) for name in names} == {3}


@pytest.mark.parametrize("count", [3, 6, 12])
def test_within_nine_rounds_nobody_always_follows_the_same_peer(count: int) -> None:
    names = [str(i) for i in range(count)]
    orders = [round_order(names, round_) for round_ in range(9)]
    for name in names:
        before = {order[order.index(name) - 1] for order in orders if order[0] != name}
        assert len(before) >= min(count - 1, 3)


def test_the_last_gradients_are_gone_before_the_clock_starts() -> None:
    found: list[Tensor | None] = []

    def clock() -> float:
        found.append(INPUTS.w.grad)
        return 0.0

    def step() -> Tensor:
        loss = INPUTS.x.sum() + INPUTS.w.sum()
        loss.backward()
        return loss

    INPUTS.x.grad, INPUTS.w.grad = torch.zeros_like(INPUTS.x), torch.zeros_like(INPUTS.w)
    measure.timed_step(step, INPUTS, clock)
    before, after = found
    assert before is None
    assert after is not None


class Copies(TorchDispatchMode):
    """Collects the elements of every tensor that an operator writes outside of `of`'s memory."""

    def __init__(self, of: Tensor) -> None:
        super().__init__()
        self.memory, self.elements = of.untyped_storage().data_ptr(), list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != self.memory:
            self.elements.append(out.numel())
        return out


@pytest.mark.parametrize(
    ("gradient", "total"),
    [
        (torch.ones(6, 1024), 6),
        (torch.ones(6, 1024).T, 6),
        (torch.ones(6, 2048)[:, :1024], 6),
        (torch.ones(6, 2048)[:, :1024].T, 6),
        (torch.ones(6, 1024, dtype=torch.bfloat16), 3),
    ],
    ids=["contiguous", "transposed", "with room between rows", "that transposed", "16 bit"],
)
def test_faulting_in_pages_copies_nothing_whatever_the_layout(gradient: Tensor, total: float) -> None:
    with Copies(gradient) as copies:
        assert fault_in_pages(gradient) == total
    assert copies.elements == [1]  # the sum


def test_a_run_interleaves_drops_gradients_and_has_no_garbage_collection() -> None:
    order: list[str] = []

    def step_of(name: str) -> measure.Step:
        def step() -> Tensor:
            assert INPUTS.x.grad is None
            assert INPUTS.w.grad is None
            assert not gc.isenabled()
            order.append(name)
            loss = (INPUTS.x.sum() + INPUTS.w.sum()) * 1
            loss.backward()
            return loss

        return step

    steps = {name: step_of(name) for name in "ab"}
    seconds = time_run(steps, INPUTS, 3)
    assert order == [name for round_ in range(3) for name in round_order(["a", "b"], round_)]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert gc.isenabled()
    # One round in any case, then as many as there is time for: the same for all.
    left = iter([True, False])
    seconds = time_run(steps, INPUTS, 9, go_on=lambda: next(left))
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_peer_that_raises_ends_the_run_unless_somebody_takes_its_error() -> None:
    def broken() -> Tensor:
        raise RuntimeError("out of order")

    def step() -> Tensor:
        loss = INPUTS.x.sum() + INPUTS.w.sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="out of order"):
        time_run({"a": step, "broken": broken}, INPUTS, 2)
    assert gc.isenabled()
    failed: list[str] = []
    steps = {"broken": broken, "a": step}
    seconds = time_run(steps, INPUTS, 3, failed=lambda name, error: failed.append(f"{name}: {error}"))
    assert failed == ["broken: out of order"]
    assert seconds.keys() == {"a"}
    assert len(seconds["a"]) == 3


def test_the_spinning_process_is_gone_afterwards_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen] = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(measure.subprocess, "Popen", Recorded)
    with measure.spinning(True):
        assert started[0].poll() is None
    assert started[0].poll() is not None

    with pytest.raises(KeyboardInterrupt), measure.spinning(True):
        raise KeyboardInterrupt
    assert started[1].poll() is not None

    with measure.spinning(False):
        assert len(started) == 2


_PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
print("started", flush=True)
time.sleep(60)
"""


_KEEP = """
import torch
from expface_kernels.machine import proc_bytes
from bench.measure import keeps_memory
assert keeps_memory()
block = torch.ones(2**24)
del block
print(proc_bytes("/proc/self/status", "VmRSS"), proc_bytes("/proc/self/status", "VmHWM"))
"""


@pytest.mark.skipif(measure.cannot_keep_memory() is not None, reason=str(measure.cannot_keep_memory()))
def test_malloc_keeps_what_is_freed_when_told() -> None:
    env = os.environ | measure.KEEP_MEMORY
    done = subprocess.run([sys.executable, "-c", _KEEP], capture_output=True, text=True, check=True, env=env)
    resident, highest = map(int, done.stdout.split())
    assert highest - resident < 2**24  # of the block's 2^26 bytes
