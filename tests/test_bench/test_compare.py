from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bench import memory
from bench.__main__ import main
from bench.cases import Case
from bench.result import Gate, Result
from bench.sweep_result import Sweep
from tests.test_bench.made_up import made_up
from tests.test_bench.test_result import RESULT
from tests.test_bench.test_sweep import Sweeper

SWEEP = made_up()


def _written(folder: Path, name: str, result: Result | Sweep) -> str:
    path = folder / name
    path.write_text(result.to_json())
    return str(path)


def _with(result: Result | Sweep, **fields: object) -> str:
    """The file's text with other fields, of any type."""
    return json.dumps(json.loads(result.to_json()) | fields)


def _slower(sweep: Sweep, peer: str, factor: float, memory: float = 1.0) -> Sweep:
    def changed(point):  # type: ignore[no-untyped-def]
        if point.peer != peer:
            return point
        return dataclasses.replace(
            point,
            seconds=tuple(factor * s for s in point.seconds),
            extra_bytes=None if point.extra_bytes is None else int(memory * point.extra_bytes),
        )

    return dataclasses.replace(sweep, points=tuple(map(changed, sweep.points)))


@pytest.mark.parametrize(
    ("factor", "memory", "threshold", "code"),
    [
        (1.0, 1.0, "0.1", 0),
        (1.05, 1.0, "0.1", 0),
        (1.2, 1.0, "0.1", 1),
        (1.2, 1.0, "0.3", 0),
        (0.5, 1.0, "0.1", 0),
        (1.0, 1.5, "0.1", 1),
        (1.0, 1.05, "0.1", 0),
    ],
)
def test_only_what_got_worse_beyond_the_threshold_counts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    memory: float,
    threshold: str,
    code: int,
) -> None:
    before = _written(tmp_path, "a.json", SWEEP)
    after = _written(tmp_path, "b.json", _slower(SWEEP, "ours", factor, memory))
    assert main(["compare", before, after, "--threshold", threshold]) == code
    out = capsys.readouterr().out
    assert ("REGRESSION: ours" in out) == bool(code)
    assert "REGRESSION: eager" not in out
    verdict = "REGRESSION: ours" if code else "No regression."
    assert out.splitlines()[-1].startswith(verdict)
    assert ("No regression" in out) != bool(code)


def test_single_cases_compare_too_and_a_wrong_answer_is_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tuple(dataclasses.replace(gate, passed=gate.peer != "ours") for gate in RESULT.gates)
    before = _written(tmp_path, "a.json", RESULT)
    assert main(["compare", before, before]) == 0
    assert (
        main(["compare", before, _written(tmp_path, "b.json", dataclasses.replace(RESULT, gates=wrong))]) == 1
    )
    assert "ours: its answer is wrong now" in capsys.readouterr().out


def test_what_is_missing_is_shown_and_no_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = dataclasses.replace(SWEEP, points=tuple(p for p in SWEEP.points if p.peer != "eager"))
    assert main(["compare", _written(tmp_path, "a.json", SWEEP), _written(tmp_path, "b.json", fewer)]) == 0
    out = capsys.readouterr().out
    gone = sum(
        (p.median is not None) + (p.extra_bytes is not None) for p in SWEEP.points if p.peer == "eager"
    )
    assert gone
    assert f"No regression.\nNot compared: {gone} of " in out


def _without_numbers(sweep: Sweep, peer: str, **why: str) -> Sweep:
    """The peer's points with a reason or an error in place of seconds and bytes."""
    return dataclasses.replace(
        sweep,
        points=tuple(
            dataclasses.replace(p, seconds=(), extra_bytes=None, **why) if p.peer == peer else p
            for p in sweep.points
        ),
    )


OUT_OF_ORDER = {"error": "RuntimeError: out of order"}


@pytest.mark.parametrize(
    ("peer", "why", "code"),
    [
        ("eager", OUT_OF_ORDER, 1),
        ("eager", {"reason": "needs about 33.3 GB"}, 1),
        ("eager", {"reason": "it ran out of memory"}, 1),
        ("eager", {"reason": "no time was left"}, 1),
        ("eager", {"reason": "no time was left for a step of about 3 s"}, 1),
        ("eager", {"reason": "a library is not installed"}, 0),
        ("ours", OUT_OF_ORDER, 1),
        ("ours", {"reason": "no time was left"}, 1),
        ("ours", {"reason": "its extension cannot be loaded"}, 1),
        ("ours@0", {"reason": "its extension cannot be loaded"}, 1),
        ("ours_sampled", {"reason": "its extension cannot be loaded"}, 1),
    ],
)
def test_what_fails_has_no_room_or_no_time_is_a_regression_and_a_peer_that_is_not_here_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], peer: str, why: dict[str, str], code: int
) -> None:
    before = _written(tmp_path, "a.json", SWEEP)
    after = _written(tmp_path, "b.json", _without_numbers(SWEEP, peer, **why))
    assert main(["compare", before, after]) == code
    out = capsys.readouterr().out
    assert ("LOST" in out) == bool(code)
    assert ("missing" in out) != bool(code)
    lines = [line for line in out.splitlines() if line.startswith("REGRESSION")]
    assert bool(lines) == bool(code)
    (text,) = why.values()
    assert all(line.startswith(f"REGRESSION: {peer}, ") and line.endswith(text) for line in lines)


