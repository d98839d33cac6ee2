"""What an optimizer of torch holds and moves for each byte of its parameter: found by running one step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expface_kernels.workshop.traffic import Moved, PeakMemory

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "adam": ("Adam", {"lr": 1e-3}),
    "adamw": ("AdamW", {"lr": 1e-3, "weight_decay": 0.0}),
    "adagrad": ("Adagrad", {"lr": 1e-2}),
    "rmsprop": ("RMSprop", {"lr": 1e-2}),
    "sparse-adam": ("SparseAdam", {"lr": 1e-3}),
}
"""Name → class of torch.optim and its arguments."""
SPARSE_TEMPORARY = {"sgd": 0.0, "adagrad": 3.0, "sparse-adam": 6.0}
"""Those that take sparse gradients, with what they hold for each of its bytes at their peak, as measured."""
FUSED = ("sgd", "momentum", "adam", "adamw", "adagrad")
"""Those that torch has a single kernel for, `fused=True`."""
# What it moves is counted as of its dense sibling over the rows that take part.
_DENSE = {"sparse-adam": "adam"}
SIZE = 128
STEPS = 2
"""The first makes the state."""


@dataclass(frozen=True)
class Footprint:
    """In bytes for each byte of the parameter."""

    state: float
    temporary: float
    """At the peak of a step, beside parameter, gradient and state."""
    moved: float
    """Read and written by a step."""


@functools.cache
def footprint(name: str, dtype: torch.dtype, way: str, weight_decay: float = 0.0) -> Footprint:
    """Of an optimizer's step over a dense gradient. way: "single", "foreach" or "fused", as torch has it."""
    kind, arguments = OPTIMIZERS[_DENSE.get(name, name)]
    arguments = {**arguments, "foreach": way == "foreach", "weight_decay": weight_decay}
    if way == "fused":
        arguments = {**arguments, "foreach": None, "fused": True}
    parameter = torch.nn.Parameter(torch.ones(SIZE, SIZE, dtype=dtype))
    optimizer = getattr(torch.optim, kind)([parameter], **arguments)
    parameter.grad = torch.ones_like(parameter)
    temporary = moved = 0.0
    for _ in range(STEPS):
        before = _state_bytes(optimizer, parameter)
        memory, traffic = PeakMemory(), Moved()
        with memory, traffic:
            optimizer.step()
        made = _state_bytes(optimizer, parameter) - before
        temporary, moved = max(temporary, memory.peak - made), float(traffic.bytes)
    size = parameter.nbytes
    # Step counters and the like are a few bytes, not a share of the parameter.
    return Footprint(*(round(value / size, 2) for value in (before, temporary, moved)))


def _state_bytes(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    values = optimizer.state[parameter].values()
    return sum(v.nbytes for v in values if isinstance(v, Tensor) and v.numel() == parameter.numel())
