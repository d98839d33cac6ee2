"""This package's head, with a workspace of its default size or another."""

from __future__ import annotations

from torch import Tensor

from bench.cases import Case, Inputs
from bench.peers.base import Step, memory_reason
from expface_kernels import backends, margin_cross_entropy
from expface_kernels.functional import DEFAULT_WORKSPACE_BYTES


class Ours:
    """`margin_cross_entropy`. "ours" has the default workspace, "ours@0" none, "ours@N" one of N bytes."""

    compiles = False

    def __init__(self, workspace_bytes: int | None = None) -> None:
        self.name = "ours" if workspace_bytes is None else f"ours@{workspace_bytes}"
        self.workspace_bytes = DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes

    def label(self, case: Case) -> str:
        return f"ours, workspace {self.workspace_bytes / 2**20:.4g} MiB ({case.target_gradient})"

    def why_not(self, case: Case) -> str | None:
        state = backends.available()["cpu"]
        if state != "ok":
            return state
        exponentials = case.rows * case.classes * case.itemsize
        return memory_reason(case, min(self.workspace_bytes, exponentials) + 4 * case.classes)

    def step(self, inputs: Inputs) -> Step:
        case, margin = inputs.case, inputs.case.margin_function()

        def step() -> Tensor:
            loss = margin_cross_entropy(
                inputs.x,
                inputs.w,
                inputs.labels,
                margin,
                scale=case.scale,
                target_gradient=case.target_gradient,
                workspace_bytes=self.workspace_bytes,
            )
            assert isinstance(loss, Tensor)
            loss.backward()
            return loss

        return step
