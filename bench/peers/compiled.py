"""torch.compile of the very function that the eager peer runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Inputs
from bench.peers import eager
from bench.peers.base import Peer, Step, mode, step_of

COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")
# A sweep has more shapes than torch would compile one function for.
SHAPES_COMPILED = 100


def no_compiler() -> str | None:
    """Why torch.compile cannot work here; None where it may."""
    if any(shutil.which(compiler) for compiler in COMPILERS):
        return None
    return "torch.compile needs a C++ compiler, none is on the path"


def compiled(function: Callable[..., Tensor], *, dynamic: bool) -> Callable[..., Tensor]:
    """In default mode, as one graph; for each shape anew, or once for all (`dynamic`)."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, SHAPES_COMPILED)
    made: Callable[..., Tensor] = torch.compile(function, fullgraph=True, dynamic=dynamic)
    return made


class Compiled(Peer):
    """Static shapes suit the compiler best; dynamic ones save a sweep minutes of compiling."""

    compiles = True
    loads = ("torch._dynamo",)

    def __init__(self, *, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.name = "compiled_dynamic" if dynamic else "compiled"

    def label(self, case: Case) -> str:
        shapes = ", dynamic shapes" if self.dynamic else ""
        return f"torch.compile of the eager head{shapes} ({mode(self, case)})"

    def missing(self, case: Case) -> str | None:
        return no_compiler()

    def extra_bytes(self, case: Case) -> int:
        """As measured; the forward alone as eager."""
        if not case.backward:
            return eager.extra_bytes(case)
        logits, centres = case.rows * case.taking_part, case.taking_part * case.features
        numbers = max(4.25 * logits, 1.1 * centres + 2 * logits)
        return int(numbers) * max(case.itemsize, 4)

    def step(self, inputs: Inputs) -> Step:
        case, margin = inputs.case, inputs.case.margin_function()
        loss = compiled(eager.margin_loss, dynamic=self.dynamic)
        return step_of(
            case,
            lambda: loss(inputs.x, inputs.w, inputs.labels, margin, case.scale, case.target_gradient),
        )
