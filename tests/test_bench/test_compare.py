"""`python -m bench compare`: what got worse is found, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.records import BYTES, FAILED, NO_ROOM, NO_TIME, SECONDS, SKIPPED, UNAVAILABLE, WRONG, Gate, Run
from tests.test_bench.made_up import GATE, HEADER, changed, made_up, written

SWEEP = made_up()


def _compared(folder: Path, after: Run, *options: str, before: Run = SWEEP) -> int:
    paths = [written(folder / name, run) for name, run in (("a.jsonl", before), ("b.jsonl", after))]
    return main(["compare", *map(str, paths), *options])


def _scaled(peer: str, seconds: float, extra: float = 1.0) -> Run:
    by = {SECONDS: seconds, BYTES: extra}
    return changed(
        SWEEP,
        lambda m: (
            m if m.peer != peer else dataclasses.replace(m, values=tuple(v * by[m.what] for v in m.values))
        ),
    )


def _lost(peer: str, status: str, quantities: tuple[str, ...] = (SECONDS, BYTES)) -> Run:
    new: dict[str, Any] = {"values": (), "status": status, "why": "out of order"}
    return changed(
        SWEEP, lambda m: dataclasses.replace(m, **new) if m.peer == peer and m.what in quantities else m
    )


@pytest.mark.parametrize(
    ("seconds", "extra", "threshold", "code"),
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
    seconds: float,
    extra: float,
    threshold: str,
    code: int,
) -> None:
    assert _compared(tmp_path, _scaled("ours", seconds, extra), "--threshold", threshold) == code
    out = capsys.readouterr().out
    assert ("REGRESSION: ours" in out) == ("WORSE\n" in out) == bool(code)
    assert ("No regression." in out) == (not code)
    assert "REGRESSION: eager" not in out


@pytest.mark.parametrize(
    ("peer", "status", "quantities", "code"),
    [
        ("eager", FAILED, (SECONDS, BYTES), 1),
        ("eager", FAILED, (BYTES,), 1),
        ("eager", NO_ROOM, (SECONDS, BYTES), 1),
        ("eager", NO_TIME, (SECONDS, BYTES), 1),
        ("eager", NO_TIME, (BYTES,), 0),  # the seconds are there, and tell whether it has become slow
        ("eager", UNAVAILABLE, (SECONDS, BYTES), 0),
        ("ours", UNAVAILABLE, (SECONDS, BYTES), 1),
        ("ours@0", UNAVAILABLE, (SECONDS, BYTES), 1),
        ("ours_sampled", UNAVAILABLE, (BYTES,), 1),
        ("ours", SKIPPED, (BYTES,), 0),  # memory cannot be read on this system
        ("ours", WRONG, (SECONDS, BYTES), 0),  # the gate itself is told, once
    ],
)
def test_a_number_that_is_there_no_more_is_lost_or_missing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    peer: str,
    status: str,
    quantities: tuple[str, ...],
    code: int,
) -> None:
    assert _compared(tmp_path, _lost(peer, status, quantities)) == code
    out = capsys.readouterr().out
    assert ("LOST" in out) == bool(code)
    assert code or "missing" in out
    lines = [line for line in out.splitlines() if line.startswith("REGRESSION")]
    assert bool(lines) == bool(code)
    assert all(f"REGRESSION: {peer}, " in line and line.endswith(": out of order") for line in lines)


@pytest.mark.parametrize(("seconds", "code"), [(90, 1), (200, 1), (60, 0)])
def test_a_sweep_that_has_less_time_may_leave_more_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: float, code: int
) -> None:
    after = dataclasses.replace(
        _lost("ours", NO_TIME), header=dataclasses.replace(HEADER, settings={"seconds": seconds})
    )
    assert _compared(tmp_path, after) == code
    assert (f"seconds 90 against {seconds}" in capsys.readouterr().out) == (seconds != 90)


@pytest.mark.parametrize(
    ("errors", "said"), [((1.0, 1.0, 1.0), "its answer is wrong now"), ((), "RuntimeError: out of order")]
)
def test_a_peer_that_does_not_pass_the_gate_now_is_a_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], errors: tuple[float, ...], said: str
) -> None:
    gate = Gate("eager", "eager head", errors, 2e-5, False, "RuntimeError: out of order")
    after = dataclasses.replace(_lost("eager", WRONG), gates=(GATE, gate))
    assert _compared(tmp_path, after) == 1
    assert f"REGRESSION: eager: {said}" in capsys.readouterr().out
    # Where it was neither right nor measured before, nothing got worse.
    assert _compared(tmp_path, after, before=changed(SWEEP, lambda m: m if m.peer != "eager" else None)) == 0


def test_a_peer_that_was_not_asked_for_is_missing_and_new_ones_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = changed(SWEEP, lambda m: m if m.peer != "eager" else None)
    assert _compared(tmp_path, fewer) == 0
    gone = sum(m.peer == "eager" and bool(m.values) for m in SWEEP.measurements)
    assert f"No regression.\nNot compared: {gone} of " in capsys.readouterr().out
    assert _compared(tmp_path, _lost("eager", FAILED), before=fewer) == 0


def test_when_all_that_was_measured_fails_it_is_a_regression_and_no_bad_input(tmp_path: Path) -> None:
    alone = changed(SWEEP, lambda m: m if m.peer == "ours" else None)
    after = changed(_lost("ours", FAILED), lambda m: m if m.peer == "ours" else None)
    assert _compared(tmp_path, after, before=alone) == 1


@pytest.mark.parametrize(
    ("machine", "settings", "said"),
    [
        ({"cpu": "Another"}, {}, "cpu A processor against Another"),
        ({"gpu": {"card": "A card"}}, {}, "card None against A card"),
        ({}, {"spin": True}, "spin None against True"),
        ({}, {"keep_memory": True}, "keep_memory None against True"),
    ],
)
def test_other_conditions_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], machine: Any, settings: Any, said: str
) -> None:
    header = dataclasses.replace(
        HEADER, machine=HEADER.machine | machine, settings=HEADER.settings | settings
    )
    assert _compared(tmp_path, dataclasses.replace(SWEEP, header=header)) == 0
    assert f"measured under other conditions: {said}" in capsys.readouterr().out.splitlines()


def test_a_run_that_was_stopped_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _compared(tmp_path, dataclasses.replace(SWEEP, complete=False)) == 0
    assert "the second run was stopped before its end\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["good", "none"], "No such file"),
        (["none", "good"], "No such file"),
        (["good", "bad"], "schema: expected a header"),
        (["good", "other"], "in common"),
        (["good", "good", "--threshold", "-0.1"], "threshold: expected a finite number of at least 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: list[str], named: str
) -> None:
    written(tmp_path / "good", SWEEP)
    written(tmp_path / "other", changed(SWEEP, lambda m: dataclasses.replace(m, peer="another")))
    (tmp_path / "bad").write_text('{"schema": 1}')
    argv = [str(tmp_path / file) if file in ("good", "none", "bad", "other") else file for file in files]
    assert main(["compare", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bench: ")
    assert err.count("\n") == 1
    assert named in err
