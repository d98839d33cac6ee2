"""Peers that do something wrong or known, for `--peers tests.test_bench.strange_peers:NAME`."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from bench.cases import Case, Inputs
from bench.gate import GATE_CLASSES
from bench.measure import WARM_UPS
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


class Sparing(Named):
    """Says that it holds nothing."""

    def extra_bytes(self, case: Case) -> int:
        return 0


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


class RaisingLater(Named):
    """Raises at shapes larger than the gate's, in the step of this number, from 1 on."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__(name)
        self.number = number

    def step(self, inputs: Inputs) -> Step:
        inner, count = super().step(inputs), itertools.count(1)

        def step() -> Tensor:
            if inputs.case.classes > GATE_CLASSES and next(count) == self.number:
                raise RuntimeError("out of order\nat this size")
            return inner()

        return step


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
SPARING = Sparing("SPARING")
WITHOUT_WEIGHT_GRADIENT = WithoutWeightGradient("WITHOUT_WEIGHT_GRADIENT")
RAISING = Raising("RAISING")
RAISING_AT_FIRST = RaisingLater("RAISING_AT_FIRST", 1)
RAISING_WHEN_TIMED = RaisingLater("RAISING_WHEN_TIMED", WARM_UPS + 3)
"""In the second of two runs of two rounds, or the third round of the first."""
WRONG_LATER = WrongLater("WRONG_LATER")
UNABLE = Unable("UNABLE")
