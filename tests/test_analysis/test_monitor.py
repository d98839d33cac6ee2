"""AngularMonitor against a brute-force pass over all rows; ranks, states, writers, pictures, bad input."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from expface_kernels import ArcFace, BatchStats, CosFace, ExpFace, analysis, margin_cross_entropy
from expface_kernels.analysis import AngleCounts, AngularMonitor, plots
from expface_kernels.analysis.angle_counts import FINE, PERCENTILES
from tests.cases import KINDS, batch
from tests.distributed import run_ranks
from tests.tolerances import ANGLE_MEAN, PERCENTILE, TEN_DIGITS

F64 = torch.float64
FINE_BIN = math.pi / FINE


def stats_of(
    kind: str = "mixed", rows: int = 40, seed: int = 0, ignored: int = 0, classes: int = 23
) -> BatchStats:
    """Statistics as the loss gives them, of a batch whose first rows are ignored and hold NaN."""
    x, w, y = batch(kind, rows, classes, 16, seed)
    x[:ignored] = torch.nan
    y[:ignored] = -100
    return margin_cross_entropy(x, w, y, return_stats=True)[1]


def brute_force(batches: list[BatchStats]) -> list[tuple[float, float, bool]]:
    """(target angle, nearest other angle, nearest is the own class) of each row that counts."""
    rows = []
    for stats in batches:
        for i in range(len(stats.target_angle)):
            target, cos = float(stats.target_angle[i]), float(stats.hardest_negative_cos[i])
            if math.isnan(target) or math.isnan(cos) or int(stats.hardest_negative_class[i]) < 0:
                continue
            rows.append((target, math.acos(max(-1.0, min(1.0, cos))), bool(stats.correct[i])))
    return rows


def assert_brute_force(angles: AngleCounts, batches: list[BatchStats]) -> None:
    rows = brute_force(batches)
    target, nearest = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    edges = np.linspace(0, math.pi, angles.bins + 1)
    np.testing.assert_array_equal(angles.histogram, np.histogram2d(target, nearest, (edges, edges))[0])
    fine = np.linspace(0, math.pi, FINE + 1)
    np.testing.assert_array_equal(angles.target_counts, np.histogram(target, fine)[0])
    np.testing.assert_array_equal(angles.nearest_counts, np.histogram(nearest, fine)[0])
    assert angles.rows == len(rows)
    assert angles.left_out == sum(len(stats.target_angle) for stats in batches) - len(rows)
    assert angles.accuracy == sum(row[2] for row in rows) / len(rows)
    assert angles.target_mean == pytest.approx(target.mean(), rel=ANGLE_MEAN)
    assert angles.nearest_mean == pytest.approx(nearest.mean(), rel=ANGLE_MEAN)
    for values, percentiles in ((target, angles.target_percentiles), (nearest, angles.nearest_percentiles)):
        truth = np.percentile(values, PERCENTILES, method="inverted_cdf")
        assert np.abs(percentiles() - truth).max() <= FINE_BIN
        first, last = percentiles((0, 100))
        assert values.min() - FINE_BIN <= first <= values.min() + FINE_BIN
        assert values.max() - FINE_BIN <= last <= values.max() + FINE_BIN


@pytest.mark.parametrize("bins", [1, 36, 90])
def test_an_epoch_equals_a_brute_force_pass(bins: int) -> None:
    monitor = AngularMonitor(bins)
    batches = [stats_of(kind, seed=i, ignored=i) for i, kind in enumerate(KINDS)]
    batches.append(stats_of("random", rows=1))
    for stats in batches:
        monitor.update(stats)
    assert_brute_force(monitor.running(), batches)
    done = monitor.end_epoch()
    assert_brute_force(done, batches)
    assert done.epoch == 1
    assert monitor.epoch == 2
    assert monitor.running().rows == monitor.running().left_out == 0


def test_epochs_are_counted_apart_and_the_oldest_is_forgotten() -> None:
    monitor = AngularMonitor(30, keep=2)
    for seed in range(3):
        monitor.update(stats_of(seed=seed, rows=10 + seed))
        monitor.end_epoch()
    assert [angles.epoch for angles in monitor.epochs] == [2, 3]
    assert [angles.rows for angles in monitor.epochs] == [11, 12]
    assert_brute_force(monitor.epochs[0], [stats_of(seed=1, rows=11)])


def test_rows_without_another_class_are_left_out() -> None:
    monitor = AngularMonitor()
    monitor.update(stats_of("random", rows=5, classes=1))
    angles = monitor.end_epoch()
    assert (angles.rows, angles.left_out) == (0, 5)
    figures = [angles.accuracy, angles.target_mean, angles.nearest_mean, *angles.target_percentiles()]
    assert all(math.isnan(figure) for figure in figures)


def test_an_infinite_row_is_left_out_and_disturbs_no_other() -> None:
    x, w, y = batch("random", 8, 23, 16)
    x[3, 2] = torch.inf
    stats = margin_cross_entropy(x, w, y, return_stats=True)[1]
    monitor = AngularMonitor()
    monitor.update(stats)
    assert monitor.running().left_out == 1
    assert_brute_force(monitor.running(), [stats])


def test_angles_of_0_and_180_degrees_fall_into_the_last_bins() -> None:
    zeros, n = torch.zeros(2, dtype=F64), torch.tensor([1, 1])
    angle, cos = torch.tensor([0.0, math.pi], dtype=F64), torch.tensor([1 + 1e-7, -1 - 1e-7], dtype=F64)
    monitor = AngularMonitor(90)
    monitor.update(BatchStats(angle, zeros, zeros, zeros, cos, n, torch.tensor([True, False])))
    histogram = monitor.running().histogram
    assert histogram[0, 0] == histogram[89, 89] == 1
    assert histogram.sum() == 2


class Counter(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_an_update_reads_nothing_from_the_device_and_is_a_handful_of_operations() -> None:
    # Tensors on "meta" have no values: whatever wants one raises.
    stats = BatchStats(*(value.to("meta") for value in stats_of()))
    monitor = AngularMonitor()
    monitor.update(stats)
    with Counter() as counter:
        monitor.update(stats)
    assert 5 < counter.count <= 45
    with pytest.raises(Exception, match="meta"):
        monitor.running()


def test_merging_two_ranks_equals_one_that_saw_all() -> None:
    one, two = AngularMonitor(60), AngularMonitor(60)
    seen = []
    for epoch in range(2):
        for rank, monitor in enumerate((one, two)):
            seen.append(stats_of(seed=10 * epoch + rank, rows=20 + rank))
            monitor.update(seen[-1])
        if epoch == 0:
            one.end_epoch()
            two.end_epoch()
    one.merge(two)
    assert_brute_force(one.epochs[0], seen[:2])
    assert_brute_force(one.running(), seen[2:])
    assert two.running().rows == 21  # the other stays as it was


def _epochs(group: Any) -> dict[str, Any]:
    monitor, rank = AngularMonitor(process_group=group), group.rank()
    if rank == 0:  # the other rank has no rows in the first epoch
        monitor.update(stats_of("random", seed=1))
    monitor.end_epoch()
    monitor.update(stats_of("random", seed=2 + rank, rows=30 + rank, ignored=rank))
    monitor.end_epoch()
    return monitor.state_dict()


def test_with_a_process_group_every_rank_holds_the_whole_epoch() -> None:
    for state in run_ranks(2, _epochs):
        monitor = AngularMonitor()
        monitor.load_state_dict(state)
        assert_brute_force(monitor.epochs[0], [stats_of("random", seed=1)])
        second = [stats_of("random", seed=2 + r, rows=30 + r, ignored=r) for r in range(2)]
        assert_brute_force(monitor.epochs[1], second)


def test_a_state_goes_through_a_file_and_on() -> None:
    monitor = AngularMonitor(30)
    monitor.update(stats_of(seed=0))
    monitor.end_epoch()
    monitor.update(stats_of(seed=1))
    file = io.BytesIO()
    torch.save(monitor.state_dict(), file)
    monitor.update(stats_of(seed=5))  # a state is a copy
    file.seek(0)
    again = AngularMonitor(30)
    again.load_state_dict(torch.load(file, weights_only=True))
    again.update(stats_of(seed=2))
    assert_brute_force(again.epochs[0], [stats_of(seed=0)])
    assert_brute_force(again.end_epoch(), [stats_of(seed=1), stats_of(seed=2)])
    assert again.epochs[-1].epoch == 2


class Scalars:
    """The TensorBoard methods, remembering what was written."""

    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}
        self.histograms: dict[str, Any] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars[tag] = (value, step)


class RawWriter(Scalars):
    def add_histogram_raw(self, tag: str, global_step: int, **figures: Any) -> None:
        self.histograms[tag] = (figures, global_step)

    def add_histogram(self, *arguments: Any) -> None:
        raise AssertionError("the counts themselves are preferred")


class ValueWriter(Scalars):
    def add_histogram(self, tag: str, values: torch.Tensor, step: int) -> None:
        self.histograms[tag] = (values, step)


@pytest.mark.parametrize("make", [RawWriter, ValueWriter])
def test_a_writer_gets_scalars_and_histograms_of_the_closed_epoch(make: Any) -> None:
    monitor, stats = AngularMonitor(), stats_of(rows=60, ignored=3)
    monitor.update(stats_of(seed=9))
    monitor.end_epoch()
    monitor.update(stats)
    monitor.end_epoch()
    monitor.update(stats_of(seed=8))
    writer = make()
    monitor.write(writer, "train")
    rows = np.rad2deg([row[:2] for row in brute_force([stats])])
    assert {step for _, step in writer.scalars.values()} == {2}
    scalars = {tag: value for tag, (value, _) in writer.scalars.items()}
    assert scalars["train/rows"] == 57
    assert scalars["train/accuracy"] == monitor.epochs[-1].accuracy
    for column, name in enumerate(("target", "nearest_other")):
        values = rows[:, column]
        assert scalars[f"train/{name}_mean"] == pytest.approx(values.mean())
        for percent in (5, 25, 50, 75, 95):
            truth = np.percentile(values, percent, method="inverted_cdf")
            assert scalars[f"train/{name}_p{percent:02d}"] == pytest.approx(truth, abs=PERCENTILE)
        written, step = writer.histograms[f"train/{name}"]
        assert step == 2
        if make is RawWriter:
            counts = np.histogram(values, np.arange(181))[0]
            assert written["bucket_counts"] == counts.tolist()
            assert written["bucket_limits"] == list(range(1, 181))
            assert written["num"] == 57
            assert written["sum"] == pytest.approx(values.sum())
            assert written["sum_squares"] == pytest.approx((counts * (np.arange(180) + 0.5) ** 2).sum())
            assert values.min() - 0.1 <= written["min"] <= values.min()
            assert values.max() <= written["max"] <= values.max() + 0.1
        else:
            assert written.mean() == pytest.approx(values.mean(), abs=0.5)
            assert written.min() == pytest.approx(values.min(), abs=0.2)
            assert written.max() == pytest.approx(values.max(), abs=0.2)
    assert len(scalars) == 2 + 2 * 6


def test_the_raw_histogram_has_the_arguments_of_torchs_writer() -> None:
    """torch.utils.tensorboard imports tensorboard, which need not be there: its source says the names."""
    import ast

    source = Path(torch.__file__).parent / "utils" / "tensorboard" / "writer.py"
    (method,) = (
        node
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "add_histogram_raw"
    )
    names = {argument.arg for argument in method.args.args}
    monitor, writer = AngularMonitor(), RawWriter()
    monitor.update(stats_of())
    monitor.write(writer)
    figures, _ = writer.histograms["angles/target"]
    assert set(figures) | {"self", "tag", "global_step", "walltime"} == names


def test_the_picture_shows_the_rows_and_each_margins_boundary(tmp_path: Path) -> None:
    monitor, margins = AngularMonitor(36), [ExpFace(), ArcFace(), CosFace()]
    stats = stats_of(rows=200)
    monitor.update(stats)
    figure = plots.distribution_figure(monitor.latest(), margins)
    axes = figure.axes[0]
    shown = axes.collections[0].get_array()
    np.testing.assert_array_equal(np.ma.filled(shown, 0), monitor.latest().histogram.T)
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines)[1:] == [repr(margin) for margin in margins]
    theta, boundary = (np.asarray(values) for values in lines["ExpFace(m=0.7)"].get_data())
    np.testing.assert_allclose(boundary[1:-1], 180 * (theta[1:-1] / 180) ** 0.7, rtol=TEN_DIGITS)
    monitor.draw(tmp_path / "angles.png", margins)
    assert (tmp_path / "angles.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"bins": 0}, ValueError, "bins: expected at least 1, got 0"),
        ({"bins": 7}, ValueError, "bins: expected a divisor of 1800, got 7"),
        ({"bins": 9.0}, TypeError, "bins: expected an int"),
        ({"process_group": 3}, TypeError, "process_group: expected a torch.distributed.ProcessGroup"),
        ({"keep": 0}, ValueError, "keep: expected at least 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        AngularMonitor(**options)


def test_what_are_no_statistics_changes_nothing() -> None:
    monitor, stats = AngularMonitor(), stats_of()
    monitor.update(stats)
    before = monitor.running().counts
    with pytest.raises(TypeError, match=r"stats: expected BatchStats, .* got Tensor"):
        monitor.update(stats.target_angle)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected hardest_negative_cos of shape \(40,\), got \(39,\)"):
        monitor.update(stats._replace(hardest_negative_cos=stats.hardest_negative_cos[1:]))
    with pytest.raises(ValueError, match=r"expected target_angle of shape \(B,\), got \(40, 1\)"):
        monitor.update(stats._replace(target_angle=stats.target_angle[:, None]))
    with pytest.raises(ValueError, match="percents: expected numbers in"):
        monitor.running().target_percentiles([101])
    with pytest.raises(TypeError, match="writer: expected add_scalar and add_histogram_raw or"):
        monitor.write(Scalars())
    assert torch.equal(monitor.running().counts, before)


def test_states_and_monitors_of_another_kind_are_refused_and_change_nothing() -> None:
    monitor, other = AngularMonitor(30), AngularMonitor(90)
    monitor.update(stats_of())
    before = monitor.running().counts
    with pytest.raises(ValueError, match="state: expected 30 bins, got 90"):
        monitor.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="other: expected 30 bins, epoch 1 and kept epochs"):
        monitor.merge(other)
    ahead = AngularMonitor(30)
    ahead.end_epoch()
    with pytest.raises(ValueError, match=r"got 30 bins, epoch 2 and kept epochs \[1\]"):
        monitor.merge(ahead)
    for wrong in (None, 3, monitor.running()):
        with pytest.raises(TypeError, match="other: expected an AngularMonitor, got"):
            monitor.merge(wrong)
        with pytest.raises(TypeError, match="state: expected a state_dict, got"):
            monitor.load_state_dict(wrong)
    with pytest.raises(TypeError, match="margin: expected a callable"):
        monitor.draw("none.png", margins=[3])
    assert torch.equal(monitor.running().counts, before)
    with pytest.raises(ValueError, match="other: expected epoch 1 in 30 bins, got epoch 2"):
        monitor.running() + ahead.running()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("counts", torch.zeros(9, dtype=F64), r"expected counts of shape \(4505,\) .*, got shape \(9,\)"),
        ("counts", torch.zeros(4505), "expected counts of .*float64, got .*float32"),
        ("kept_counts", [torch.zeros(9, dtype=F64)], r"expected kept_counts of shape \(4505,\) .* \(9,\)"),
        ("kept_counts", [], "expected kept_counts of 1 epochs, as kept_epochs, got 0"),
        ("epoch", None, "expected epoch among its keys, got bins, counts, kept_epochs, kept_counts"),
        ("bins", None, "expected bins among its keys, got epoch, counts, kept_epochs, kept_counts"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(key: str, value: Any, words: str) -> None:
    monitor, other = AngularMonitor(30), AngularMonitor(30)
    monitor.update(stats_of(seed=1))
    other.update(stats_of(seed=2))
    other.end_epoch()
    state = {**other.state_dict(), key: value}
    if value is None:
        del state[key]
    with pytest.raises(ValueError, match=f"state: {words}"):
        monitor.load_state_dict(state)
    assert (monitor.epoch, monitor.epochs) == (1, [])
    assert_brute_force(monitor.running(), [stats_of(seed=1)])


def test_drawing_without_rows_or_without_matplotlib_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = AngularMonitor()
    with pytest.raises(ValueError, match="monitor: expected rows to draw, got none"):
        monitor.draw(tmp_path / "angles.png")
    monitor.update(stats_of())
    monkeypatch.delattr(analysis, "plots")
    monkeypatch.delitem(sys.modules, plots.__name__)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ImportError, match=r"expface_kernels\[analysis\]"):
        monitor.draw(tmp_path / "angles.png")
