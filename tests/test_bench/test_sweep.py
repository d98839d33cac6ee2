"""What a budget leaves out, what a stop keeps, what does not fit: peers that take a fake clock's time."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import machine, memory, plans, show, sweep
from bench.cases import Case, Inputs
from bench.peers.base import Peer, Step
from bench.sweep import Plan, Run, Stop
from bench.sweep_report import print_sweep
from bench.sweep_result import Axis, Sweep
from tests.test_bench.test_budget import FakeClock

BASE = Case(rows=4, classes=100, features=8)
PER_FLOP = 1e-3


class Timed(Peer):
    """Takes so many fake seconds a FLOP, and some more for its first step; does what `act` does."""

    def __init__(self, name: str, clock: FakeClock, per_flop: float = PER_FLOP, once: float = 0.0) -> None:
        self.name = name
        self.clock, self.per_flop, self.once = clock, per_flop, once
        self.compiles = once > 0
        self.act: Callable[[Case], None] = lambda case: None
        self.steps: list[Case] = []

    def label(self, case: Case) -> str:
        return f"{self.name} (exact)"

    def extra_bytes(self, case: Case) -> int:
        return 1000 * case.classes

    def step(self, inputs: Inputs) -> Step:
        self.clock.now += self.once

        def step() -> Tensor:
            self.clock.now += self.per_flop * inputs.case.flops
            self.steps.append(inputs.case)
            self.act(inputs.case)
            if inputs.case.backward:
                inputs.x.grad, inputs.w.grad = torch.zeros_like(inputs.x), torch.zeros_like(inputs.w)
            return torch.zeros(())

        return step


class Sweeper:
    """Runs a plan over timed peers; everything but the sweep itself is replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = FakeClock()
        self.peers: dict[str, Timed] = {}
        self.saved: list[Sweep] = []
        monkeypatch.setattr("bench.peers.get", self.peers.__getitem__)
        monkeypatch.setattr(sweep, "check_all", self._gates)
        monkeypatch.setattr(memory.Meter, "extra_bytes", self._extra_bytes)
        monkeypatch.setattr(memory, "unavailable", lambda device: None)

    def add(self, name: str, per_flop: float = PER_FLOP, once: float = 0.0) -> Timed:
        self.peers[name] = Timed(name, self.clock, per_flop, once)
        return self.peers[name]

    def _gates(
        self, names: list[str], case: Case, advance: Callable[[], None], *, tiled: Case | None
    ) -> tuple[sweep.Gate, ...]:
        return tuple(
            sweep.Gate(name, name, (), 1e-5, name != "wrong", None, case.backward, case.dtype)
            for name in names
        )

    def _extra_bytes(self, name: str, case: Case) -> int:
        self.clock.now += memory.STEPS * self.peers[name].per_flop * case.flops
        return case.classes

    def run(
        self, classes: list[int], seconds: float, directions: tuple[bool, ...] = (True,), rounds: int = 5
    ) -> Sweep:
        cases = [dataclasses.replace(BASE, classes=count) for count in classes]
        names = tuple(self.peers)
        stops = tuple(Stop(case, names) for case in cases)
        plan = Plan(stops, (Axis("classes", BASE),), directions, rounds, seconds, "python -m bench sweep")
        return Run(plan, show.Silent(), self.saved.append, self.clock).run()


@pytest.fixture
def sweeper(monkeypatch: pytest.MonkeyPatch) -> Sweeper:
    return Sweeper(monkeypatch)


def test_with_time_enough_everything_is_measured(sweeper: Sweeper) -> None:
    sweeper.add("a")
    sweeper.add("b", 2 * PER_FLOP)
    found = sweeper.run([10, 100], 1e6, directions=(False, True), rounds=3)
    assert found.complete
    assert found.ok
    assert len(found.points) == 2 * 2 * 2
    for point in found.points:
        rate = sweeper.peers[point.peer].per_flop
        assert point.seconds == pytest.approx([rate * point.case.flops] * 3)
        assert point.extra_bytes == point.case.classes
        assert point.reason is None
    assert found.took_seconds == pytest.approx(sweeper.clock.now - 100)


@pytest.mark.parametrize("seconds", [60, 300, 1000])
def test_the_budget_is_kept_whatever_the_sizes(sweeper: Sweeper, seconds: float) -> None:
    for i in range(4):
        sweeper.add(f"peer{i}", (i + 1) * PER_FLOP)
    found = sweeper.run([10, 30, 100, 300, 1000], seconds)
    assert found.took_seconds <= 1.05 * seconds
    assert found.complete
    assert any(point.seconds for point in found.points)


