"""The file of results, and the study from the command line: trained, stopped, continued."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from examples.glyphs.training import Recipe
from lab import noise_study, plan, pool
from lab.plan import FINAL, REMEDY, Run, StudyError
from lab.results import Results

RUN = Run(FINAL, "flip30", "expface", "exact", 0.7, 8.0, 0)
PART = ["--quick", "--conditions", "flip30", "--heads", "cosface-detached", "expface-exact"]


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "runs.jsonl", plan.quick())


def test_runs_come_back_as_they_went(results: Results) -> None:
    other = replace(RUN, m=None, margin="normface", mode="detached")
    assert results.load() == {}
    for value, run in enumerate((RUN, other)):
        results.append(run, {"result": value})
    assert {run: record["result"] for run, record in results.load().items()} == {RUN: 0, other: 1}
    assert results.missing([RUN, replace(RUN, seed=7)]) == [replace(RUN, seed=7)]
    with pytest.raises(StudyError, match=r"seed0\.scale: expected 24\.0, got 8\.0.*Nothing was changed"):
        results.missing([replace(RUN, scale=24.0)])


def test_a_file_of_another_configuration_is_refused(results: Results) -> None:
    results.append(RUN, {})
    other = Results(results.path, replace(plan.quick(), recipe=Recipe(epochs=3, batch=12)))
    with pytest.raises(
        StudyError, match=r"configuration\.recipe\.epochs: expected 3, got 2.*Nothing was changed"
    ):
        other.load()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"runs\.jsonl:2: expected JSON"),
        ("[1]", "expected an object, got list"),
        ('{"run": {}}', "fields"),
    ],
)
def test_a_damaged_line_is_named(results: Results, line: str, words: str) -> None:
    results.append(RUN, {})
    header, _ = results.path.read_text().splitlines()
    results.path.write_text(f"{header}\n{line}\n")
    with pytest.raises(StudyError, match=words):
        results.load()


def test_a_run_half_written_is_trained_again(results: Results) -> None:
    other = replace(RUN, seed=1)
    results.append(RUN, {})
    results.append(other, {})
    whole = results.path.read_bytes()
    for cut in (1, 20, len(whole) - 5):  # the second run, or even the header
        results.path.write_bytes(whole[:-cut])
        for run in results.missing([RUN, other]):
            results.append(run, {})
        assert results.path.read_bytes() == whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the quick study: one seed; then, with its last run half written, two seeds."""
    out = tmp_path_factory.mktemp("study")
    path = out / noise_study.RUNS
    assert noise_study.main(["run", *PART, "--seeds", "0", "--workers", "2", "--out", str(out)]) == 0
    before = path.read_text().splitlines()
    assert len(before) == 8  # the configuration, four trials, two final runs, one of the remedies series
    path.write_text("\n".join(before)[:-30])
    assert noise_study.main(["run", *PART, "--seeds", "0", "1", "--workers", "1", "--out", str(out)]) == 0
    after = path.read_text().splitlines()
    assert len(after) == 11
    assert after[:7] == before[:7]
    lost = json.loads(before[7])
    again = next(record for line in after[7:] if (record := json.loads(line))["run"] == lost["run"])
    assert again["result"] == lost["result"]
    return out


def test_a_finished_study_trains_nothing_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / noise_study.RUNS).read_bytes()
    assert noise_study.main(["run", *PART, "--seeds", "0", "1", "--out", str(folder)]) == 0
    assert noise_study.main(["plan", *PART, "--seeds", "0", "1", "2", "--out", str(folder)]) == 0
    assert "10 of 13 runs are there" in " ".join(capsys.readouterr().out.split())
    assert noise_study.main(["run", "--out", str(folder)]) == 2
    assert "configuration.characters: expected 1600, got 12" in capsys.readouterr().err
    assert (folder / noise_study.RUNS).read_bytes() == before


def test_a_run_is_stored_with_what_it_was_trained_on(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / noise_study.RUNS).read_text().splitlines()]
    assert lines[0]["configuration"] == plan.quick().as_json()
    run = Run(REMEDY, "flip30", "expface", "exact", 0.7, 32.0, 1).as_json()
    (record,) = [line for line in lines[1:] if line["run"] == run]
    assert record["machine"]["torch_threads"] == 1


def test_the_report_is_written_and_can_fill_a_page(folder: Path, tmp_path: Path) -> None:
    from lab import markdown

    assert noise_study.main(["report", *PART, "--out", str(folder)]) == 0
    pictures = {f"{name}.png" for name in ("accuracy", "angles", "gradient", "remedies")}
    assert {path.name for path in (folder / "report").iterdir()} == {"report.md", "report.json", *pictures}
    page = tmp_path / "analysis.md"
    page.write_text(f"before\n{markdown.BEGIN}\nstale\n{markdown.END}\nafter\n")
    assert noise_study.main(["report", *PART, "--out", str(folder), "--docs", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text
    assert "| ExpFace exact − CosFace |" in text
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == pictures


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--quick", "--heads", "cosface"], "got cosface"),
        (["run", "--quick", "--conditions", "flip99"], "got flip99"),
        (["run", "--quick", "--seeds", "1000"], "seeds: 1000 is reserved for tuning"),
        (["report", "--quick"], "no run on test is there yet"),
        (["run", "--quick", "--workers", "0"], "--workers: expected an integer of at least 1, got '0'"),
        (["run", "--quick", "--seeds", "x"], "--seeds: expected an integer of at least 0, got 'x'"),
        (["report", "--quick", "--out", "/dev/null"], "/dev/null"),
    ],
)
def test_bad_options_are_one_clear_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    try:
        status = noise_study.main([*arguments, *out])
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


def test_a_worker_that_fails_says_why_and_all_of_them_end() -> None:
    good = Run(FINAL, "clean", "cosface", "detached", 0.2, 8.0, 0)
    bad = replace(good, m=-5.0, seed=1)
    with pytest.raises(StudyError, match=r"final-clean-cosface-detached-seed1: .*CosFace: m must be"):
        for _ in pool.train_all([bad, good], plan.quick(), 1):
            pass
    assert not pool.multiprocessing.active_children()
