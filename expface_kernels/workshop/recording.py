"""The launches of a forward and backward, recorded without data, for the audit and the cost model.

They are the real launch code's, run on meta tensors: what it would do on a GPU of that architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from expface_kernels.backends.base import OpConfig
from expface_kernels.backends.triton import TOPK_CONFIG, TritonBackend, calls
from expface_kernels.backends.triton.backward import BackwardCall
from expface_kernels.backends.triton.forward import ForwardCall


@dataclass(frozen=True)
class Case:
    """A training step: B rows and C centres of D features as stored, and what the op is asked for.

    With `topk`, the search for so many nearest centres instead.
    """

    rows: int
    classes: int
    features: int
    x_dtype: torch.dtype = torch.bfloat16
    w_dtype: torch.dtype = torch.bfloat16
    scale: float = 64.0
    workspace_bytes: int = 0
    find_hardest: bool = False
    subset: bool = False
    product_dtype: torch.dtype | None = None
    sparse_grad: bool = False
    topk: int = 0

    @property
    def config(self) -> OpConfig:
        """What the op is told."""
        usable = TritonBackend().effective_workspace_bytes(self.workspace_bytes, self.scale)
        return OpConfig(self.scale, True, usable, self.find_hardest, self.product_dtype, self.sparse_grad)

    def run(self, arch: str, between: Callable[[], None] | None = None) -> None:
        """On meta tensors, `between` after the forward; watch `calls` to see what it does."""
        x = torch.empty(self.rows, self.features, dtype=self.x_dtype, device="meta")
        w = torch.empty(self.classes, self.features, dtype=self.w_dtype, device="meta")
        y = torch.empty(self.rows, dtype=torch.int64, device="meta")
        if self.topk:
            ForwardCall(x, w, y, None, TOPK_CONFIG, arch).topk(self.topk)
            return
        subset = torch.empty(self.classes, dtype=torch.int64, device="meta") if self.subset else None
        out = ForwardCall(x, w, y, subset, self.config, arch).forward()
        if between is not None:
            between()
        g, h = torch.empty_like(out.log_l), torch.empty_like(out.theta)
        BackwardCall(x, w, y, subset, self.config, arch).backward(out.log_l, out.workspace, g, h, True, True)


def launches(case: Case, arch: str) -> list[tuple[Any, int, dict[str, Any]]]:
    """(kernel, programs, arguments) of every launch, in order."""
    seen: list[tuple[Any, int, dict[str, Any]]] = []
    with calls.watched(lambda kernel, programs, arguments: seen.append((kernel, programs, arguments))):
        case.run(arch)
    return seen