def test_a_slow_peer_is_left_out_with_its_reason_and_the_fast_one_stays(sweeper: Sweeper) -> None:
    sweeper.add("fast", PER_FLOP)
    sweeper.add("slow", 100 * PER_FLOP)
    # At 1000 classes a step of the fast one takes 192 s, of the slow one 100 times that.
    found = sweeper.run([1, 1000], 4000)
    large = found.at(dataclasses.replace(BASE, classes=1000))
    assert large["fast"].seconds
    assert not large["slow"].seconds
    assert "no time was left for a step of about 2e+04 s" in str(large["slow"].reason)
    assert found.ok
    assert len(sweeper.peers["slow"].steps) > 0


def test_fewer_rounds_where_time_is_short_but_at_least_one(sweeper: Sweeper) -> None:
    sweeper.add("a")
    step = PER_FLOP * dataclasses.replace(BASE, classes=100).flops
    # Timing gets half of a shape's time where there is one direction, memory the rest.
    (point,) = sweeper.run([100], 2 * 4.5 * step, rounds=9).points
    assert len(point.seconds) == 3  # and two to warm up, or one


@pytest.mark.parametrize(
    ("steps", "rounds", "weighed"),
    [
        (1.6, 0, False),  # the first step shows that a round would break the budget
        (3.5, 1, False),  # two for memory would
        (6.2, 2, True),
    ],
)
def test_one_slow_peer_of_which_nothing_was_known(
    sweeper: Sweeper, steps: float, rounds: int, weighed: bool
) -> None:
    sweeper.add("a")
    seconds = steps * PER_FLOP * dataclasses.replace(BASE, classes=100).flops
    found = sweeper.run([100], seconds)
    (point,) = found.points
    assert len(point.seconds) == rounds
    assert (point.extra_bytes is not None) == weighed
    assert (point.reason is None) == weighed
    assert found.took_seconds <= seconds


def test_compiling_is_paid_for_once_and_known_then(sweeper: Sweeper) -> None:
    sweeper.add("a")
    sweeper.add("compiled", PER_FLOP, once=200.0)
    found = sweeper.run([100, 101], 500)
    first, second = (found.at(dataclasses.replace(BASE, classes=c))["compiled"] for c in (100, 101))
    assert first.seconds
    assert not second.seconds
    assert found.took_seconds <= 500


