"""The report's numbers from runs that were made up; intervals; and the page of the committed results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab import markdown as report
from lab import noise_study, plan
from lab.intervals import Difference, bootstrap_interval, paired_difference
from lab.markdown import markdown
from lab.plan import FINAL, TUNING, Run, StudyError
from lab.results import Results
from lab.tables import compared_gradients, tables
from tests.tolerances import BOOTSTRAP_COVERAGE

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


def test_shares_of_the_trials_are_sorted() -> None:
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


def test_the_page_and_its_results_agree() -> None:
    results = Results(noise_study.FULL_FOLDER / noise_study.RUNS, plan.full())
    page = noise_study.DOCS.read_text(encoding="utf-8")
    text = markdown(tables(plan.full(), results.load()), report.FIGURES)
    assert report.filled(page, text, noise_study.DOCS) == page


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_intervals_cover_what_they_promise(n: int) -> None:
    samples = np.random.default_rng(7).normal(0.3, 2.0, (1500, n))
    intervals = np.array([bootstrap_interval(values) for values in samples])
    covered = ((intervals[:, 0] <= 0.3) & (intervals[:, 1] >= 0.3)).mean()
    assert abs(covered - 0.95) < BOOTSTRAP_COVERAGE


def test_differences_are_paired_by_seed() -> None:
    noise = {0: 0.1, 1: 0.5, 2: -0.3, 3: 0.2}
    a = {seed: 0.7 + value for seed, value in noise.items()}
    b = {seed: 0.69 + value for seed, value in noise.items() if seed != 3}
    found = paired_difference(a, b)
    assert found is not None
    assert found.n == 3
    assert found.mean == pytest.approx(0.01)
    assert found.low == pytest.approx(0.01)  # what the seeds share cancels
    assert paired_difference(a, {9: 1.0}) is None
    single = paired_difference({0: 0.5}, {0: 0.4})
    assert single is not None
    assert single.low is None


@pytest.mark.parametrize(
    ("difference", "higher", "decided"),
    [
        (Difference(3, 0.03, 0.02, 0.04), "a", True),
        (Difference(3, -0.03, -0.04, -0.02), "b", True),
        (Difference(3, 0.0, -0.01, 0.01), None, True),
        (Difference(3, 0.3, 0.2, 0.4), "a", False),
        (Difference(2, 0.03, 0.03, 0.03), None, False),  # two seeds that agree by chance
        (Difference(1, 0.03, None, None), None, False),
    ],
)
def test_what_is_decided_and_which_is_higher(
    difference: Difference, higher: str | None, decided: bool
) -> None:
    assert (difference.higher, difference.decided(0.02)) == (higher, decided)
