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
HOW = {"static": "", "autotuned": " with max-autotune", "dynamic": ", dynamic shapes"}
"""How, and what labels say of it: each shape anew, in default mode or with max-autotune; all at once."""


def no_compiler() -> str | None:
    """Why torch.compile cannot work here; None where it may."""
    if any(shutil.which(compiler) for compiler in COMPILERS):
        return None
    return "torch.compile needs a C++ compiler, none is on the path"


def compiled(function: Callable[..., Tensor], how: str) -> Callable[..., Tensor]:
    """As one graph; `how` is a name of HOW."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, SHAPES_COMPILED)
    made: Callable[..., Tensor] = torch.compile(
        function,
        fullgraph=True,
        dynamic=how == "dynamic",
        mode="max-autotune" if how == "autotuned" else "default",
    )
    return made


class Compiled(Peer):
    """Static shapes suit the compiler best; dynamic ones save a sweep minutes of compiling.

    `how` is a name of HOW.
    """

    compiles = True
    loads = ("torch._dynamo",)

    def __init__(self, how: str) -> None:
        self.how = how
        self.name = "compiled" if how == "static" else f"compiled_{how}"

    def label(self, case: Case) -> str:
        return f"torch.compile of the eager head{HOW[self.how]} ({mode(self, case)})"

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
        loss = compiled(eager.margin_loss, self.how)
        return step_of(
            case,
            lambda: loss(inputs.x, inputs.w, inputs.labels, margin, case.scale, case.target_gradient),
        )