@pytest.mark.parametrize("reason", ["its memory: no time was left", memory.NOT_LINUX])
def test_memory_that_was_not_measured_says_nothing_where_the_seconds_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reason: str
) -> None:
    points = tuple(dataclasses.replace(p, extra_bytes=None, reason=reason) for p in SWEEP.points)
    after = dataclasses.replace(SWEEP, points=points)
    assert main(["compare", _written(tmp_path, "a.json", SWEEP), _written(tmp_path, "b.json", after)]) == 0
    gone = sum(point.extra_bytes is not None for point in SWEEP.points)
    assert f"Not compared: {gone} of " in capsys.readouterr().out
    slower = _slower(after, "ours", 1.2)
    assert main(["compare", _written(tmp_path, "a.json", SWEEP), _written(tmp_path, "b.json", slower)]) == 1


@pytest.mark.parametrize(("seconds", "code"), [(90, 1), (200, 1), (60, 0)])
def test_a_sweep_that_has_less_time_may_leave_more_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: float, code: int
) -> None:
    after = _without_numbers(SWEEP, "ours", reason="no time was left")
    after = dataclasses.replace(after, budget_seconds=seconds)
    before = _written(tmp_path, "a.json", SWEEP)
    assert main(["compare", before, _written(tmp_path, "b.json", after)]) == code
    assert (f"budget_seconds 90 against {seconds}" in capsys.readouterr().out) == (seconds != 90)


def test_a_sweep_that_was_stopped_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped = dataclasses.replace(SWEEP, points=SWEEP.points[:4], complete=False)
    assert main(["compare", _written(tmp_path, "a.json", SWEEP), _written(tmp_path, "b.json", stopped)]) == 0
    assert "the second sweep was stopped before its end\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("peer", "field", "text", "code"),
    [
        ("ours", "skipped", "its extension cannot be loaded", 1),
        ("ours", "skipped", "needs about 33.3 GB, more than 75% of the 8 GB that are free", 1),
        ("ours", "failed", "RuntimeError: out of order", 1),
        ("eager", "skipped", "needs about 33.3 GB, more than 75% of the 8 GB that are free", 1),
        ("eager", "skipped", "a library is not installed", 0),
        ("eager", "failed", "RuntimeError: out of order", 1),
    ],
)
def test_a_single_case_s_peer_that_is_timed_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], peer: str, field: str, text: str, code: int
) -> None:
    runs = tuple({name: s for name, s in run.items() if name != peer} for run in RESULT.runs)
    changes: dict[str, Any] = {"runs": runs, field: {peer: text}}
    after = dataclasses.replace(RESULT, **changes)
    assert (
        main(["compare", _written(tmp_path, "a.json", RESULT), _written(tmp_path, "b.json", after)]) == code
    )
    out = " ".join(capsys.readouterr().out.split())
    assert (f"REGRESSION: {peer}, seconds" in out) == bool(code)
    assert (f"gradient: {text}" in out) == bool(code)


@pytest.mark.parametrize(
    ("why_not", "code"), [("needs about 33.3 GB", 1), ("no extension", 1), (memory.NOT_LINUX, 0)]
)
def test_memory_of_ours_that_is_not_measured_any_more(tmp_path: Path, why_not: str, code: int) -> None:
    gone = dataclasses.replace(RESULT.memory[0], extra_bytes=None, why_not=why_not)
    after = dataclasses.replace(RESULT, memory=(gone, *RESULT.memory[1:]))
    assert (
        main(["compare", _written(tmp_path, "a.json", RESULT), _written(tmp_path, "b.json", after)]) == code
    )


@pytest.mark.parametrize("trouble", ["none", "slow", "no room", "raises out of memory"])
def test_what_a_sweep_itself_says_of_time_and_memory_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trouble: str
) -> None:
    sweeper = Sweeper(monkeypatch)
    peer = sweeper.add("a")
    sweeper.add("small")
    before = sweeper.run([10, 1000], 2000)
    assert all(point.seconds for point in before.points)

    def fail(case: Case) -> None:
        raise MemoryError

    if trouble == "slow":
        peer.per_flop *= 100
    elif trouble == "no room":
        peer.extra_bytes = lambda case: 10**18  # type: ignore[method-assign]
    elif trouble == "raises out of memory":
        peer.act = fail
    after = sweeper.run([10, 1000], 2000)
    paths = _written(tmp_path, "a.json", before), _written(tmp_path, "b.json", after)
    assert main(["compare", *paths]) == (trouble != "none")
    lost = {str(p.reason) for p in after.points if not p.seconds}
    assert bool(lost) == (trouble != "none")
    out = " ".join(capsys.readouterr().out.split())
    assert all(f"gradient: {reason}" in out for reason in lost)


