from __future__ import annotations

import dataclasses

import pytest

from bench import machine, memory
from bench.cases import LARGEST_WITH_LOGITS, MEMORY, TOY, Case
from tests.test_bench import strange_peers

STRANGE = strange_peers.__name__


@pytest.mark.skipif(memory.unavailable() is not None, reason=str(memory.unavailable()))
def test_a_known_allocation_is_measured() -> None:
    (found,) = memory.measure_all([f"{STRANGE}:WASTEFUL"], TOY)
    assert found.error is None
    assert found.extra_bytes is not None
    assert abs(found.extra_bytes - strange_peers.ALLOCATED_BYTES) < 4e6


@pytest.mark.skipif(memory.unavailable() is not None, reason=str(memory.unavailable()))
def test_gradients_and_inputs_are_no_extra_memory_and_logits_are() -> None:
    # Centres and their gradient take 51 MB each, a tile of logits 3 MB, all of the logits too.
    wide = Case(rows=8, classes=100_000, features=128)
    (ours,) = memory.measure_all(["ours@0"], wide)
    (forward,) = memory.measure_all(["ours@0"], dataclasses.replace(wide, backward=False))
    (eager,) = memory.measure_all(["eager"], Case(rows=512, classes=20_000, features=8))
    logits = 512 * 20_000 * 4
    assert ours.extra_bytes is not None
    assert forward.extra_bytes is not None
    assert eager.extra_bytes is not None
    assert 0 < ours.extra_bytes < 25e6
    assert 0 < forward.extra_bytes < 25e6
    assert 2 * logits < eager.extra_bytes < 12 * logits


@pytest.mark.skipif(memory.unavailable() is not None, reason=str(memory.unavailable()))
def test_a_process_that_fails_is_an_error_with_its_last_line() -> None:
    (found,) = memory.measure_all([f"{STRANGE}:RAISING"], TOY)
    assert found.extra_bytes is None
    assert found.error == "RuntimeError: out of order"


def test_whatever_a_peer_raises_here_is_an_error_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def extra_bytes(meter: memory.Meter, name: str, case: Case) -> int:
        if name == "eager":
            raise RuntimeError("out of\norder")
        return 7

    monkeypatch.setattr(memory, "unavailable", lambda device: None)
    monkeypatch.setattr(memory.Meter, "extra_bytes", extra_bytes)
    eager, ours = memory.measure_all(["eager", "ours"], TOY)
    assert (eager.extra_bytes, eager.error) == (None, "RuntimeError: out of order")
    assert (ours.extra_bytes, ours.error) == (7, None)


def test_a_peer_that_cannot_is_not_tried() -> None:
    (found,) = memory.measure_all([f"{STRANGE}:UNABLE"], TOY)
    assert (found.extra_bytes, found.error) == (None, None)
    assert found.why_not


@pytest.mark.parametrize("rows", [8, MEMORY.rows])
@pytest.mark.parametrize(("classes", "beyond"), [(LARGEST_WITH_LOGITS, False), (4_000_000, True)])
def test_only_what_holds_the_logits_of_all_classes_ends_at_a_million(
    rows: int, classes: int, beyond: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "unavailable", lambda device: None)
    monkeypatch.setattr(machine, "available_bytes", lambda device: None)
    monkeypatch.setattr(memory.Meter, "extra_bytes", lambda meter, name, case: 7)
    case = dataclasses.replace(MEMORY, rows=rows, classes=classes)
    names = [
        "ours",
        "ours@0",
        "ours_sampled",
        "partial_fc",
        "eager",
        f"{STRANGE}:WASTEFUL",
        f"{STRANGE}:SPARING",
    ]
    found = {entry.peer: entry for entry in memory.measure_all(names, case)}
    left_out = {name for name, entry in found.items() if entry.extra_bytes is None}
    assert left_out == ({"eager", f"{STRANGE}:WASTEFUL"} if beyond else set())
    assert all("the logits of all classes" in str(found[name].why_not) for name in left_out)


def test_another_system_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", memory.Path("/nowhere"))
    (found,) = memory.measure_all(["ours"], TOY)
    assert found.extra_bytes is None
    assert found.why_not is not None
    assert "Linux" in found.why_not
