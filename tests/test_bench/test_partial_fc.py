"""python -m bench.partial_fc: it runs, tells what it measured, times nothing that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import partial_fc
from bench.memory import unavailable
from bench.records import BYTES, SECONDS, load
from expface_kernels.distributed.sampling import Sampler


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written without a path stays out of the repository."""
    monkeypatch.chdir(tmp_path)


def test_it_measures_both_and_says_how_far_from_what_is_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert partial_fc.main(["--toy", "--rounds", "3"]) == 0
    run = load(tmp_path / "out" / "partial-fc.jsonl")
    assert run.complete
    seconds = {m.peer: m.values for m in run.measurements if m.what == SECONDS}
    assert {len(values) for values in seconds.values()} == {3}
    shares = partial_fc.ratios(run)
    for name, (against, _) in partial_fc.COMPARED.items():
        assert shares[name] == pytest.approx(sorted(seconds[name])[1] / sorted(seconds[against])[1])
    for first, second in ((partial_fc.STEP, partial_fc.STEP_SGD), (partial_fc.ALL, partial_fc.ALL_SGD)):
        assert all(a < b for a, b in zip(seconds[first], seconds[second], strict=True))
    if unavailable() is None:
        drawn = [m for m in run.measurements if m.what == BYTES]
        assert [m.case.classes for m in drawn] == [100_000, 1_000_000]
        assert all(m.values[0] >= 0 for m in drawn)
    out = capsys.readouterr().out
    for text in ("C=100,000", "wanted: under 0.16", "wrote out/partial-fc.jsonl"):
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
