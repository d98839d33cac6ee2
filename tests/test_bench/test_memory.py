"""Peak memory of a step: an allocation is seen, inputs and gradients are not, a failure is told."""

from __future__ import annotations

import dataclasses

import pytest

from bench import memory
from bench.cases import Case
from bench.memory import MeasurementError, extra_bytes
from bench.plans import TOY
from tests.test_bench import strange_peers

STRANGE = strange_peers.__name__
pytestmark = pytest.mark.skipif(memory.unavailable() is not None, reason=str(memory.unavailable()))


def test_a_known_allocation_is_measured() -> None:
    assert abs(extra_bytes(f"{STRANGE}:WASTEFUL", TOY) - strange_peers.ALLOCATED_BYTES) < 4e6


def test_gradients_and_inputs_are_no_extra_memory_and_logits_are() -> None:
    # Centers and their gradient take 51 MB each, a tile of logits 3 MB, all of the logits too.
    wide = Case(rows=8, classes=100_000, features=128)
    logits = 512 * 20_000 * 4
    assert 0 < extra_bytes("ours@0", wide) < 25e6
    assert 0 < extra_bytes("ours@0", dataclasses.replace(wide, backward=False)) < 25e6
    assert 2 * logits < extra_bytes("eager", Case(rows=512, classes=20_000, features=8)) < 12 * logits


def test_a_process_that_fails_says_why_in_its_last_line() -> None:
    with pytest.raises(MeasurementError, match=r"^RuntimeError: out of order$"):
        extra_bytes(f"{STRANGE}:RAISING", TOY)


def test_a_process_that_is_killed_says_so() -> None:
    with pytest.raises(MeasurementError, match="killed by signal 9"):
        memory.output_of_child(["-c", "import os; os.kill(os.getpid(), 9)"])
