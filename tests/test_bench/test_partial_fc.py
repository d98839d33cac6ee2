"""python -m bench.partial_fc: it runs, tells what it measured, times nothing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import partial_fc
from bench.memory import unavailable
from expface_kernels.distributed.sampling import Sampler


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written without a path stays out of the repository."""
    monkeypatch.chdir(tmp_path)


def test_it_measures_both_and_says_how_far_from_what_is_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out" / "partial-fc.json"
    assert partial_fc.main(["--toy", "--rounds", "3"]) == 0
    found = json.loads(file.read_text())
    for name, wanted in (("draw", 0.05), ("step", 0.16), ("step with SGD", 0.16)):
        assert found[name]["wanted"] == wanted
        first, second = found[name]["seconds"].values()
        assert len(first) == len(second) == 3
        assert min(*first, *second) > 0
        assert found[name]["ratio"] == pytest.approx(sorted(first)[1] / sorted(second)[1])
    without, with_sgd = found["step"]["seconds"], found["step with SGD"]["seconds"]
    assert all(a < b for name in without for a, b in zip(without[name], with_sgd[name], strict=True))
    assert list(found["draw_bytes"]) == ["100000", "1000000"]
    if unavailable() is None:
        assert all(peak >= 0 for peak in found["draw_bytes"].values())
    out = capsys.readouterr().out
    for text in (
        "Drawing S=1,000 of C=100,000",
        "wanted: under 0.16",
        "peak memory",
        "wrote out/partial-fc.json",
    ):
        assert text in out


def test_a_wrong_step_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = Sampler.__call__

    def another(self: Sampler, targets: torch.Tensor, num_local: int) -> Any:
        return call(Sampler(self.rate, self.seed, self.step + 1, self.rank), targets, num_local)

    monkeypatch.setattr(partial_fc, "Sampler", lambda *arguments: lambda *a: another(Sampler(*arguments), *a))
    assert partial_fc.main(["--toy"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bench.partial_fc: nothing timed, a sampled step is wrong: loss is off by ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--json", "no/such/folder/x.json"], "--json"),
        (["--json", "."], "--json"),
        (["--sizes"], "sizes"),
        (["--classes", "0"], "--classes 0"),
        (["--rounds", "many"], "many"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        partial_fc.main(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("bench.partial_fc: ")
    assert named in err
    assert err.count("\n") == 1


def test_a_file_that_may_not_be_written_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.commands.options.os.access", lambda path, mode: False)
    with pytest.raises(SystemExit) as stop:
        partial_fc.main(["--toy", "--json", str(tmp_path / "x.json")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"bench.partial_fc: --json: {tmp_path} cannot be written\n"