def test_memory_is_the_median_of_as_many_samples_as_time_allows(
    sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeper.add("a")
    samples = iter((700, 100, 300, 900))

    def extra_bytes(meter: memory.Meter, name: str, case: Case) -> int:
        sweeper.clock.now += memory.STEPS * PER_FLOP * case.flops
        return next(samples)

    monkeypatch.setattr(memory.Meter, "extra_bytes", extra_bytes)
    step = PER_FLOP * dataclasses.replace(BASE, classes=100).flops
    (point,) = sweeper.run([100], 1e6).points
    assert point.memory_samples == (700, 100, 300)
    assert point.extra_bytes == 300
    (point,) = sweeper.run([100], 6.2 * step).points
    assert point.memory_samples == (900,)  # of which one is enough: no reason why there is no other
    assert point.reason is None


def test_what_needs_more_memory_than_there_is_says_how_much(
    sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeper.add("a")
    monkeypatch.setattr(machine, "available_bytes", lambda device: 10**6)
    found = sweeper.run([10, 1000], 1e6)
    small, large = (found.at(dataclasses.replace(BASE, classes=c))["a"] for c in (10, 1000))
    assert small.seconds
    assert small.needs_bytes is None
    assert not large.seconds
    assert large.needs_bytes == sweeper.peers["a"].needed_bytes(dataclasses.replace(BASE, classes=1000))


def test_what_others_keep_counts_against_a_peer() -> None:
    case = Case(rows=64, classes=4000, features=128)
    names = ("ours", "ours@0", "eager", "pml_arcface")
    kept = sweep.held_by_others("eager", names, case)
    pml = case.classes * case.features * 4
    ours = sweep.held_by_others("eager", ("ours", "eager"), case)
    assert kept == pml + ours
    assert sweep.held_by_others("ours", names, case) == pml


def test_a_peer_without_room_beside_the_others_is_timed_by_itself(
    sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what nobody uses is given back before, so that it has the room."""
    sweeper.add("a")
    keeps = sweeper.add("keeps")
    large = sweeper.add("large")
    monkeypatch.setattr(keeps, "held_bytes", lambda case: 40_000)
    monkeypatch.setattr(large, "extra_bytes", lambda case: 60_000)
    monkeypatch.setattr(machine, "available_bytes", lambda device: 120_000)
    turns: list[str] = []
    for name in ("a", "keeps", "large"):
        sweeper.peers[name].act = lambda case, name=name: turns.append(name)  # type: ignore[misc]
    monkeypatch.setattr("bench.sweep.workspace.clear", lambda: turns.append("given back"))
    found = sweeper.run([30], 1e6, rounds=3)
    points = {point.peer: point for point in found.points}
    assert [points[name].apart for name in ("a", "keeps", "large")] == [False, False, True]
    assert all(len(point.seconds) == 3 and point.needs_bytes is None for point in points.values())
    first = turns.index("large")
    assert turns[first - 1] == "given back"
    assert set(turns[first:]) == {"large", "given back"}
    file = io.StringIO()
    print_sweep(found, show.Plain(file))
    assert "large: timed by itself, since beside what others keep there was no room" in file.getvalue()


def test_a_peer_with_another_loss_at_the_timed_size_is_an_error(
    sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        sweeper.add(name)
    run_step = sweep.run_step
    losses = iter((5.0, 5.0, 5.00001, 5.0, 7.0, 7.0))  # two steps of each to warm up
    monkeypatch.setattr(sweep, "run_step", lambda step, inputs: run_step(step, inputs) + next(losses))
    found = sweeper.run([100], 1e6)
    points = {point.peer: point for point in found.points}
    assert points["c"].error == "its loss at this size is 7, the others' is 5, 5.00001"
    assert not points["c"].seconds
    assert points["a"].seconds
    assert points["b"].seconds
    assert not found.ok


def test_a_peer_that_raises_leaves_the_others_and_the_sweep_is_not_ok(sweeper: Sweeper) -> None:
    sweeper.add("a")

    def fail(case: Case) -> None:
        raise RuntimeError("out of order")

    sweeper.add("broken").act = fail
    found = sweeper.run([10], 1e6)
    points = {point.peer: point for point in found.points}
    assert points["a"].seconds
    assert points["broken"].error == "RuntimeError: out of order"
    assert not found.ok


def test_running_out_of_memory_is_a_reason_and_no_error(sweeper: Sweeper) -> None:
    def fail(case: Case) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    sweeper.add("a")
    sweeper.add("large").act = fail
    found = sweeper.run([10], 1e6)
    assert {point.peer: point.reason for point in found.points}["large"] == "it ran out of memory"
    assert found.ok


@pytest.mark.parametrize(
    ("error", "reason", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "it ran out of memory", None),
        (RuntimeError("out of order"), None, "RuntimeError: out of order"),
    ],
    ids=["memory", "anything"],
)
@pytest.mark.parametrize("fails_at", [2, 4])
def test_a_peer_that_fails_among_the_rounds_is_marked_and_the_others_go_on(
    fails_at: int, error: Exception, reason: str | None, text: str | None, sweeper: Sweeper
) -> None:
    sweeper.add("a")
    broken = sweeper.add("broken")
    sweeper.add("b")

    def fail(case: Case) -> None:
        if len(broken.steps) > fails_at:  # two to warm up, and it fits while it is alone
            raise error

    broken.act = fail
    found = sweeper.run([10, 20], 1e6, rounds=5)
    assert found.complete
    small, large = (found.at(dataclasses.replace(BASE, classes=c)) for c in (10, 20))
    assert small["broken"].seconds == ()
    assert (small["broken"].reason, small["broken"].error) == (reason, text)
    assert all(len(points[name].seconds) == 5 for points in (small, large) for name in ("a", "b"))
    assert len(broken.steps) == fails_at + 2  # not in another round; at the next shape it is tried again


def test_a_peer_that_is_wrong_is_not_timed(sweeper: Sweeper) -> None:
    sweeper.add("a")
    wrong = sweeper.add("wrong")
    found = sweeper.run([10], 1e6)
    assert not wrong.steps
    assert not found.ok
    assert "gate" in str({point.peer: point.reason for point in found.points}["wrong"])


def test_a_shape_in_two_dtypes_is_two_shapes(sweeper: Sweeper, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeper.add("a")
    sweeper.add("b", 2 * PER_FLOP)
    gates = sweeper._gates

    def only_in_float32(
        names: list[str], case: Case, advance: Callable[[], None], *, tiled: Case | None
    ) -> tuple[sweep.Gate, ...]:
        found = gates(names, case, advance, tiled=tiled)
        return tuple(dataclasses.replace(g, passed=(g.peer, g.dtype) != ("b", "bfloat16")) for g in found)

    monkeypatch.setattr(sweep, "check_all", only_in_float32)
    wide, narrow = BASE, dataclasses.replace(BASE, dtype="bfloat16")
    stops = tuple(Stop(case, ("a", "b")) for case in (wide, narrow))
    axes = tuple(Axis("classes", case) for case in (wide, narrow))
    found = Run(Plan(stops, axes, (True,), 2, 1e6, ""), show.Silent(), clock=sweeper.clock).run()
    assert {(gate.peer, gate.dtype) for gate in found.gates} == {
        (name, dtype) for name in "ab" for dtype in ("float32", "bfloat16")
    }
    assert [point.case.dtype for case in (wide, narrow) for point in found.at(case).values()] == [
        "float32", "float32", "bfloat16", "bfloat16",
    ]  # fmt: skip
    assert found.at(wide)["b"].seconds
    assert "gate" in str(found.at(narrow)["b"].reason)
    file = io.StringIO()
    print_sweep(found, show.Plain(file))
    for dtype in ("float32", "bfloat16"):
        assert f"B=4, D=8, {dtype} centres" in file.getvalue()


def test_a_stopped_sweep_keeps_the_shapes_before(sweeper: Sweeper) -> None:
    def stop(case: Case) -> None:
        if case.classes == 30:
            raise KeyboardInterrupt

    sweeper.add("a").act = stop
    found = sweeper.run([10, 30, 100], 1e6)
    assert not found.complete
    assert [point.case.classes for point in found.points] == [10]
    # And so does the file, had it been killed instead.
    assert [point.case.classes for point in sweeper.saved[-1].points] == [10]
    assert not sweeper.saved[-1].complete
    assert Sweep.from_data(json.loads(sweeper.saved[-1].to_json())) == sweeper.saved[-1]


def test_ours_comes_first_so_that_it_is_the_last_to_be_left_out() -> None:
    for peers in (plans.CPU_PEERS, plans.QUICK_PEERS, plans.GPU_PEERS):
        assert peers[:2] == ("ours", "ours@0")


@pytest.mark.parametrize("preset", [plans.FULL, plans.QUICK, plans.TOY])
def test_a_plan_has_every_shape_once_and_the_frontier_at_its_main_one(preset: plans.Preset) -> None:
    plan = plans.plan(preset, preset.peers, "")
    cases = [stop.case for stop in plan.stops]
    assert len(set(cases)) == len(cases)
    assert [case.flops for case in cases] == sorted(case.flops for case in cases)
    for axis in plan.axes:
        for value in getattr(preset.grid, axis.varies):
            assert axis.at(value, backward=True) in cases
    (main,) = [stop for stop in plan.stops if len(stop.peers) > len(preset.peers)]
    assert main.case == preset.grid.main
    workspaces = [name for name in main.peers if name.startswith("ours@") or name == "ours"]
    assert len(workspaces) == 5


def test_the_full_sweep_covers_what_it_promises() -> None:
    assert (plans.FULL.grid.classes[0], plans.FULL.grid.classes[-1]) == (10**4, 10**7)
    assert {10**5, 4 * 10**6} <= set(plans.FULL.grid.classes)
    assert plans.FULL.directions == (False, True)
    assert plans.FULL.seconds <= 2100
    assert plans.QUICK.seconds <= 110


def test_the_gpu_plan_crosses_rows_and_classes_under_autocast() -> None:
    plan = plans.gpu_plan(plans.GPU, plans.GPU_PEERS, "")
    shapes = {(stop.case.rows, stop.case.classes) for stop in plan.stops}
    assert shapes == {(b, c) for b in (256, 1024, 4096) for c in (10**5, 10**6, 4 * 10**6)}
    assert {(s.case.device, s.case.autocast, s.case.features) for s in plan.stops} == {
        ("cuda", "bfloat16", 512)
    }
    assert plan.seconds + 120 < 600  # and two minutes for tuning
    narrow = {(s.case.rows, s.case.classes) for s in plan.stops if s.case.dtype == "bfloat16"}
    assert narrow == {(1024, c) for c in (10**5, 10**6, 4 * 10**6)}
    assert len(plan.stops) == 9 + 3
    assert {"eager", "compiled", "cce", "liger", "ours"} <= set(plan.peers)
