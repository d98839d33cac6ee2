from __future__ import annotations

import dataclasses
import io
import json

import pytest

from bench import show, slopes
from bench.sweep_report import frontier, print_sweep
from bench.sweep_result import SCHEMA, Point, Sweep
from tests.test_bench.made_up import FLAT_BYTES, LARGEST, SPEED, made_up

SWEEP = made_up()
CLASSES = SWEEP.axes[0]


def test_json_comes_back_as_it_went() -> None:
    assert Sweep.from_data(json.loads(SWEEP.to_json())) == SWEEP


@pytest.mark.parametrize("change", [{"schema": SCHEMA + 1}, {"kind": "model"}, {"kind": None}])
def test_another_schema_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="schema: expected sweep 1"):
        Sweep.from_data(json.loads(SWEEP.to_json()) | change)


def test_json_can_be_read_without_this_code() -> None:
    first = json.loads(SWEEP.to_json())["points"][0]
    assert (
        first["summary"]["first_quartile"] < first["summary"]["median"] < first["summary"]["third_quartile"]
    )


def test_a_line_holds_its_axis_alone_and_one_direction() -> None:
    line = SWEEP.line(CLASSES, "eager", backward=True)
    assert [value for value, _ in line] == [10_000, 100_000, 300_000]
    for value, point in line:
        assert (point.case.classes, point.case.rows, point.case.backward) == (value, CLASSES.case.rows, True)


def test_ratios_are_against_what_does_the_same_work_at_the_same_shape() -> None:
    for point in SWEEP.points:
        ratio = SWEEP.ratio(point)
        if point.peer in ("eager", "partial_fc"):
            assert ratio == pytest.approx(1)
        elif point.peer in SPEED:
            assert ratio == pytest.approx(SPEED[point.peer])
    assert SWEEP.ratio(Point("ours", "", dataclasses.replace(CLASSES.case, classes=7), (1.0,))) is None


def test_slopes_of_known_powers() -> None:
    assert slopes.exponent([(1, 2.0), (10, 20.0), (100, 200.0)]) == pytest.approx(1)
    assert slopes.exponent([(1, 2.0), (10, 2.0)]) == pytest.approx(0)
    assert slopes.exponent([(1, 3.0), (4, 6.0), (16, 12.0)]) == pytest.approx(0.5)


def test_time_is_linear_and_memory_flat_in_what_was_made_so() -> None:
    ours = slopes.slopes(SWEEP, CLASSES, slopes.FLAT_PEER, backward=True)
    eager = slopes.slopes(SWEEP, CLASSES, "eager", backward=True)
    assert ours is not None
    assert eager is not None
    assert (ours.first, ours.last) == (slopes.FROM, LARGEST)
    assert ours.seconds_exponent == pytest.approx(1)
    assert ours.bytes_a_class == pytest.approx(4)
    assert ours.memory_exponent is not None
    assert 0 < ours.memory_exponent < 4 * LARGEST / FLAT_BYTES
    assert eager.memory_exponent == pytest.approx(1)
    assert eager.bytes_a_class == pytest.approx(16 * CLASSES.case.rows)


def test_without_two_points_there_is_no_slope() -> None:
    few = dataclasses.replace(SWEEP, points=SWEEP.points[:3])
    assert slopes.slopes(few, CLASSES, "ours", backward=True) is None


@pytest.mark.parametrize(("missing", "known"), [(10_000, False), (100_000, True), (LARGEST, False)])
def test_the_growth_of_memory_is_not_claimed_for_classes_where_it_was_not_measured(
    missing: int, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slopes, "FROM", 10_000)  # three points, of which two are left
    points = tuple(
        dataclasses.replace(point, extra_bytes=None)
        if point.peer == slopes.FLAT_PEER and point.case.classes == missing
        else point
        for point in SWEEP.points
    )
    found = slopes.slopes(dataclasses.replace(SWEEP, points=points), CLASSES, slopes.FLAT_PEER, backward=True)
    assert found is not None
    assert (found.first, found.last) == (10_000, LARGEST)
    assert found.seconds_exponent == pytest.approx(1)
    assert (found.memory_exponent is not None) == known
    assert (found.bytes_a_class is not None) == known


def test_the_frontier_goes_from_no_workspace_to_all() -> None:
    found = frontier(SWEEP)
    assert found[0].peer == "ours@0"
    assert len(found) == 5
    assert found[-1].peer == "ours"


def _printed(sweep: Sweep) -> str:
    file = io.StringIO()
    print_sweep(sweep, show.Plain(file))
    return file.getvalue()


def test_the_report_states_numbers_slopes_and_reasons() -> None:
    points = [
        dataclasses.replace(point, seconds=(), extra_bytes=None, needs_bytes=33_300_000_000, reason="needs")
        if point.peer == "eager" and point.case.classes == LARGEST
        else point
        for point in SWEEP.points
    ]
    points.append(Point("liger", "liger-kernel", SWEEP.points[0].case, reason="it runs on a GPU only"))
    text = _printed(dataclasses.replace(SWEEP, points=tuple(points), complete=False))
    for part in (
        "needs 33.3 GB",
        "[3.00]",
        "Growth with the classes",
        "seconds ~ C^",
        "1.00",
        "liger: it runs on a GPU only",
        "Workspaces",
        "rows a second",
        "forward alone",
        "it was stopped before its end",
    ):
        assert part in text, part


def test_the_report_of_a_sweep_that_was_stopped_at_once() -> None:
    assert "stopped" in _printed(dataclasses.replace(SWEEP, points=(), gates=(), complete=False))


def test_on_a_card_whose_rates_are_known_the_report_says_how_near_to_the_roofline() -> None:
    points = tuple(
        dataclasses.replace(point, roofline_seconds=0.6 * (point.median or 0)) for point in SWEEP.points
    )
    assert "60% of roofline" in _printed(dataclasses.replace(SWEEP, points=points))
