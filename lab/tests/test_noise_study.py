"""The label-noise study's parts: the plan, one run, the folder, choice, statistics."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from lab.data import training_rows
from lab.statistics import Difference, bootstrap_interval, paired_difference
from lab.store import SCHEMA, Store

from examples.glyphs import augment, dataset, model, noise_study
from examples.glyphs.training import Recipe, TrainingError
from lab import choice, heads, plan, training
from lab.heads import MODES
from lab.plan import FINAL, FOLLOWUP, REMEDY, TUNING, Run, StudyError
from tests.tolerances import BOOTSTRAP_COVERAGE

DECIMAL = 0.05  # seconds have one decimal
RUN = Run(FINAL, "flip30", "expface", "exact", 0.7, 8.0, 0)


@pytest.fixture(scope="module")
def glyphs() -> dataset.Glyphs:
    return dataset.load()


# The plan


def test_the_study_is_the_one_that_is_described() -> None:
    configuration = plan.full()
    assert {len(trials) for trials in configuration.trials.values()} == {6}
    chosen = {key: configuration.trials[key[0][0]][0] for key in plan.tunings(plan.CELLS)}
    judged = plan.judged_runs(configuration, plan.CELLS, plan.SEEDS, chosen)
    runs = [*plan.tuning_runs(configuration, plan.CELLS), *judged]
    stages = (FINAL, REMEDY, FOLLOWUP, TUNING)
    assert [sum(run.stage == stage for run in runs) for stage in stages] == [96, 48, 21, 96]
    assert len({run.name for run in runs}) == len(runs)
    for condition in plan.CONDITIONS:
        heads = {run.head for run in judged if run.stage == FINAL and run.condition == condition}
        assert heads == set(plan.HEADS)
        assert {run.seed for run in judged if run.condition == condition} == {0, 1, 2}
    assert configuration.tuning_seed not in plan.SEEDS
    assert {run.mode for run in judged if run.stage == REMEDY} == set(MODES)
    assert sum(plan.images(run, configuration) for run in runs) == 165 * 320_000 + 96 * 63_488


def test_further_runs_take_the_better_m_of_the_committed_tries_at_their_scale() -> None:
    """Exact ArcFace under wrong labels is the exception: its m is chosen for its slope."""
    records = Store(noise_study.FULL_FOLDER, plan.full()).load_all()
    for (condition, head), (m, scale) in plan.FOLLOWUPS.items():
        tried = choice.scores(records, head, plan.CONDITIONS[condition].chosen_under)
        best = max((entry for entry in tried if entry[1] == scale), key=lambda entry: tried[entry])
        if (condition, head) == ("flip30", ("arcface", "exact")):
            assert best != (m, scale)
        else:
            assert best == (m, scale)


def constants(module: ModuleType) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name.isupper() and name != "F"}


def test_what_decides_a_result_but_is_in_no_run_changes_with_the_schema_alone() -> None:
    """Else a folder begun with other values would go on as if they were the same."""
    found = {
        "conditions": {
            name: (entry.kind, entry.share, entry.chosen_under) for name, entry in plan.CONDITIONS.items()
        },
        "schedules": (heads.SCHEDULE_END, heads.FIRST_SCALE),
        "network": constants(model),
        "distortions": constants(augment),
    }
    pinned = {
        "conditions": {
            "clean": ("clean", 0.0, "clean"),
            "flip15": ("flipped", 0.15, "flip30"),
            "flip30": ("flipped", 0.3, "flip30"),
            "open30": ("outsiders", 0.3, "flip30"),
        },
        "schedules": (0.5, 0.25),
        "network": {
            "EMBEDDING_SIZE": 128,
            "WIDTHS": (16, 32, 64, 128),
            "INK_MEAN": 0.3,
            "INK_SCALE": 0.35,
        },
        "distortions": {
            "ANGLE": 0.12,
            "SCALE": 1.02,
            "LOG_SCALE": 0.14,
            "SHEAR": 0.15,
            "SHIFT": 0.08,
            "ELASTIC": 0.05,
            "ELASTIC_GRID": 5,
            "STROKE": 0.6,
            "BLUR": 0.8,
            "FADE": 0.3,
            "NOISE": 0.15,
        },
    }
    assert (SCHEMA, found) == (1, pinned), "raise SCHEMA when one of these changes, then both here"


def test_outsiders_are_in_no_other_part_of_the_data(glyphs: dataset.Glyphs) -> None:
    configuration = plan.full()
    known = glyphs.train.subset(configuration.characters, configuration.fonts)
    outsiders = glyphs.train.subset(
        configuration.open_set_characters, configuration.fonts, skip=configuration.characters
    )
    parts = [known.characters, outsiders.characters, glyphs.validation.characters, glyphs.test.characters]
    assert [len(part) for part in parts] == [1600, 600, 250, 500]
    assert len(set("".join(parts))) == sum(len(part) for part in parts)


def test_rows_are_wrong_as_the_condition_says_and_alike_for_every_head(glyphs: dataset.Glyphs) -> None:
    configuration = plan.quick()
    clean = training_rows(glyphs.train, configuration, replace(RUN, condition="clean"))
    assert not clean.is_noisy.any()
    for condition, share in (("flip15", 0.15), ("flip30", 0.3), ("open30", 0.3)):
        rows = training_rows(glyphs.train, configuration, replace(RUN, condition=condition))
        other = training_rows(
            glyphs.train, configuration, replace(RUN, condition=condition, margin="cosface")
        )
        assert int(rows.is_noisy.sum()) == round(share * len(rows.labels))
        assert torch.equal(rows.is_noisy, other.is_noisy)
        assert torch.equal(rows.labels, other.labels)
        changed = (rows.labels != clean.labels) | (rows.images != clean.images).flatten(1).any(1)
        assert torch.equal(changed, rows.is_noisy)
        assert not torch.equal(
            rows.is_noisy,
            training_rows(glyphs.train, configuration, replace(RUN, condition=condition, seed=1)).is_noisy,
        )


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


def test_an_unknown_head_is_named_with_those_there_are() -> None:
    with pytest.raises(StudyError, match=r"expected some of normface-detached, .*, got arcface"):
        plan.head_named("arcface")


# One run


def test_a_run_repeats_itself_and_a_choice_never_looks_at_test(glyphs: dataset.Glyphs) -> None:
    configuration = plan.quick()
    without_test = replace(plan.evaluated(glyphs, configuration), test=None)  # type: ignore[arg-type]
    run = Run(TUNING, "flip30", "expface", "exact", 0.7, 8.0, configuration.tuning_seed)
    first, second = (
        training.train_run(without_test, configuration, run, lambda step: None) for _ in range(2)
    )
    assert first["judged_on"] == "validation"
    assert first["result"] == second["result"]
    assert first["epochs"] == second["epochs"]
    assert 0 < first["epochs"][0]["gradient_share"] < 1


def test_a_final_run_looks_at_test_alone_and_follows_its_schedule(glyphs: dataset.Glyphs) -> None:
    configuration = plan.quick()
    without_validation = replace(plan.evaluated(glyphs, configuration), validation=None)  # type: ignore[arg-type]
    run = Run(REMEDY, "flip30", "expface", "later", 0.7, 32.0, 0)
    record = training.train_run(without_validation, configuration, run, lambda step: None)
    assert record["judged_on"] == "test"
    assert set(record["result"]["tar"]) == {"0.01", "0.001", "0.0001"}
    assert [epoch["target_gradient"] for epoch in record["epochs"]] == ["detached", "exact"]


def test_a_run_counts_the_seconds_of_a_core_not_those_it_was_stopped(glyphs: dataset.Glyphs) -> None:
    configuration = plan.quick()
    part = plan.evaluated(glyphs, configuration)
    wall, core = time.perf_counter(), time.process_time()
    record = training.train_run(part, configuration, RUN, lambda step: time.sleep(0.2))
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
    record = training.train_run(glyphs, plan.quick(), RUN, lambda step: None)
    assert record["result"] is None
    assert "diverged" in record["failed"]


# The folder


def test_a_folder_of_another_configuration_is_refused_and_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path, plan.quick())
    store.open()
    store.save(RUN, {"result": {"rank1": 0.5}})
    store.open()  # the same again
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    other = Store(tmp_path, replace(plan.quick(), recipe=Recipe(epochs=3, batch=12)))
    with pytest.raises(
        StudyError, match=r"configuration\.recipe\.epochs: expected 3, got 2.*Nothing was changed"
    ):
        other.open()
    with pytest.raises(StudyError, match=r"configuration\.recipe\.epochs: expected 3, got 2"):
        other.load(RUN)
    with pytest.raises(StudyError, match=r"run\.scale: expected 24\.0, got 8\.0"):
        store.load(replace(RUN, scale=24.0))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


def test_runs_come_back_as_they_went(tmp_path: Path) -> None:
    store = Store(tmp_path, plan.quick())
    other = replace(RUN, m=None, margin="normface", mode="detached")
    store.save(RUN, {"result": 1})
    store.save(other, {"result": 2})
    assert {run: record["result"] for run, record in store.load_all().items()} == {RUN: 1, other: 2}
    assert store.load(replace(RUN, seed=7)) is None


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path, plan.quick())
    store.save(RUN, {})
    for text, words in (
        ('{"run": ', "cannot be read"),
        ("[1]", "expected a JSON object"),
        ('{"run": {}}', "of a run"),
    ):
        store.path(RUN).write_text(text)
        with pytest.raises(StudyError, match=words):
            store.load_all()


def test_a_stop_while_writing_leaves_no_half_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, plan.quick())

    def stop(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        store.save(RUN, {})
    assert store.load(RUN) is None
    assert store.load_all() == {}


# Choice and statistics


def test_the_best_try_is_chosen_for_each_condition_and_ties_go_to_the_first() -> None:
    configuration = plan.quick()
    cells = plan.cells([("cosface", "detached")], ["clean", "flip15"])
    low, high = configuration.trials["cosface"]
    scores = {("clean", low): 0.6, ("clean", high): 0.6, ("flip30", low): 0.2, ("flip30", high): 0.3}
    runs = plan.tuning_runs(configuration, cells)
    records = {run: {"result": {"tar": {"0.001": scores[run.condition, (run.m, run.scale)]}}} for run in runs}
    head = ("cosface", "detached")
    assert choice.choose(configuration, records, cells) == {(head, "clean"): low, (head, "flip30"): high}
    diverged = {run: {"result": None} if run.m == high[0] else record for run, record in records.items()}
    assert choice.choose(configuration, diverged, cells)[head, "flip30"] == low
    with pytest.raises(StudyError, match="cosface-detached, flip30: 1 of its trials"):
        choice.choose(configuration, dict(list(records.items())[:-1]), cells)


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
    assert found.low == pytest.approx(0.01)  # the seeds' own ups and downs are gone
    assert paired_difference(a, {9: 1.0}) is None
    single = paired_difference({0: 0.5}, {0: 0.4})
    assert single is not None
    assert single.low is None


def test_what_is_decided_and_who_is_higher() -> None:
    assert Difference(3, 0.03, 0.02, 0.04).decided(0.02)
    assert Difference(3, 0.03, 0.02, 0.04).higher == "a"
    assert Difference(3, -0.03, -0.04, -0.02).higher == "b"
    assert Difference(3, 0.0, -0.01, 0.01).higher is None
    assert not Difference(3, 0.3, 0.2, 0.4).decided(0.02)
    assert not Difference(2, 0.03, 0.03, 0.03).decided(0.02)  # two seeds that agree by chance
    assert Difference(2, 0.03, 0.03, 0.03).higher is None
    assert not Difference(1, 0.03, None, None).decided(0.02)
