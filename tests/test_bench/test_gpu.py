"""What a GPU adds to the benchmark, as far as it can be seen without one."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import cuda, memory, plans, roofline, show
from bench.__main__ import main
from bench.cases import Case
from bench.commands import sweep as command
from bench.sweep import Plan, Run, Stop
from bench.sweep_result import Point, Sweep
from expface_kernels.workshop import autotune, costs

CARD = "NVIDIA H100 80GB HBM3"
CASE = Case(256, 100_000, 512, device="cuda", autocast="bfloat16")


@pytest.mark.parametrize(
    ("card", "name"),
    [(CARD, "h100"), ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA GeForce", None)],
)
def test_cards_are_known_by_what_their_driver_calls_them(card: str, name: str | None) -> None:
    assert roofline.gpu_of(card) == name
    seconds = roofline.seconds(CASE, 0, card)
    assert (seconds is None) == (name is None)
    if name is not None and seconds is not None:
        # No less than the products take: four of 2·B·C·D at 16 bit.
        assert seconds >= 8 * CASE.rows * CASE.classes * CASE.features / (costs.GPUS[name].half * 1e12)


def test_the_roofline_is_that_of_ours_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Plan((Stop(CASE, ("ours@0",)),), (), (True,), 1, 1, ""), show.Silent())
    run._machine = {"gpu": {"card": CARD}}
    assert run._roofline(Point("ours@0", "", CASE)) == roofline.seconds(CASE, 0, CARD)
    assert run._roofline(Point("eager", "", CASE)) is None
    assert run._roofline(Point("ours@0", "", dataclasses.replace(CASE, backward=False))) is None
    assert run._roofline(Point("ours@0", "", dataclasses.replace(CASE, device="cpu"))) is None


def test_the_command_writes_one_file_with_the_cards_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU in place of the card; everything else is what runs there."""
    small = dataclasses.replace(plans.TOY.grid, rows=(4, 8), classes=(100, 200))
    preset = dataclasses.replace(plans.GPU, grid=small, rounds=2)
    monkeypatch.setattr(plans, "GPU", preset)
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "describe", lambda: {"card": CARD})
    monkeypatch.setattr(memory, "unavailable", lambda device: "not here")
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["gpu", "--peers", "ours", "eager", "liger"]) == 0
    (path,) = tmp_path.glob("*.json")
    assert path.name == "gpu-nvidia-h100-80gb-hbm3.json"
    drawn = {file.name for file in (tmp_path / "out" / "bench-gpu").iterdir()}
    assert drawn == {"classes-seconds.png", "speedups.png"}  # no memory was measured here
    found = Sweep.from_data(json.loads(path.read_text()))
    assert found.complete
    shapes = {(p.case.rows, p.case.classes) for p in found.points if p.seconds}
    assert shapes == {(4, 100), (4, 200), (8, 100), (8, 200)}
    assert "liger" in capsys.readouterr().out


def test_without_a_gpu_it_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda: "there is no GPU")
    assert main(["gpu"]) == 2
    assert capsys.readouterr().err == "bench: there is no GPU\n"


def test_nvidia_smi_that_fails_leaves_blanks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(cuda.subprocess, "run", fail)
    assert set(cuda.smi().values()) == {None}


def test_one_target_tunes_and_measures_within_ten_minutes() -> None:
    text = (Path(__file__).parents[2] / "Makefile").read_text()
    recipe = re.search(
        r"^bench-gpu:.*\n\t-\$\(PY\) -m (\S+) --seconds (\d+)\n\t\$\(PY\) -m bench gpu$", text, re.M
    )
    assert recipe is not None
    assert recipe[1] == autotune.__name__
    assert int(recipe[2]) + plans.GPU.seconds <= 570
