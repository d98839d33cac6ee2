"""A sanitizer for Triton's interpreter, as a pytest plugin: `TRITON_INTERPRET=1 pytest -p tests.sanitizer`.

The interpreter runs programs one after the other on ordinary memory, so it neither faults where a GPU would
nor mixes up what a GPU would run at once. The sanitizer sees every load and store of a launch and raises for

- an access that is not inside the extent of one argument, as the view that was passed;
- an address that two programs store to, or that one stores to twice: nothing orders the two;
- an address that one program loads and another one stores to: the order of programs is not defined.

Memory that torch allocates holds NaN, or the largest integer, until it is written; a test's numbers show
who reads it. An access is known by its first byte: two of different width that overlap are seen as different.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from expface_kernels.backends import triton
from expface_kernels.backends.triton import calls

MANY = -1
"""Stands for more than one program."""
COLLISIONS_ARE_FAULTS = True
"""Turned off by a test whose input makes addresses meet where nobody uses the result; bounds still hold."""


class SanitizerError(AssertionError):
    """A kernel touches memory that it may not touch."""


class Shadow:
    """Who touched each element of a stretch of memory: 0 for none, a program's number from 1 on, or MANY.

    Pages that no program touches cost nothing: the arrays come zeroed from the operating system.
    """

    def __init__(self, first: int, last: int, width: int) -> None:
        self.first, self.last, self.width = first, last, width
        self.loaded, self.stored = (np.zeros(-(-(last - first) // width), np.int32) for _ in range(2))

    def load(self, addresses: np.ndarray, program: int) -> Iterator[tuple[str, int]]:
        """Note the loads, and yield what is wrong with how many of them."""
        places = (addresses - self.first) // self.width
        storing, loading = self.stored[places], self.loaded[places]
        self.loaded[places] = np.where((loading == 0) | (loading == program), program, MANY)
        yield "loads of what another program stores", np.count_nonzero((storing != 0) & (storing != program))

    def store(self, addresses: np.ndarray, program: int) -> Iterator[tuple[str, int]]:
        """Note the stores, and yield what is wrong with how many of them."""
        places = (addresses - self.first) // self.width
        storing, loading = self.stored[places], self.loaded[places]
        self.stored[places] = program
        again = places.size - np.unique(places).size + np.count_nonzero(storing == program)
        yield "stores of one program to an address that it has stored to", again
        yield "stores of two programs to one address", np.count_nonzero((storing != 0) & (storing != program))
        yield "stores to what another program loads", np.count_nonzero((loading != 0) & (loading != program))


@dataclass
class Argument:
    """A tensor's name and extent in bytes, from the first element of the view to the end of its last."""

    name: str
    first: int
    last: int
    width: int

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Argument:
        reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        first, width = tensor.data_ptr(), tensor.element_size()
        return cls(name, first, first + reach * width, width)


class Launch:
    """The memory that one launch may touch, and who touched what of it."""

    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.kernel = kernel
        self.faults: Counter[str] = Counter()
        # A tensor descriptor stands for its base.
        tensors = {name: getattr(value, "base", value) for name, value in arguments.items()}
        self.arguments = [
            Argument.of(name, t) for name, t in tensors.items() if isinstance(t, Tensor) and t.numel()
        ]
        self.shadows = _shadows(self.arguments)

    def touch(self, kind: str, addresses: np.ndarray, width: int, program: int) -> None:
        """Check an access (kind "load" or "store") before it is made."""
        first, last = int(addresses.min()), int(addresses.max()) + width
        if not any(a.first <= first and last <= a.last for a in self.arguments):
            self._refuse(kind, addresses, width)
        shadow = next(s for s in self.shadows if s.first <= first < s.last)
        for fault, count in getattr(shadow, kind)(addresses, program):
            self.faults[fault] += count

    def finish(self) -> None:
        """Raise for what only shows from several accesses."""
        if COLLISIONS_ARE_FAULTS and (faults := +self.faults):
            what = ", ".join(f"{count} {fault}" for fault, count in faults.items())
            raise SanitizerError(f"{self.kernel}: {what}")

    def _refuse(self, kind: str, addresses: np.ndarray, width: int) -> None:
        """Tell of the argument that has most of the addresses, or lies nearest to them."""
        outside = {a.name: (addresses < a.first) | (addresses + width > a.last) for a in self.arguments}
        middle = int(np.median(addresses))
        nearest = min(
            self.arguments,
            key=lambda a: (outside[a.name].sum(), max(a.first - middle, middle - a.last)),
            default=None,
        )
        if nearest is None:
            raise SanitizerError(f"{self.kernel}: a {kind}, but no argument has an element")
        wrong = addresses[outside[nearest.name]] - nearest.first
        raise SanitizerError(
            f"{self.kernel}: {wrong.size} of {addresses.size} addresses of a {kind} are outside "
            f"{nearest.name}, from byte {wrong.min()} to {wrong.max()} of {nearest.last - nearest.first}"
        )


