"""Apple's cut-cross-entropy on normalised inputs: without a margin, 16 bit only."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Case, Inputs
from bench.peers.base import GPU_ONLY, NO_MARGIN, Peer, Step, mode, not_installed, step_of
from bench.peers.normalised import normalising_bytes, operands
from expface_kernels.machine import version_of

PACKAGE = "cut-cross-entropy"


class CutCrossEntropy(Peer):
    """`cce` leaves out gradients below a fixed threshold, `cce_exact` none."""

    devices, margins = GPU_ONLY, NO_MARGIN
    compiles = True  # Triton

    def __init__(self, implementation: str) -> None:
        self.name = self.implementation = implementation

    def label(self, case: Case) -> str:
        version = version_of(PACKAGE)
        return f"{PACKAGE} {version}, {self.implementation}, no chunks ({mode(self, case)})"

    def missing(self, case: Case) -> str | None:
        if reason := not_installed("cut_cross_entropy", PACKAGE):
            return reason
        if case.product_dtype not in (torch.bfloat16, torch.float16):
            return f"its backward takes bfloat16 and float16, not {case.product_dtype}"
        return None

    def extra_bytes(self, case: Case) -> int:
        return normalising_bytes(case)

    def step(self, inputs: Inputs) -> Step:
        from cut_cross_entropy import linear_cross_entropy

        def forward() -> Tensor:
            rows, centres = operands(inputs)
            loss: Tensor = linear_cross_entropy(rows, centres, inputs.labels, impl=self.implementation)
            return loss

        return step_of(inputs.case, forward)
