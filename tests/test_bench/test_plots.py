"""Pictures: that each is drawn, says what its axes are, and shows every peer."""

from __future__ import annotations

import dataclasses
import errno
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from bench import plots
from bench.__main__ import main
from tests.test_bench.made_up import PEERS, made_up
from tests.test_bench.test_result import RESULT

SWEEP = made_up()
NAMES = {"classes-seconds.png", "classes-memory.png", "frontier.png", "speedups.png"}


def test_a_sweep_gives_four_pictures(tmp_path: Path) -> None:
    plt.close("all")
    written = plots.draw(SWEEP, tmp_path)
    assert plt.get_fignums() == []  # or they would stay in memory
    assert {path.name for path in written} == NAMES
    for path in written:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.info["Commit"] == SWEEP.machine["commit"] == "abc1234"
            assert image.info["Creation Time"] == SWEEP.date


@pytest.mark.parametrize("memory", [False, True])
def test_against_classes_both_axes_are_logarithmic_and_named_with_their_unit(memory: bool) -> None:
    figure = plots._against_classes(SWEEP, memory=memory)
    assert figure is not None
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert axes.get_xlabel() == "classes C"
        assert len(axes.lines) == len(PEERS) + 1  # and the guide
    assert ("MB" if memory else "seconds") in figure.axes[0].get_ylabel()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    for peer in ("eager head (exact)", "workspace 0 MiB (exact)", "linear_cross_entropy, plain (no margin)"):
        assert any(peer in text for text in texts), peer
    assert len(set(texts)) == len(texts)


def test_a_line_that_stops_says_what_it_would_need() -> None:
    points = tuple(
        dataclasses.replace(point, seconds=(), extra_bytes=None, needs_bytes=33_300_000_000)
        if point.peer == "eager" and point.case.classes == 300_000
        else point
        for point in SWEEP.points
    )
    figure = plots._against_classes(dataclasses.replace(SWEEP, points=points), memory=False)
    assert figure is not None
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "eager head (exact); with gradients at C=300,000 needs 33.3 GB" in texts


def test_the_frontier_shows_every_workspace_and_the_peers_that_do_the_same_work() -> None:
    figure = plots._frontier(SWEEP)
    assert figure is not None
    (axes,) = figure.axes
    assert len(axes.lines[0].get_xdata()) == 5
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == 3  # ours, eager, torch; a sample of the classes is other work
    assert "MB" in axes.get_xlabel()
    assert "rows a second" in axes.get_ylabel()


def test_bars_are_how_many_times_as_fast_ours_is() -> None:
    figure = plots._speedups(SWEEP)
    assert figure is not None
    left = figure.axes[0]
    labels = [label.get_text().replace("\n", " ") for label in left.get_yticklabels()]
    widths = [patch.get_x() + patch.get_width() for patch in left.patches[: len(labels)]]
    by_label = dict(zip(labels, widths, strict=True))
    assert by_label["eager head (exact)"] == pytest.approx(3)
    assert next(w for label, w in by_label.items() if "partial-FC" in label) == pytest.approx(2)
    assert next(w for label, w in by_label.items() if "linear_cross" in label) == pytest.approx(3 / 1.5)


def test_every_peer_that_has_a_colour_is_told_from_the_others() -> None:
    """But for the same code compiled in another way, of which a picture has one."""
    twins = {"compiled_dynamic": "compiled", "torch_linear_dynamic": "torch_linear_compiled"}
    peers: dict[plots.Style, list[str]] = {}
    for name, style in plots.STYLES.items():
        peers.setdefault(style, []).append(twins.get(name, name))
    assert [names for names in peers.values() if len(set(names)) > 1] == []
    assert all(plots.STYLES[name] == plots.STYLES[twin] for name, twin in twins.items())


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert plots.draw(dataclasses.replace(SWEEP, points=()), tmp_path) == []


def test_the_command_draws_an_old_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.json"
    path.write_text(SWEEP.to_json())
    assert main(["plots", str(path), str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {*NAMES, "sweep.json"}
    assert "frontier.png" in capsys.readouterr().out


def _refused(dir: Path) -> None:
    """As /proc does, where modes let root write."""
    raise FileNotFoundError(errno.ENOENT, "No such file", str(dir))


def test_what_cannot_be_drawn_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "single.json"
    path.write_text(RESULT.to_json())
    assert main(["plots", str(path), str(tmp_path)]) == 2
    assert "expected a sweep" in capsys.readouterr().err
    path.write_text(SWEEP.to_json())
    assert main(["plots", str(path), str(tmp_path / "none")]) == 2
    assert "there is no directory" in capsys.readouterr().err
    monkeypatch.setattr(tempfile, "TemporaryFile", _refused)
    assert main(["plots", str(path), str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"bench: folder: {tmp_path} cannot be written to (No such file)\n"
    monkeypatch.setattr(plots, "unavailable", lambda: "matplotlib is not installed")
    assert main(["plots", str(path), str(tmp_path)]) == 2
    assert capsys.readouterr().err == "bench: matplotlib is not installed\n"
