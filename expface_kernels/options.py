"""What a loss is asked to compute, beside the tensors and the margin."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from expface_kernels import backends
from expface_kernels.checks import (
    check_embedding_grad_scale,
    check_flag,
    check_integer,
    check_number,
    check_reduction,
    check_sample_rate,
    check_scale,
    check_target_gradient,
    check_workspace_bytes,
)

DEFAULT_WORKSPACE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class LossOptions:
    """Holds the plain values that a loss is computed with, and checks them when they are set.

    On the ranks of a group all of them but the memory must be the same. TypeError, ValueError: naming the
    option, what was expected and what came.
    """

    scale: float = 64.0
    reduction: str = "mean"
    ignore_index: int = -100
    target_gradient: str = "exact"
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
    backend: str = "auto"
    negative_threshold: float | None = None
    """Classes other than the target whose cosine is above it have the logit 0 and no gradient."""
    sample_rate: float = 1.0
    """The share of the classes that takes part in a step of training."""
    sparse_grad: bool = False
    """The weight's gradient is sparse COO: the rows that took part."""
    embedding_grad_scale: float | None = None
    """What multiplies the embeddings' gradient; None is the number of ranks."""
    equal_rows: bool = False
    """All ranks bring as many rows, valid ones: nothing is exchanged about them."""

    def __post_init__(self) -> None:
        for name, as_builtin in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:  # numpy's numbers become Python's
                object.__setattr__(self, name, as_builtin(name, value))
        check_scale(self.scale)
        check_reduction(self.reduction)
        check_target_gradient(self.target_gradient)
        check_workspace_bytes(self.workspace_bytes)
        backends.check_name(self.backend)
        check_sample_rate(self.sample_rate)
        check_flag("sparse_grad", self.sparse_grad)
        check_embedding_grad_scale(self.embedding_grad_scale)
        check_flag("equal_rows", self.equal_rows)

    def grad_scale(self, ranks: int) -> float:
        """Return what multiplies the embeddings' gradient on so many ranks."""
        return float(ranks) if self.embedding_grad_scale is None else self.embedding_grad_scale

    def replace(self, **changed: Any) -> LossOptions:
        """Return the same with some of them changed, and checked."""
        return dataclasses.replace(self, **changed)


_NUMBERS: dict[str, Callable[[str, Any], Any]] = {
    "scale": check_number,
    "ignore_index": check_integer,
    "workspace_bytes": check_integer,
    "negative_threshold": check_number,
    "sample_rate": check_number,
    "embedding_grad_scale": check_number,
}
_OPTIONAL = ("negative_threshold", "embedding_grad_scale")
