"""`curves` on the command line: pictures, table, JSON, and one line for bad input."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expface_kernels.__main__ import main
from expface_kernels.analysis import plots
from expface_kernels.analysis.curves import similarity
from expface_kernels.margin_spec import MARGINS

VIEWS = ("similarity", "penalty_cosine", "penalty_angle", "target_gradient", "pull", "decision_boundary")


class Mine:
    """A margin of one's own, to be named on the command line."""

    def __call__(self, theta: Tensor) -> Tensor:
        return torch.cos(theta) - 0.1 * theta

    def __repr__(self) -> str:
        return "Mine([red])"


def broken(theta: Tensor) -> Tensor:
    return 1 / theta


def raising(theta: Tensor) -> Tensor:
    raise KeyError("angle")


def test_all_margins_are_drawn_side_by_side_and_the_table_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["curves", "--out", str(tmp_path / "a" / "b"), "--json", str(tmp_path / "c.json")]
    assert main([*arguments, "--margin", f"{__name__}:Mine", "--margin", "arcface:0.3"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "ExpFace(m=0.7)",
        "23.5 at 54.8",
        "68.9–180.0",
        "turns at 151.4",
        "vanishes at 120.0",
        "Mine([red])",
    ):
        assert words in printed
    files = sorted((tmp_path / "a" / "b").iterdir())
    assert [file.stem for file in files] == sorted(VIEWS)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    data = json.loads((tmp_path / "c.json").read_text())
    assert data["unit"] == "radians"
    names = [repr(make()) for make in MARGINS.values()]
    assert [row["margin"] for row in data["margins"]] == [
        *names,
        "Mine([red])",
        "ArcFace(m=0.3, boundary='none')",
    ]
    assert data["margins"][0]["angular_peak"]["start"] == pytest.approx(math.pi * 0.7 ** (1 / 0.3))


def test_only_the_named_margins_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curves", "--only", "--margin", "cosface:0.2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "CosFace(m=0.2)" in printed
    assert "ExpFace" not in printed


def test_a_picture_holds_a_line_for_each_margin_with_its_values() -> None:
    margins = [make() for make in MARGINS.values()]
    figure = plots.view_figure(plots.VIEWS["similarity"], margins)
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == [repr(margin) for margin in margins]
    for line, margin in zip(lines, margins, strict=True):
        theta = torch.deg2rad(torch.as_tensor(line.get_xdata())).clamp_max(math.pi)
        torch.testing.assert_close(torch.as_tensor(line.get_ydata()), similarity(margin, theta))
    assert tuple(plots.VIEWS) == VIEWS
    both = plots.view_figure(plots.VIEWS["target_gradient"], margins)
    assert [axes.get_title() for axes in both.axes] == ["Exact target gradient", "Detached target gradient"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--margin", "softface"], "got 'softface'"),
        (["--margin", "arcface:30"], "radians, not degrees"),
        (["--only", "--margin", f"{__name__}:broken"], "finite psi on [0, π], got inf at theta = 0"),
        (["--only", "--margin", f"{__name__}:raising"], "'angle'"),
        (["--margin", f"{__name__}:missing"], "has no attribute 'missing'"),
        (["--only"], "argument --only: expected at least one --margin"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (
            ["--json", "/nowhere/at/all.json"],
            "expected a file in a directory that exists, got '/nowhere/at/all.json'",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    try:
        code: object = main(["curves", "--out", str(out), *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert not out.exists()


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr("expface_kernels.analysis.plots")
    monkeypatch.delitem(sys.modules, "expface_kernels.analysis.plots")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["curves", "--out", str(tmp_path)]) == 2
    assert "pip install 'expface_kernels[analysis]'" in capsys.readouterr().err


def test_the_analysis_imports_neither_matplotlib_nor_rich() -> None:
    code = "import sys, expface_kernels.analysis; print({'matplotlib', 'rich'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "set()"
