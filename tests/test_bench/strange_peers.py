"""Peers that do something wrong or known, for `--peers tests.test_bench.strange_peers:NAME`."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bench.cases import Case, Inputs
from bench.gate import GATE_CLASSES
from bench.peers.base import Step
from bench.peers.heads import Eager

ALLOCATED_BYTES = 64 * 2**20


class Named(Eager):
    """The eager head under another name."""

    def __init__(self, name: str) -> None:
        self.name = f"{__name__}:{name}"

    def label(self, case: Case) -> str:
        return self.name


class Shifted(Named):
    """Every row has the label of the next class."""

    def step(self, inputs: Inputs) -> Step:
        return super().step(dataclasses.replace(inputs, labels=(inputs.labels + 1) % inputs.case.classes))


class Wasteful(Named):
    """Holds ALLOCATED_BYTES, written, through every step."""

    def step(self, inputs: Inputs) -> Step:
        inner = super().step(inputs)

        def step() -> Tensor:
            held = torch.ones(ALLOCATED_BYTES, dtype=torch.uint8)
            loss = inner()
            assert held[-1] == 1
            return loss

        return step


class WithoutWeightGradient(Named):
    def step(self, inputs: Inputs) -> Step:
        inner = super().step(inputs)

        def step() -> Tensor:
            loss = inner()
            inputs.w.grad = None
            return loss

        return step


class Raising(Named):
    def step(self, inputs: Inputs) -> Step:
        raise RuntimeError("out of order")


class WrongLater(Named):
    """Another loss at shapes larger than the gate's."""

    def step(self, inputs: Inputs) -> Step:
        inner = super().step(inputs)
        return lambda: inner() * (1.001 if inputs.case.classes > GATE_CLASSES else 1.0)


class Unable(Named):
    def unavailable(self, case: Case) -> str | None:
        return "it is Sunday"


SHIFTED = Shifted("SHIFTED")
WASTEFUL = Wasteful("WASTEFUL")
WITHOUT_WEIGHT_GRADIENT = WithoutWeightGradient("WITHOUT_WEIGHT_GRADIENT")
RAISING = Raising("RAISING")
WRONG_LATER = WrongLater("WRONG_LATER")
UNABLE = Unable("UNABLE")
