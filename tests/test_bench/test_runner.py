"""The runner: what a budget leaves out, what a stop keeps, what does not fit, with peers on a fake clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import machine, memory, runner
from bench.cases import Case, Inputs
from bench.peers.base import Peer, Step
from bench.records import BYTES, FAILED, MEASURED, NO_ROOM, NO_TIME, SECONDS, SKIPPED, Gate, Run, Writer, load
from bench.runner import Plan, Runner, Shape
from tests.test_bench.made_up import HEADER

BASE = Case(rows=4, classes=100, features=8)
PER_FLOP = 1e-3


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Timed(Peer):
    """Takes so many fake seconds a FLOP; does what `act` does."""

    def __init__(self, name: str, clock: FakeClock, per_flop: float) -> None:
        self.name, self.clock, self.per_flop = name, clock, per_flop
        self.act: Callable[[Case], None] = lambda case: None
        self.held = 0

    def label(self, case: Case) -> str:
        return f"{self.name} (exact)"

    def extra_bytes(self, case: Case) -> int:
        return 1000 * case.classes

    def held_bytes(self, case: Case) -> int:
        return self.held

    def step(self, inputs: Inputs) -> Step:
        def step() -> Tensor:
            self.clock.now += self.per_flop * inputs.case.flops
            self.act(inputs.case)
            if inputs.case.backward:
                inputs.x.grad, inputs.w.grad = torch.zeros_like(inputs.x), torch.zeros_like(inputs.w)
            return torch.zeros(())

        return step


class Bench:
    """Runs a plan over timed peers; everything but the runner itself is replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.clock, self.path = FakeClock(), path
        self.peers: dict[str, Timed] = {}
        monkeypatch.setattr("bench.peers.get", self.peers.__getitem__)
        monkeypatch.setattr(runner, "check_all", self._gates)
        monkeypatch.setattr(memory, "extra_bytes", self._extra_bytes)
        monkeypatch.setattr(memory, "unavailable", lambda device: None)

    def add(self, name: str, per_flop: float = PER_FLOP) -> Timed:
        self.peers[name] = Timed(name, self.clock, per_flop)
        return self.peers[name]

    def _gates(self, names: list[str], case: Case, *, tiled: Case | None) -> tuple[Gate, ...]:
        return tuple(
            Gate(name, name, (), 1e-5, name != "wrong", None, case.backward, case.dtype) for name in names
        )

    def _extra_bytes(self, name: str, case: Case) -> int:
        self.clock.now += 2 * self.peers[name].per_flop * case.flops
        return case.classes

    def run(self, classes: list[int], seconds: float = 1e6, rounds: int = 3, runs: int = 1) -> Run:
        cases = [dataclasses.replace(BASE, classes=count) for count in classes]
        shapes = tuple(Shape(case, tuple(self.peers)) for case in cases)
        writer = Writer(self.path, HEADER)
        found = Runner(Plan(shapes, rounds, runs, seconds), writer, self.clock).run()
        assert load(self.path) == found
        return found


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return Bench(monkeypatch, tmp_path / "run.jsonl")


def _statuses(run: Run, what: str, classes: int) -> dict[str, str]:
    return {n: m.status for n, m in run.at(dataclasses.replace(BASE, classes=classes), what).items()}


def test_with_time_enough_everything_is_measured(bench: Bench) -> None:
    bench.add("a")
    bench.add("b", 2 * PER_FLOP)
    found = bench.run([10, 100], runs=2)
    assert found.complete
    assert found.ok
    assert len(found.measurements) == 2 * 2 * 3  # shapes, peers, two runs and memory
    for m in found.measurements:
        rate = bench.peers[m.peer].per_flop
        assert m.values == pytest.approx([rate * m.case.flops] * 3 if m.what == SECONDS else [m.case.classes])
    assert found.took_seconds == pytest.approx(bench.clock.now - 100)


@pytest.mark.parametrize("seconds", [120, 300, 1000])
def test_the_budget_is_kept_whatever_the_sizes(bench: Bench, seconds: float) -> None:
    for i in range(4):
        bench.add(f"peer{i}", (i + 1) * PER_FLOP)
    found = bench.run([10, 30, 100, 300, 1000], seconds)
    assert found.took_seconds is not None
    assert found.took_seconds <= 1.05 * seconds
    assert any(m.values for m in found.measurements)
    for case in found.cases():  # whoever is timed at a shape has as many rounds as the others
        assert len({len(m.values) for m in found.at(case).values() if m.values}) <= 1


