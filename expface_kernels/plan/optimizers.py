"""What torch's optimizers hold and move, as multiples of the parameter's bytes.

The factors were measured with a step of each; the tests measure them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
"""Those that take sparse gradients → what their update holds at its peak, as a multiple of the gradient."""
FUSED = ("sgd", "momentum", "adam", "adamw", "adagrad")
"""Those for which torch has a single kernel, `fused=True`."""


@dataclass(frozen=True)
class Footprint:
    """What an update holds and moves, in bytes for each byte of the parameter."""

    state: float
    temporary: float
    """At the peak of the update, beside parameter, gradient and state."""
    moved: float
    """Read and written."""


# Name → state; then temporaries without and with weight decay and what is moved without it, for each way.
_Way = tuple[int, int, int]
_FACTORS: dict[str, tuple[int, dict[str, _Way]]] = {
    "sgd": (0, {"single": (0, 1, 3), "foreach": (0, 1, 3)}),
    "momentum": (1, {"single": (0, 1, 8), "foreach": (0, 1, 8)}),
    "adam": (2, {"single": (2, 3, 19), "foreach": (1, 1, 19)}),
    "adamw": (2, {"single": (2, 2, 19), "foreach": (1, 1, 19)}),
    "adagrad": (1, {"single": (1, 2, 12), "foreach": (2, 2, 14)}),
    "rmsprop": (1, {"single": (1, 2, 14), "foreach": (1, 2, 14)}),
}


def footprint(name: str, way: str, weight_decay: float = 0.0) -> Footprint:
    """Return what an update over a dense gradient takes; way is "single", "foreach" or "fused", as in torch.

    Sparse Adam is taken for Adam over the rows that take part.
    """
    name = "adam" if name == "sparse-adam" else name
    state, ways = _FACTORS[name]
    if way == "fused":  # parameter, gradient and state are read, parameter and state written
        return Footprint(state, 0, 3 + 2 * state)
    plain, decayed, moved = ways[way]
    if not weight_decay:
        return Footprint(state, plain, moved)
    # AdamW scales the parameter in place, all others add to a copy of the gradient.
    return Footprint(state, decayed, moved + (2 if name == "adamw" else 3))
