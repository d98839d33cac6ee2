"""torch.compile of the very function that the eager peer runs."""

from __future__ import annotations

import os
import shutil

import torch
from torch import Tensor

from bench.cases import Case, Inputs
from bench.peers import eager
from bench.peers.base import Step, memory_reason

COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")


class Compiled:
    """Default mode, one graph, static shapes: what suits the compiler best."""

    name = "compiled"
    compiles = True

    def label(self, case: Case) -> str:
        return f"torch.compile of it ({case.target_gradient})"

    def why_not(self, case: Case) -> str | None:
        if not any(shutil.which(compiler) for compiler in COMPILERS):
            return "torch.compile needs a C++ compiler, none is on the path"
        return memory_reason(case, eager.extra_bytes(case))

    def step(self, inputs: Inputs) -> Step:
        case, margin = inputs.case, inputs.case.margin_function()
        compiled = torch.compile(eager.margin_loss, fullgraph=True, dynamic=False)

        def step() -> Tensor:
            loss: Tensor = compiled(
                inputs.x, inputs.w, inputs.labels, margin, case.scale, case.target_gradient
            )
            loss.backward()
            return loss

        return step
