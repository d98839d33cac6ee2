from __future__ import annotations

import dataclasses
import io
import json

import pytest

from bench import machine, show
from bench.cases import MEMORY, TOY
from bench.report import print_report
from bench.result import SCHEMA, Gate, Memory, Result

RESULT = Result(
    case=TOY,
    spin=True,
    rounds=3,
    gates=(
        Gate("ours", "ours (exact)", (1e-8, 2e-7, 3e-7), 2e-5, True, None),
        Gate("eager", "eager head (exact)", (1e-8, 2e-7, 3e-7), 2e-5, True, None),
    ),
    skipped={"compiled": "no compiler"},
    runs=(
        {"ours": [1.0, 2.0, 3.0], "eager": [9.0, 8.0, 10.0]},
        {"ours": [1.0, 1.0, 1.5], "eager": [3.0, 3.0, 4.0]},
    ),
    memory=(
        Memory("ours", "ours (exact)", TOY, 2_500_000, None, None),
        Memory("eager", "eager head (exact)", MEMORY, None, "it does not fit", None),
        Memory("ours", "ours (exact)", MEMORY, 3_500_000, None, None),
        Memory("eager", "eager head (exact)", TOY, 4_500_000, None, None),
    ),
    machine=machine.describe(),
    command="python -m bench --toy",
    date="2026-01-31T00:00:00+00:00",
)


def test_json_comes_back_as_it_went() -> None:
    assert Result.from_json(RESULT.to_json()) == RESULT


def test_json_names_its_schema_and_another_one_is_refused() -> None:
    data = json.loads(RESULT.to_json())
    assert data["schema"] == SCHEMA
    with pytest.raises(ValueError, match="schema: expected"):
        Result.from_json(json.dumps(data | {"schema": SCHEMA + 1}))


def test_json_can_be_read_without_this_code() -> None:
    data = json.loads(RESULT.to_json())
    assert data["best_run"] == 1
    assert data["summary"]["ours"]["median"] == 1.0
    assert data["summary"]["ours"]["times_eager"] == 3.0
    assert data["summary"]["ours"]["times_eager_by_run"] == [4.5, 3.0]
    fields = {"cpu", "cores", "memory_bytes", "instruction_set", "torch_threads", "torch", "numpy", "commit"}
    assert fields <= set(data["machine"])


def test_the_quietest_run_is_reported_though_another_has_a_better_ratio() -> None:
    assert RESULT.best_run == 1
    assert RESULT.ratio("ours", 1) == 3.0
    assert RESULT.ratio("eager", 1) == 1.0


def test_without_the_baseline_there_is_no_ratio() -> None:
    alone = dataclasses.replace(RESULT, runs=({"ours": [1.0]},))
    assert alone.ratio("ours", 0) is None


def test_a_wrong_peer_or_a_failed_measurement_is_not_ok() -> None:
    assert RESULT.ok
    wrong = dataclasses.replace(RESULT.gates[0], passed=False)
    assert not dataclasses.replace(RESULT, gates=(wrong,)).ok
    failed = dataclasses.replace(RESULT.memory[0], error="killed")
    assert not dataclasses.replace(RESULT, memory=(failed,)).ok
    assert not dataclasses.replace(RESULT, failed={"compiled": "RuntimeError: out of order"}).ok


def _printed(result: Result) -> str:
    file = io.StringIO()
    print_report(result, show.output(file))
    return file.getvalue()


def test_the_report_shows_errors_times_ratios_memory_and_reasons() -> None:
    text = _printed(RESULT)
    for part in ("2.0e-07", "4.50 3.00", "one core shared", "no compiler", "2.5", "it does not fit"):
        assert part in text, part


def test_a_label_that_names_the_shape_s_chunks_does_not_end_the_report() -> None:
    renamed = dataclasses.replace(RESULT.memory[2], label="ours, other chunks")
    text = _printed(dataclasses.replace(RESULT, memory=(RESULT.memory[0], renamed)))
    (line,) = (line for line in text.splitlines() if "ours, other chunks" in line)
    assert "2.5" in line
    assert "3.5" in line


@pytest.mark.parametrize(("load", "warned"), [(None, False), (0.1, False), (2.5, True)])
def test_the_report_says_when_the_machine_was_busy(load: float | None, warned: bool) -> None:
    text = _printed(dataclasses.replace(RESULT, machine=RESULT.machine | {"load_average": load}))
    assert ("was busy" in text) == warned


def test_the_report_of_a_run_in_which_nothing_passed() -> None:
    gate = Gate("ours", "ours (exact)", (), 2e-5, False, "RuntimeError: [out of] order")
    text = _printed(dataclasses.replace(RESULT, gates=(gate,), runs=(), memory=()))
    assert "FAILED: RuntimeError: [out of] order" in text
    assert "quartiles" not in text
