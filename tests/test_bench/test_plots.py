"""Pictures: that each is drawn, says what its axes are, marks what is missing and what is unsteady."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from bench import plots
from bench.__main__ import main
from tests.test_bench.made_up import HEADER, changed, made_up, written

SWEEP = made_up()
NAMES = {"classes.png", "classes-forward.png", "frontier.png"}


def test_the_command_draws_an_old_sweep_and_says_which(tmp_path: Path) -> None:
    plt.close("all")
    path = written(tmp_path / "sweep.jsonl", SWEEP)
    assert main(["plots", str(path), str(tmp_path / "pictures")]) == 0
    assert plt.get_fignums() == []  # or they would stay in memory
    assert {picture.name for picture in (tmp_path / "pictures").iterdir()} == NAMES
    for picture in (tmp_path / "pictures").iterdir():
        with Image.open(picture) as image:
            assert (image.info["Commit"], image.info["Creation Time"]) == ("abc1234", HEADER.date)


def test_against_classes_every_line_has_its_name_and_a_cross_where_it_does_not_fit() -> None:
    figure = plots._against_classes(SWEEP, backward=True)
    assert figure is not None
    assert len(figure.axes) == 2
    for axes, title in zip(figure.axes, ("seconds of a step", "extra memory of a step, MB"), strict=True):
        assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel()) == ("log", "log", "classes C")
        assert axes.get_title(loc="left") == title
        texts = [text.get_text() for text in axes.texts]
        assert {"this package", "eager", "out of memory"} < set(texts)
        assert sum(line.get_marker() == "x" for line in axes.lines) == 1
        (cross,) = (line for line in axes.lines if line.get_marker() == "x")
        assert list(cross.get_xdata()) == [300_000]


@pytest.mark.parametrize(("rounds", "hollow"), [(plots.LEAST_ROUNDS - 1, True), (plots.LEAST_ROUNDS, False)])
def test_points_of_few_rounds_are_hollow_and_the_title_says_so(rounds: int, hollow: bool) -> None:
    run = changed(SWEEP, lambda m: dataclasses.replace(m, values=m.values[:1] * rounds))
    figure = plots._against_classes(run, backward=True)
    assert figure is not None
    faces = {line.get_markerfacecolor() for line in figure.axes[0].lines if line.get_marker() == "o"}
    assert (faces == {"white"}) == hollow
    assert ("hollow" in figure._suptitle.get_text()) == hollow  # type: ignore[attr-defined]


def test_the_frontier_shows_every_workspace_and_the_peers_that_do_the_same_work() -> None:
    figure = plots._frontier(SWEEP)
    assert figure is not None
    (axes,) = figure.axes
    assert len(axes.lines[0].get_xdata()) == 5  # type: ignore[arg-type]
    assert "256 MiB" in [text.get_text() for text in axes.texts]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == 3  # ours, eager, torch; a sample of the classes is other work


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert plots.draw(dataclasses.replace(SWEEP, measurements=()), tmp_path) == []


def test_what_cannot_be_drawn_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "sweep.jsonl", SWEEP)
    assert main(["plots", str(path), str(path)]) == 2
    assert capsys.readouterr().err == f"bench: folder: {path} cannot be made a folder (File exists)\n"
    monkeypatch.setattr(plots, "unavailable", lambda: "matplotlib is not installed")
    assert main(["plots", str(path), str(tmp_path)]) == 2
    assert capsys.readouterr().err == "bench: matplotlib is not installed\n"
