"""Records: what is written is read again, a stopped run keeps what it had, other files are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.cases import Case
from bench.records import (
    BYTES,
    MEASURED,
    NO_ROOM,
    SECONDS,
    STATUSES,
    Measurement,
    Spread,
    least_disturbed_run,
    load,
)
from tests.test_bench.made_up import GATE, HEADER, made_up, written

CASE = Case(2, 3, 4)
NUMBERS = st.floats(min_value=1e-9, max_value=1e12)


@given(
    values=st.lists(NUMBERS, max_size=5),
    why=st.text(max_size=20),
    status=st.sampled_from([s for s in STATUSES if s != MEASURED]),
    complete=st.booleans(),
)
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], why: str, status: str, complete: bool
) -> None:
    row = (
        Measurement(SECONDS, "ours", "ours (exact)", CASE, tuple(values), 2)
        if values
        else Measurement(SECONDS, "ours", "ours (exact)", CASE, status=status, why=why, needs_bytes=7)
    )
    run = dataclasses.replace(
        made_up(),
        gates=(GATE,),
        measurements=(row,),
        complete=complete,
        took_seconds=1.5 if complete else None,
    )
    assert load(written(tmp_path_factory.mktemp("run") / "run.jsonl", run)) == run


def test_a_sweep_round_trips_and_a_stopped_one_keeps_its_lines(tmp_path: Path) -> None:
    run = made_up(runs=2)
    path = written(tmp_path / "run.jsonl", run)
    assert load(path) == run
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:20]))
    stopped = load(path)
    assert not stopped.complete
    assert stopped.measurements == run.measurements[:18]


def test_spread_of_one_two_and_many_values() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 3.0]) == Spread(2.0, 1.5, 2.5)
    assert Spread.of([1.0] * 8 + [1000.0]).median == 1.0


def test_of_bytes_the_median_is_one_that_was_measured() -> None:
    assert Measurement(BYTES, "ours", "", CASE, (1, 2, 30, 40)).value == 2
    assert Measurement(SECONDS, "ours", "", CASE, (1, 2)).value == 1.5


@pytest.mark.parametrize("favored", ["a", "slow"])
def test_a_slow_peer_does_not_choose_the_least_disturbed_run_alone(favored: str) -> None:
    # Two of three are a third slower in the second run, where the slow one happens to be a little faster.
    runs = [{"a": 0.3, "b": 0.3, "slow": 9.0}, {"a": 0.4, "b": 0.4, "slow": 8.5}]
    order = runs if favored == "a" else runs[::-1]
    rows = [
        Measurement(SECONDS, name, "", CASE, (s, s), i)
        for i, run in enumerate(order, 1)
        for name, s in run.items()
    ]
    assert least_disturbed_run(rows) == (1 if favored == "a" else 2)


def test_a_shape_has_the_case_of_ours_and_its_ratios_are_by_run() -> None:
    run = made_up(runs=2)
    for case in run.cases():
        assert (case.margin, case.sample_rate) == ("expface", 1)
        assert run.runs(case) == [1, 2]
        assert run.ratio(case, "ours_sampled", 2) == pytest.approx(2)
        if case.classes <= 100_000:
            assert run.ratio(case, "ours", 1) == pytest.approx(3)
        else:
            assert run.at(case)["eager"].status == NO_ROOM
            assert run.ratio(case, "ours") is None


ROW = json.dumps(
    {"record": "measurement", **dataclasses.asdict(Measurement(SECONDS, "ours", "", CASE, (1,)))}
)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("no json", "not JSON lines"),
        ("[1]", "not a result"),
        ("{}", "KeyError 'record'"),
        ('{"record": "picture"}', "record: expected a gate, a measurement or the end, got 'picture'"),
        ('{"record": "measurement"}', "KeyError 'case'"),
        (ROW.replace('"seconds"', '"hours"'), "what: expected one of"),
        (ROW.replace("[1]", '["fast"]'), "values: expected numbers"),
        (ROW.replace("[1]", "[]"), "values: expected some exactly where"),
        (ROW.replace('"features": 4', '"features": 0'), "features: expected at least 1"),
        (ROW.replace('"status"', '"state"'), "not a result"),
    ],
)
def test_a_line_that_is_none_is_refused(tmp_path: Path, line: str, named: str) -> None:
    path = written(tmp_path / "run.jsonl", dataclasses.replace(made_up(), complete=False))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"run\.jsonl") as refused:
        load(path)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "first",
    [
        "",
        '{"kind": "sweep", "schema": 1}',
        json.dumps({"record": "header", "schema": 1, **vars(HEADER)}),
        "[]",
    ],
)
def test_another_format_is_refused(tmp_path: Path, first: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(first + "\n")
    with pytest.raises(ValueError, match="schema: expected a header of schema 2"):
        load(path)