def test_a_slow_peer_is_left_out_with_its_reason_and_the_fast_one_stays(bench: Bench) -> None:
    bench.add("fast", PER_FLOP)
    bench.add("slow", 100 * PER_FLOP)
    # At 1000 classes a step of the fast one takes 192 s, of the slow one 100 times that.
    found = bench.run([2, 1000], 4000)
    assert _statuses(found, SECONDS, 1000) == {"fast": MEASURED, "slow": NO_TIME}
    assert _statuses(found, BYTES, 1000)["slow"] == NO_TIME
    slow = found.at(dataclasses.replace(BASE, classes=1000))["slow"]
    assert slow.why == "no time was left for a step of about 2e+04 s"
    assert found.ok


@pytest.mark.parametrize(("name", "error"), [("first", 1), ("warm-up", 2), ("timed", 4), ("second run", 6)])
def test_a_peer_that_raises_costs_nobody_else_a_number(bench: Bench, name: str, error: int) -> None:
    steps = iter(range(1, 100))

    def act(case: Case) -> None:
        if next(steps) == error:
            raise RuntimeError("out of\norder")

    bench.add("a").act = act
    bench.add("b")
    found = bench.run([100], runs=2)
    assert not found.ok
    assert _statuses(found, SECONDS, 100) == {"a": FAILED, "b": MEASURED}
    assert _statuses(found, BYTES, 100) == {"a": FAILED, "b": MEASURED}
    rows = [m for m in found.measurements if m.what == SECONDS]
    assert [(m.peer, m.why) for m in rows if not m.values] == [("a", "RuntimeError: out of order")]
    assert [(m.peer, m.run, len(m.values)) for m in rows if m.values] == [("b", 1, 3), ("b", 2, 3)]


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("no"), RuntimeError("can't allocate memory: 1 bytes")]
)
def test_a_peer_that_runs_out_of_memory_has_no_room_and_did_not_fail(bench: Bench, error: Exception) -> None:
    def act(case: Case) -> None:
        raise error

    bench.add("a").act = act
    found = bench.run([100])
    assert _statuses(found, SECONDS, 100) == {"a": NO_ROOM}
    assert found.ok


def test_what_does_not_fit_says_what_it_needs_and_what_is_crowded_is_timed_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: 200_000)
    bench.add("a").held = 100_000
    bench.add("b")
    turns = []
    time_run = runner.time_run

    def noted(steps: dict[str, Step], *args: object, **options: object) -> dict[str, list[float]]:
        turns.append(set(steps))
        return time_run(steps, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "time_run", noted)
    found = bench.run([100, 1000])
    assert turns == [{"a"}, {"b"}]
    assert _statuses(found, SECONDS, 1000) == {"a": NO_ROOM, "b": NO_ROOM}
    needed = found.at(dataclasses.replace(BASE, classes=1000))["a"].needs_bytes
    assert needed == 1000 * 1000 + 2 * (4 + 1000) * 8 * 4


def test_a_wrong_peer_is_not_measured(bench: Bench) -> None:
    bench.add("wrong")
    bench.add("right")
    found = bench.run([100])
    assert not found.ok
    assert {m.peer for m in found.measurements if m.values} == {"right"}


def test_a_run_that_is_stopped_keeps_what_it_had(bench: Bench) -> None:
    def act(case: Case) -> None:
        if case.classes == 1000:
            raise KeyboardInterrupt

    bench.add("a").act = act
    with pytest.raises(KeyboardInterrupt):
        bench.run([10, 100, 1000])
    found = load(bench.path)
    assert not found.complete
    assert [(m.what, m.case.classes) for m in found.measurements] == [
        (SECONDS, 10), (BYTES, 10), (SECONDS, 100), (BYTES, 100),
    ]  # fmt: skip


def test_memory_that_cannot_be_measured_here_is_no_failure(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "unavailable", lambda device: "not here")
    bench.add("a")
    found = bench.run([100])
    assert _statuses(found, BYTES, 100) == {"a": SKIPPED}
    assert found.ok


@pytest.mark.parametrize(("classes", "beyond"), [(1_000_000, False), (4_000_000, True)])
def test_where_nothing_is_timed_what_holds_all_logits_ends_at_a_million(
    classes: int, beyond: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda device: None)
    monkeypatch.setattr(memory, "extra_bytes", lambda name, case: 7)
    monkeypatch.setattr(memory, "unavailable", lambda device: None)
    monkeypatch.setattr(
        runner, "check_all", lambda names, case, tiled: [Gate(name, name, (), 1e-5, True) for name in names]
    )
    names = ("ours", "ours@0", "ours_sampled", "partial_fc", "eager")
    shape = Shape(dataclasses.replace(BASE, rows=128, classes=classes), names, timed=False)
    found = Runner(Plan((shape,), 1), Writer(None, HEADER)).run()
    assert {m.peer for m in found.measurements if m.status == SKIPPED} == ({"eager"} if beyond else set())
    assert {m.peer for m in found.measurements if m.values} >= {"ours", "ours_sampled", "partial_fc"}
