"""The label-noise study from the command line: trained, stopped, gone on with, reported; and its page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from lab.store import Store

from examples.glyphs import noise_study
from lab import plan, report, workers
from lab.markdown import markdown
from lab.plan import FINAL, REMEDY, TUNING, Run, StudyError
from lab.tables import compared_gradients, tables

PART = ["--quick", "--conditions", "flip30", "--heads", "cosface-detached", "expface-exact"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the quick study: one seed; then, with one run taken away again as by a stop, two seeds."""
    out = tmp_path_factory.mktemp("study")
    assert noise_study.main(["run", *PART, "--seeds", "0", "--workers", "2", "--out", str(out)]) == 0
    before = contents(out)
    assert len(before) == 8  # four trials, two final runs, one of the mending series, the configuration
    gone = out / "runs" / "final-flip30-cosface-detached-seed0.json"
    gone.unlink()
    assert noise_study.main(["run", *PART, "--seeds", "0", "1", "--workers", "1", "--out", str(out)]) == 0
    after = contents(out)
    assert len(after) == 11
    result = json.loads(after[gone])["result"]
    assert result == json.loads(before.pop(gone))["result"]
    assert all(after[path] == text for path, text in before.items())
    return out


def contents(out: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in out.rglob("*.json")}


def test_a_stopped_study_goes_on_where_it_was(folder: Path) -> None:
    """What the fixture saw; and nothing is trained twice, nothing half written is left."""
    assert not list(folder.rglob("*.part"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise_study, "train_all", lambda *arguments: pytest.fail("trained again"))
        assert noise_study.main(["run", *PART, "--seeds", "0", "1", "--out", str(folder)]) == 0


def test_every_run_carries_its_whole_configuration(folder: Path) -> None:
    record = json.loads((folder / "runs" / "mend-flip30-expface-exact-seed1.json").read_text())
    assert record["configuration"] == plan.quick().as_json()
    assert record["run"] == Run(REMEDY, "flip30", "expface", "exact", 0.7, 32.0, 1).as_json()
    assert record["machine"]["torch_threads"] == 1
    assert record["machine"]["torch"]


def test_another_configuration_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder)
    assert noise_study.main(["run", "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "configuration.characters: expected 1600, got 12" in error
    assert contents(folder) == before


def test_the_plan_counts_what_is_left(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder)
    assert noise_study.main(["plan", *PART, "--seeds", "0", "1", "2", "--out", str(folder)]) == 0
    assert "10 of 13 runs are there" in " ".join(capsys.readouterr().out.split())
    assert contents(folder) == before


def test_the_report_is_written_and_can_fill_a_page(folder: Path, tmp_path: Path) -> None:
    assert noise_study.main(["report", *PART, "--out", str(folder)]) == 0
    written = folder / "report"
    assert {path.name for path in written.iterdir()} == {
        "report.md",
        "report.json",
        *(f"{name}.png" for name in ("accuracy", "angles", "gradient", "mending")),
    }
    page = tmp_path / "analysis.md"
    page.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    assert noise_study.main(["report", *PART, "--out", str(folder), "--docs", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text
    assert "| ExpFace exact − CosFace |" in text
    found = json.loads((written / "report.json").read_text())
    assert report.block(found) in text
    assert all((tmp_path / "pictures" / f"{name}.png").is_file() for name in found["pictures"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--quick", "--heads", "cosface"], "got cosface"),
        (["run", "--quick", "--conditions", "flip99"], "got flip99"),
        (["run", "--quick", "--seeds", "1000"], "seeds: 1000 is the one that m and s are chosen with"),
        (["report", "--quick"], "no run on test is there yet"),
    ],
)
def test_bad_options_are_one_clear_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert noise_study.main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--seeds", "-1"], ["--seeds", "x"]])
def test_bad_numbers_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        noise_study.main(["run", "--quick", *arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_worker_that_fails_says_why_and_all_of_them_end(tmp_path: Path) -> None:
    good = Run(FINAL, "clean", "cosface", "detached", 0.2, 8.0, 0)
    bad = Run(FINAL, "clean", "cosface", "detached", -5.0, 8.0, 1)
    with pytest.raises(
        StudyError, match=r"final-clean-cosface-detached-seed1: ValueError: CosFace: m must be"
    ):
        for _ in workers.train_all([bad, good], "quick", tmp_path, 1):
            pass
    assert not list(tmp_path.rglob("*.json"))


# The report's numbers, from runs that were made up


def record(tar: float, shares: tuple[float, float] = (0.3, 0.4)) -> dict[str, Any]:
    """A run with two epochs, of which only what is looked at was filled in."""
    group = {"angle_mean": 60.0, "angle_percentiles": [40.0, 50.0, 60.0, 70.0, 80.0], "accuracy": 0.5}
    epochs = [
        {
            "epoch": number,
            "scale": 8.0,
            "gradient_share": share,
            "push_share": share,
            "clean": {**group, "histogram": [1] * 45},
            "noisy": {**group, "angle_mean": 90.0, "histogram": [2] * 45},
        }
        for number, share in enumerate(shares, 1)
    ]
    result = {"tar": {"0.01": 0.9, "0.001": tar, "0.0001": 0.1}, "auc": 0.99, "rank1": 0.8}
    machine = {"cpu": "some", "torch": "2"}
    return {"result": result, "failed": None, "epochs": epochs, "seconds": 1800.0, "machine": machine}


def made_up() -> dict[Run, dict[str, Any]]:
    runs = {}
    for seed, (a, b) in enumerate([(0.700, 0.650), (0.720, 0.671), (0.710, 0.659)]):
        runs[Run(FINAL, "flip30", "expface", "exact", 0.7, 8.0, seed)] = record(a, (0.3, 0.35))
        runs[Run(FINAL, "flip30", "arcface", "exact", 0.5, 8.0, seed)] = record(b, (0.3, 0.45 + seed / 100))
    return runs


def test_tables_are_means_deviations_and_paired_differences() -> None:
    found = tables(plan.quick(), made_up())
    (arcface, expface) = found["accuracy"]
    assert expface["TAR@1e-3"] == {"mean": 0.71, "deviation": 0.01}
    assert arcface["TAR@1e-3"]["mean"] == 0.66
    (difference,) = found["differences"]
    assert (difference["a"], difference["b"], difference["n"]) == ("ExpFace exact", "ArcFace exact", 3)
    assert difference["mean"] == 0.05
    assert 0.04 < difference["low"] < 0.05 < difference["high"] < 0.06
    assert difference["decided"]
    assert difference["higher"] == "a"
    assert [row["mean"] for row in found["gradient_differences"]] == [0.0, -0.11]
    assert found["core_hours"] == 3.0
    (noise, _) = found["noise"]
    assert noise["epochs"][0]["noisy"]["histogram"] == [6] * 45
    text = markdown(found, "there")
    assert "| ExpFace exact − ArcFace exact | +5.0 [" in text
    assert "**ExpFace exact higher** |" in text
    assert "| 30% flipped | ArcFace exact | 0.5 | 8 | 3 | " in text
    assert "| 30% flipped | ArcFace exact | 30 / 30 | 46 / 46 |" in text


def test_what_was_compared_at_two_scales_says_so() -> None:
    runs = {
        dataclasses.replace(run, scale=14.0) if run.margin == "arcface" else run: result
        for run, result in made_up().items()
    }
    assert "**ExpFace exact higher** (s = 8 against 14) |" in markdown(tables(plan.quick(), runs), "there")


def test_shares_of_the_tries_at_one_scale_the_least_first() -> None:
    tried = Run(TUNING, "flip30", "expface", "exact", 0.8, 8.0, 1000)
    runs = {
        tried: record(0.5, (0.3, 0.4)),
        dataclasses.replace(tried, m=0.7): record(0.5, (0.3, 0.35)),
        dataclasses.replace(tried, scale=14.0): record(0.5, (0.3, 0.1)),
    }
    text = markdown(tables(plan.quick(), runs), "there")
    table = "| ExpFace exact | 0.7 | 35 / 35 |\n| ExpFace exact | 0.8 | 40 / 40 |"
    assert "one seed, epoch 2 | m | " in text
    assert table in text
    assert "10 / 10" not in text


def test_gradients_are_compared_where_the_claim_is_about_them() -> None:
    found = compared_gradients()
    # Noisy conditions; CosFace and ArcFace for either target gradient; exact ArcFace once more, at another m.
    assert len(found) == 3 * 4 + 1
    assert {(a[2][0], b[2][0]) for a, b in found} == {("expface", "cosface"), ("expface", "arcface")}
    assert all(a[1] == b[1] != "clean" for a, b in found)


def test_a_wide_difference_is_called_undecided_whatever_its_mean() -> None:
    runs = made_up()
    runs[Run(FINAL, "flip30", "expface", "exact", 0.7, 8.0, 2)] = record(0.5)
    found = tables(plan.quick(), runs)
    assert not found["differences"][0]["decided"]
    assert "] undecided |" in markdown(found, "there")
    assert "1 of 1 differences are undecided" in report.more_seeds(found)
    assert "--seeds 3 4 --conditions flip30 --heads arcface-exact expface-exact" in report.more_seeds(found)


def test_nothing_is_compared_where_a_training_diverged() -> None:
    runs = made_up()
    diverged = Run(FINAL, "flip30", "expface", "exact", 0.7, 8.0, 2)
    runs[diverged] = {**runs[diverged], "result": None, "failed": "the loss is nan", "epochs": []}
    found = tables(plan.quick(), runs)
    assert found["differences"][0]["mean"] is None
    assert "| 3 (1 diverged) |" in markdown(found, "there")
    assert "none undecided" in markdown(found, "there")


def test_a_page_without_its_marks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"page\.md: expected the lines"):
        report.filled("no marks", "inside", tmp_path / "page.md")


def test_the_page_says_what_the_committed_runs_say() -> None:
    """Or, until there are any, that there are none."""
    configuration = plan.full()
    store = Store(noise_study.FULL_FOLDER, configuration)
    if (store.folder / "study.json").exists():
        store.open()
    page = noise_study.DOCS.read_text(encoding="utf-8")
    assert (
        report.filled(page, report.block(tables(configuration, store.load_all())), noise_study.DOCS) == page
    )
