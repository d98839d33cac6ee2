"""The fewest devices that fit, and what to change first."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from expface_kernels.checks import LARGEST_TENSOR
from expface_kernels.plan import Job, Rates, advise, plan, smallest_ranks
from expface_kernels.plan.advice import KEEP_ALL
from expface_kernels.plan.optimizers import FUSED

RATES = Rates(flops=100e9, bandwidth=10e9, fresh=2e9)
GB = 10**9


def _fits(job: Job) -> bool:
    return plan(job, RATES).fits


@pytest.mark.parametrize(
    "options",
    [
        {"memory_bytes": GB},
        {"memory_bytes": GB // 3, "workspace_bytes": 0},
        {"memory_bytes": GB // 8, "workspace_bytes": 0, "batch": 16},
        {"memory_bytes": GB // 2, "optimizer": "adam", "batch": 64},
        {"memory_bytes": GB, "sample_rate": 0.2, "dtype": "bfloat16"},
        {"memory_bytes": 64 * GB},
        {"memory_bytes": GB, "sample_rate": 0.5, "sparse_grad": True, "optimizer": "sparse-adam"},
    ],
    ids=str,
)
def test_the_fewest_devices_fit_and_one_fewer_does_not(options: dict[str, Any]) -> None:
    job = Job(**{"classes": 1_000_000, "features": 128, "optimizer": "momentum", **options})
    fewest = smallest_ranks(job)
    assert fewest is not None

    def on(ranks: int) -> Job:
        dense = {"sparse_grad": False, "optimizer": "adam"} if job.sparse_grad and ranks > 1 else {}
        return dataclasses.replace(job, ranks=ranks, **dense)

    assert fewest.bit_count() == 1
    assert _fits(on(fewest))
    assert fewest == 1 or not _fits(on(fewest // 2))


def test_on_gpus_too() -> None:
    job = Job(classes=10_000_000, device="h100", batch=512, optimizer="adam", autocast="bfloat16")
    fewest = smallest_ranks(job)
    assert fewest == 2
    assert not plan(job).fits
    assert plan(dataclasses.replace(job, ranks=2)).fits


def test_where_more_devices_bring_more_rows_than_they_take_classes_the_window_is_found() -> None:
    job = Job(classes=200_000, features=128, batch=2048, workspace_bytes=0)
    peaks = {2**k: plan(dataclasses.replace(job, ranks=2**k), RATES).peak for k in range(6)}
    best = min(peaks, key=lambda ranks: peaks[ranks])
    assert 1 < best < 32
    tight = dataclasses.replace(job, memory_bytes=int(peaks[best] / 0.9) + 2)
    assert smallest_ranks(tight) == best
    assert smallest_ranks(dataclasses.replace(tight, memory_bytes=int(peaks[best] / 0.9) - 2)) is None


def test_no_number_of_devices_holds_rows_that_do_not_fit_on_one() -> None:
    job = Job(classes=1000, batch=100_000, memory_bytes=GB // 4)
    assert smallest_ranks(job) is None
    assert "no number of devices" in advise(plan(job, RATES), RATES).first


def test_what_changes_no_result_is_advised_first() -> None:
    """Just too large: without the workspace it fits, and so does much else."""
    job = Job(classes=200_000, features=128, memory_bytes=64 * GB)
    exact = plan(job, RATES).peak
    tight = dataclasses.replace(job, memory_bytes=int((exact - 10**6) / 0.9))
    advice = advise(plan(tight, RATES), RATES)
    assert advice.first.startswith("workspace_bytes=0: then it fits")
    assert "the largest item is" in advice.first
    assert sum(change.plan.fits for change in advice.changes) > 2


def test_then_devices_and_where_none_alone_is_enough_the_fewest() -> None:
    job = Job(classes=1_000_000, features=128, memory_bytes=13 * GB // 10)
    assert advise(plan(job, RATES), RATES).first.startswith("2 devices: then it fits")
    much = dataclasses.replace(job, memory_bytes=7 * GB // 10)
    advice = advise(plan(much, RATES), RATES)
    assert advice.smallest_ranks > 2
    assert [change.name for change in advice.changes if change.plan.fits] == [
        f"{advice.smallest_ranks} devices"
    ]
    assert advice.first.startswith(f"{advice.smallest_ranks} devices: then it fits")


def test_a_fused_optimizer_costs_nothing_and_comes_before_devices() -> None:
    job = Job(classes=1_000_000, optimizer="adam", memory_bytes=10 * GB)
    assert advise(plan(job, RATES), RATES).first.startswith("fused=True: then it fits")


def test_what_fits_is_left_alone_but_for_speed() -> None:
    job = Job(classes=100_000, optimizer="sgd", memory_bytes=64 * GB)
    assert advise(plan(job, RATES), RATES).first == "nothing: it fits"
    slow = dataclasses.replace(job, workspace_bytes=0)
    advice = advise(plan(slow, RATES), RATES)
    assert KEEP_ALL in advice.first
    assert "less time" in advice.first


def test_each_change_changes_one_thing() -> None:
    job = Job(classes=100_000, optimizer="adam", device="h100", memory_bytes=64 * GB)
    for change in advise(plan(job)).changes:
        before, after = dataclasses.asdict(job), dataclasses.asdict(change.plan.job)
        assert sum(before[name] != after[name] for name in before) == 1, change.name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_a_fused_optimizer_can_be_advised(device: str, optimizer: str, ranks: int) -> None:
    job = Job(
        classes=10**6, device=device, optimizer=optimizer, ranks=ranks, fused=True, memory_bytes=80 * GB
    )
    changes = {change.name: change.plan.job for change in advise(plan(job, RATES), RATES).changes}
    (sampled,) = (changed for name, changed in changes.items() if "sample_rate" in name)
    assert sampled.sample_rate == 0.1
    assert sampled.fused != sampled.sparse_grad  # torch has no fused update of a sparse gradient


@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_a_job_as_large_as_there_can_be_has_an_answer(device: str) -> None:
    """2⁵⁹ numbers in the centres or the rows: twice as many devices would bring too many rows."""
    for sizes in (
        {"classes": LARGEST_TENSOR // 512},
        {"classes": 100, "batch": LARGEST_TENSOR // 512},
        {"classes": 10**6, "batch": 10**9, "features": LARGEST_TENSOR // 10**9},
    ):
        job = Job(**{"device": device, "memory_bytes": 80 * GB, **sizes})
        assert advise(plan(job, RATES), RATES).smallest_ranks is None
