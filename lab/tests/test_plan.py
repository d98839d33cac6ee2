"""What the study trains, and one run of it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from examples.glyphs import dataset
from examples.glyphs.training import TrainingError
from lab import noise_study, plan, training
from lab.heads import MODES
from lab.plan import FINAL, FOLLOWUP, REMEDY, TUNING, Run, StudyError
from lab.results import Results

DECIMAL = 0.05  # seconds have one decimal
RUN = Run(FINAL, "flip30", "expface", "exact", 0.7, 8.0, 0)


def test_the_study_is_the_one_that_is_described() -> None:
    configuration = plan.full()
    assert {len(trials) for trials in configuration.trials.values()} == {6}
    tuned = {key: configuration.trials[key[0][0]][0] for key in plan.tunings(plan.CELLS)}
    on_test = plan.test_runs(configuration, plan.CELLS, plan.SEEDS, tuned)
    runs = [*plan.tuning_runs(configuration, plan.CELLS), *on_test]
    stages = (FINAL, REMEDY, FOLLOWUP, TUNING)
    assert [sum(run.stage == stage for run in runs) for stage in stages] == [96, 48, 21, 96]
    assert len({run.name for run in runs}) == len(runs)
    for condition in plan.CONDITIONS:
        final = {run.head for run in on_test if run.stage == FINAL and run.condition == condition}
        assert final == set(plan.HEADS)
        assert {run.seed for run in on_test if run.condition == condition} == {0, 1, 2}
    assert configuration.tuning_seed not in plan.SEEDS
    assert {run.mode for run in on_test if run.stage == REMEDY} == set(MODES)
    assert sum(plan.images(run, configuration) for run in runs) == 165 * 320_000 + 96 * 63_488


def test_followup_runs_take_the_better_m_of_the_committed_trials_at_their_scale() -> None:
    """Exact ArcFace under noise is the exception: its m is chosen for its slope."""
    records = Results(noise_study.FULL_FOLDER / noise_study.RUNS, plan.full()).load()
    for (condition, head), (m, scale) in plan.FOLLOWUPS.items():
        scores = plan.trial_scores(records, head, plan.CONDITIONS[condition].tuned_under)
        best = max((entry for entry in scores if entry[1] == scale), key=lambda entry: scores[entry])
        assert (best == (m, scale)) == ((condition, head) != ("flip30", ("arcface", "exact")))


def test_open_set_characters_are_in_no_other_part_of_the_data(glyphs: dataset.Glyphs) -> None:
    configuration = plan.full()
    known = glyphs.train.subset(configuration.characters, configuration.fonts)
    open_set = glyphs.train.subset(
        configuration.open_set_characters, configuration.fonts, skip=configuration.characters
    )
    parts = [known.characters, open_set.characters, glyphs.validation.characters, glyphs.test.characters]
    assert [len(part) for part in parts] == [1600, 600, 250, 500]
    assert len(set("".join(parts))) == sum(len(part) for part in parts)


@pytest.mark.parametrize(("condition", "share"), [("flip15", 0.15), ("flip30", 0.3), ("open30", 0.3)])
def test_noise_is_as_the_condition_says_and_the_same_for_every_head(
    glyphs: dataset.Glyphs, condition: str, share: float
) -> None:
    def samples(**changes: Any) -> training.Samples:
        return training.training_samples(glyphs.train, plan.quick(), replace(RUN, **changes))

    clean, noisy, other = (
        samples(condition="clean"),
        samples(condition=condition),
        samples(condition=condition, margin="cosface"),
    )
    assert not clean.is_noisy.any()
    assert int(noisy.is_noisy.sum()) == round(share * len(noisy.labels))
    assert torch.equal(noisy.is_noisy, other.is_noisy)
    assert torch.equal(noisy.labels, other.labels)
    changed = (noisy.labels != clean.labels) | (noisy.images != clean.images).flatten(1).any(1)
    assert torch.equal(changed, noisy.is_noisy)
    assert not torch.equal(noisy.is_noisy, samples(condition=condition, seed=1).is_noisy)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, ["flip99"]), "conditions: expected some of clean, flip15, flip30, open30, got flip99"),
        (([("expface", "floored")], ["clean"]), "no part of the study has both"),
    ],
)
def test_parts_that_do_not_exist_are_named(arguments: tuple[Any, Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        plan.cells(*arguments)
    with pytest.raises(StudyError, match=r"expected some of normface-detached, .*, got arcface"):
        plan.head_named("arcface")


def test_a_run_repeats_itself_and_tuning_never_looks_at_test(glyphs: dataset.Glyphs) -> None:
    configuration = plan.quick()
    without_test = replace(plan.evaluated(glyphs, configuration), test=None)  # type: ignore[arg-type]
    run = Run(TUNING, "flip30", "expface", "exact", 0.7, 8.0, configuration.tuning_seed)
    first, second = (training.train_run(without_test, configuration, run) for _ in range(2))
    assert first["evaluated_on"] == "validation"
    assert first["result"] == second["result"]
    assert first["epochs"] == second["epochs"]
    assert 0 < first["epochs"][0]["gradient_share"] < 1


def test_a_final_run_looks_at_test_alone_and_follows_its_schedule(glyphs: dataset.Glyphs) -> None:
    configuration = plan.quick()
    without_validation = replace(plan.evaluated(glyphs, configuration), validation=None)  # type: ignore[arg-type]
    run = Run(REMEDY, "flip30", "expface", "later", 0.7, 32.0, 0)
    record = training.train_run(without_validation, configuration, run)
    assert record["evaluated_on"] == "test"
    assert set(record["result"]["tar"]) == {"0.01", "0.001", "0.0001"}
    assert [epoch["target_gradient"] for epoch in record["epochs"]] == ["detached", "exact"]


def test_a_run_counts_processor_time_not_waiting(
    glyphs: dataset.Glyphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "follow_schedule", lambda *arguments: time.sleep(0.2))
    part = plan.evaluated(glyphs, plan.quick())
    wall, core = time.perf_counter(), time.process_time()
    record = training.train_run(part, plan.quick(), RUN)
    wall, core = time.perf_counter() - wall, time.process_time() - core
    assert 0 <= record["seconds"] <= core + DECIMAL
    assert wall - core > 2 * DECIMAL  # which the wall clock would have failed


def test_a_training_that_diverges_is_a_result(
    glyphs: dataset.Glyphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*arguments: Any) -> Any:
        raise TrainingError("the loss is nan at step 3 of 8: training diverged")
        yield

    monkeypatch.setattr(training, "train", diverge)
    record = training.train_run(glyphs, plan.quick(), RUN)
    assert record["result"] is None
    assert "diverged" in record["failed"]


def test_the_best_trial_is_chosen_for_each_condition_and_ties_go_to_the_first() -> None:
    configuration, head = plan.quick(), ("cosface", "detached")
    cells = plan.cells([head], ["clean", "flip15"])
    low, high = configuration.trials["cosface"]
    scores = {("clean", low): 0.6, ("clean", high): 0.6, ("flip30", low): 0.2, ("flip30", high): 0.3}
    runs = plan.tuning_runs(configuration, cells)
    records = {run: {"result": {"tar": {"0.001": scores[run.condition, (run.m, run.scale)]}}} for run in runs}
    assert plan.tune(configuration, records, cells) == {(head, "clean"): low, (head, "flip30"): high}
    diverged = {run: {"result": None} if run.m == high[0] else record for run, record in records.items()}
    assert plan.tune(configuration, diverged, cells)[head, "flip30"] == low
    with pytest.raises(StudyError, match="cosface-detached, flip30: 1 of its trials"):
        plan.tune(configuration, dict(list(records.items())[:-1]), cells)
