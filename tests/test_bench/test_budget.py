from __future__ import annotations

import pytest

from bench.budget import Budget, Costs, rounds_within


class FakeClock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_is_left_falls_with_the_clock_and_below_zero() -> None:
    clock = FakeClock()
    budget = Budget(10, clock)
    assert budget.left == 10
    clock.now += 12
    assert budget.left == -2


def test_shares_follow_the_weights_and_what_one_did_not_need_goes_to_the_others() -> None:
    clock = FakeClock()
    whole = Budget(60, clock)
    first = whole.share(1, 1 + 2 + 3)
    assert first.left == 10
    clock.now += 4
    second = whole.share(2, 2 + 3)
    assert second.left == pytest.approx(56 * 2 / 5)
    clock.now += 30  # more than it had
    assert second.left < 0
    assert whole.share(3, 3).left == pytest.approx(60 - 4 - 30)


def test_costs_grow_with_flops_and_what_comes_once_does_not() -> None:
    costs = Costs()
    assert costs.step("peer", 1000) == 0
    assert costs.once("peer") == 0
    costs.learn("peer", 1000, 2.0, once=7.0)
    assert costs.step("peer", 5000) == 10.0
    assert costs.once("peer") == 7.0
    costs.learn("peer", 2000, 3.0, once=1.0)
    assert costs.step("peer", 4000) == 6.0
    assert costs.once("peer") == 7.0
    costs.learn("slow", 10, 1.0)
    assert costs.step("other", 4000) == 400.0
    assert costs.once("other") == 0


def test_rounds_follow_even_shares_and_slow_ones_get_what_is_left() -> None:
    assert rounds_within({"slow": 10.0, "fast": 1.0}, 60.0, 7) == {"fast": 7, "slow": 5}
    assert rounds_within({"slow": 10.0, "fast": 1.0}, 1000.0, 7) == {"fast": 7, "slow": 7}
    assert rounds_within({"fast": 1e-3}, 1e308, 7) == {"fast": 7}
    assert rounds_within({"slow": 100.0, "fast": 1.0, "unknown": 0.0}, 12.0, 7) == {
        "unknown": 7,
        "fast": 6,
        "slow": 1,
    }
