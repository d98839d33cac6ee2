"""A sweep with made-up numbers: time grows with the FLOPs, memory with the logits or not at all."""

from __future__ import annotations

import dataclasses

from bench import peers, plans
from bench.peers.base import terms
from bench.result import Gate
from bench.sweep_result import Point, Sweep

PEERS = ("ours", "ours@0", "eager", "torch_linear", "ours_sampled", "partial_fc")
SPEED = {"ours": 3.0, "torch_linear": 1.5, "ours_sampled": 2.0}
"""Times as fast as its baseline."""
FLAT_BYTES = 20_000_000
LARGEST = 300_000
"""Classes beyond which the eager head does not fit."""
MACHINE = {
    "cpu": "A processor",
    "cores": 2,
    "memory_bytes": 1,
    "instruction_set": "x86-64-v3",
    "torch_threads": 2,
    "load_average": 0.1,
    "torch": "2.13.0+cpu",
    "commit": "abc1234",
    "gpu": None,
}


def point(name: str, case: plans.Case) -> Point:
    """Median FLOPs/1e10 seconds over the speed, with 10% around it."""
    peer = peers.get(name)
    own = terms(peer, case)
    label = peer.label(own)
    if name == "eager" and case.classes > LARGEST:
        return Point(name, label, own, needs_bytes=33_300_000_000, reason="needs about 33.3 GB")
    median = own.flops / 1e10 / SPEED.get(name, 2.0 if name.startswith("ours@") else 1.0)
    flat = FLAT_BYTES + 4 * case.classes
    extra = (
        flat + getattr(peer, "workspace_bytes", 0) // 10
        if name.startswith("ours")
        else 16 * case.rows * case.classes
    )
    return Point(name, label, own, (0.9 * median, median, 1.1 * median), extra)


def made_up(*, directions: tuple[bool, ...] = (False, True)) -> Sweep:
    plan = plans.plan(plans.QUICK, PEERS, "python -m bench sweep --quick --json x.json")
    points = [
        point(name, dataclasses.replace(stop.case, backward=backward))
        for stop in plan.stops
        for backward in directions
        for name in stop.peers
    ]
    gates = (Gate("ours", "ours (exact)", (1e-8, 2e-7, 3e-7), 2e-5, True, None),)
    return Sweep(
        plan.axes, gates, tuple(points), MACHINE, plan.command, "2026-01-31T00:00:00+00:00", 90, 80.5, True
    )