def test_an_error_where_nothing_was_before_is_no_regression(tmp_path: Path) -> None:
    before = _without_numbers(SWEEP, "eager", reason="needs about 33.3 GB")
    after = _without_numbers(SWEEP, "eager", error="RuntimeError: out of order")
    assert main(["compare", _written(tmp_path, "a.json", before), _written(tmp_path, "b.json", after)]) == 0


def test_when_all_that_was_measured_fails_it_is_a_regression_and_no_bad_input(tmp_path: Path) -> None:
    alone = dataclasses.replace(SWEEP, points=tuple(p for p in SWEEP.points if p.peer == "ours"))
    after = _without_numbers(alone, "ours", error="RuntimeError: out of order")
    assert main(["compare", _written(tmp_path, "a.json", alone), _written(tmp_path, "b.json", after)]) == 1


def test_memory_that_fails_now_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = dataclasses.replace(RESULT.memory[0], extra_bytes=None, error="killed by signal 9")
    after = dataclasses.replace(RESULT, memory=(failed, *RESULT.memory[1:]))
    assert main(["compare", _written(tmp_path, "a.json", RESULT), _written(tmp_path, "b.json", after)]) == 1
    assert "killed by signal 9" in capsys.readouterr().out


def test_a_failed_gate_where_a_number_was_is_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = Gate("eager", "eager head", (), 2e-5, False, "RuntimeError: out of order")
    after = _without_numbers(SWEEP, "eager", reason="it did not pass the gate")
    after = dataclasses.replace(after, gates=(*SWEEP.gates, gate))
    assert main(["compare", _written(tmp_path, "a.json", SWEEP), _written(tmp_path, "b.json", after)]) == 1
    assert "REGRESSION: eager: RuntimeError: out of order" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "first", "second"),
    [("cpu", "A processor", "Another"), ("instruction_set", "x86-64-v3", "x86-64-v4")],
)
def test_other_conditions_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, first: str, second: str
) -> None:
    other = dataclasses.replace(SWEEP, machine=SWEEP.machine | {field: second})
    assert main(["compare", _written(tmp_path, "a.json", SWEEP), _written(tmp_path, "b.json", other)]) == 0
    line = f"measured under other conditions: {field} {first} against {second}"
    assert line in capsys.readouterr().out.splitlines()


def test_a_core_shared_in_one_of_them_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = dataclasses.replace(RESULT, spin=False)
    assert main(["compare", _written(tmp_path, "a.json", RESULT), _written(tmp_path, "b.json", alone)]) == 0
    line = "measured under other conditions: spin True against False"
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "No such file"),
        ("no json", "not JSON: Expecting value"),
        ("[1]", "expected a JSON object"),
        ("{}", "schema: expected"),
        (json.dumps({"kind": "sweep", "schema": 99}), "schema: expected sweep 1, got sweep 99"),
        (json.dumps({"schema": 99}), "schema: expected 1, got 99"),
        (
            json.dumps({"kind": "model", "schema": 1}),
            "schema: expected a single case or a sweep, got 'model'",
        ),
        (json.dumps({"kind": "sweep", "schema": 1}), "not a result"),
        (json.dumps({"schema": 1}), "not a result"),
        (RESULT.to_json(), "one kind"),
        (_with(SWEEP, machine=[1]), "not a result of this program: AttributeError"),
        (_with(RESULT, machine=[1]), "not a result of this program: AttributeError"),
        (_with(SWEEP, machine={}), "not a result of this program: KeyError 'cpu'"),
        (_with(RESULT, runs=[{"ours": ["fast"]}]), "not a result of this program: TypeError"),
        (_with(RESULT, skipped=["ours"]), "not a result of this program: AttributeError"),
        (_with(SWEEP, budget_seconds="long"), "not a result of this program: TypeError"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_another_file_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, named: str, first: bool
) -> None:
    good, bad = _written(tmp_path, "good.json", SWEEP), tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    files = [str(bad), good] if first else [good, str(bad)]
    assert main(["compare", *files]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bench: ")
    assert err.count("\n") == 1
    assert named in err


def test_files_without_a_common_case_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forward, both = made_up(directions=(False,)), made_up(directions=(True,))
    assert main(["compare", _written(tmp_path, "a.json", forward), _written(tmp_path, "b.json", both)]) == 2
    assert "in common" in capsys.readouterr().err


def test_a_threshold_below_0_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _written(tmp_path, "a.json", SWEEP)
    assert main(["compare", path, path, "--threshold", "-0.1"]) == 2
    assert "threshold: expected at least 0" in capsys.readouterr().err
