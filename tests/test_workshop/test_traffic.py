"""Bytes that operators hold and move."""

from __future__ import annotations

import torch

from expface_kernels.workshop.traffic import PeakMemory, TrafficCounter

N = 1000  # float32 elements
BYTES = 4 * N


def test_the_peak_is_what_is_alive_at_once() -> None:
    a = torch.ones(N)
    with PeakMemory() as memory:
        b = a + 1
        c = b + 1
        del b
        d = c * 2
        c.mul_(3)
        d.view(10, 100)
    assert memory.peak == 2 * BYTES
    assert memory.now == 2 * BYTES
    del c, d
    assert memory.now == 0


def test_in_place_operators_read_and_write_what_they_change() -> None:
    a, b = torch.ones(N), torch.ones(N)
    with TrafficCounter() as moved:
        a.add_(b)
    assert moved.bytes == 3 * BYTES
    with TrafficCounter() as moved:
        torch._foreach_add_([a, a.clone()], [b, b])  # and the clone: 2
    assert moved.bytes == 2 * 3 * BYTES + 2 * BYTES


def test_views_and_fresh_memory_move_nothing() -> None:
    with TrafficCounter() as moved:
        torch.empty(N).view(10, 100).T[2:5]
    assert moved.bytes == 0


def test_indexing_moves_the_chosen_rows_alone() -> None:
    a, index = torch.ones(N, 8), torch.arange(5)
    with TrafficCounter() as moved:
        a[index]
    assert moved.bytes == 2 * 5 * 8 * 4 + 5 * 8


def test_scattering_moves_what_is_scattered_alone() -> None:
    a, index = torch.ones(N), torch.arange(5)
    with TrafficCounter() as moved:
        a.scatter_(0, index, torch.ones(N)[:5])
    assert moved.bytes == BYTES + 5 * 8 + 2 * 5 * 4  # BYTES: ones writes
    with TrafficCounter() as moved:
        a.scatter_(0, index, 2.0)
    assert moved.bytes == 5 * 8 + 5 * 4


def test_filling_reads_nothing() -> None:
    a = torch.ones(N)
    for fill in (torch.zeros_like, lambda t: t.new_zeros(N), lambda t: t.new_full((N,), 2.0)):
        with TrafficCounter() as moved:
            fill(a)
        assert moved.bytes == BYTES