def _shadows(arguments: list[Argument]) -> list[Shadow]:
    """One for each stretch of memory: arguments that overlap share theirs."""
    merged: list[tuple[int, int, int]] = []
    for a in sorted(arguments, key=lambda a: a.first):
        if merged and a.first < merged[-1][1]:
            first, last, width = merged[-1]
            merged[-1] = (first, max(last, a.last), min(width, a.width))
        else:
            merged.append((a.first, a.last, a.width))
    return [Shadow(*stretch) for stretch in merged]


@contextlib.contextmanager
def sanitized(counts: Counter[str]) -> Iterator[None]:
    """Watch every launch, and poison every allocation; counts launches, loads and stores."""
    from triton.runtime import interpreter

    current: Launch | None = None
    run, builder = calls.run, type(interpreter.interpreter_builder)

    def watched_run(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        nonlocal current
        current = launch = Launch(kernel.__name__, arguments)
        counts["launches"] += 1
        try:
            run(kernel, programs, arguments)
        except Exception as error:
            first: BaseException = error
            while first.__cause__ is not None:  # every device function wraps what is raised in it
                first = first.__cause__
            if isinstance(first, SanitizerError):
                raise first from None
            raise
        finally:
            current = None
        launch.finish()

    def watched(kind: str, access: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def accessed(self: Any, pointers: Any, *rest: Any, **named: Any) -> Any:
            addresses = pointers.data[np.broadcast_to(rest[mask_at].data.astype(bool), pointers.data.shape)]
            if current is not None and addresses.size:
                width = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
                current.touch(kind, addresses.astype(np.int64), width, self.grid_idx[0] + 1)
                counts[f"{kind}s"] += addresses.size
            return access(self, pointers, *rest, **named)

        return accessed

    def refused(*_: Any, **__: Any) -> None:
        raise SanitizerError("an atomic operation, which the sanitizer does not follow")

    load, store = builder.create_masked_load, builder.create_masked_store
    changes = {
        "create_masked_load": watched("load", load, 0),
        "create_masked_store": watched("store", store, 1),
        "create_atomic_rmw": refused,
        "create_atomic_cas": refused,
    }
    with (
        mock.patch.multiple(builder, **changes),
        mock.patch.object(calls, "run", watched_run),
        _poisoned_memory(),
    ):
        yield


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Let torch fill what it allocates: it does so where algorithms are to be deterministic."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


_session = contextlib.ExitStack()
_seen: Counter[str] = Counter()


def pytest_configure() -> None:
    if not triton.interpreted():
        raise pytest.UsageError("tests.sanitizer: watches Triton's interpreter, so set TRITON_INTERPRET=1")
    _session.enter_context(sanitized(_seen))


def pytest_unconfigure() -> None:
    _session.close()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of xdist's processes
        session.config.workeroutput["sanitizer"] = dict(_seen)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _seen.update(getattr(node, "workeroutput", {}).get("sanitizer", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counted = ", ".join(f"{_seen[what]:,} {what}" for what in ("launches", "loads", "stores"))
    terminalreporter.write_line(f"sanitizer: checked {counted}")
