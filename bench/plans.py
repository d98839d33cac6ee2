"""Says which shapes and peers each command measures: one case, a sweep on a CPU, a sweep on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench import peers
from bench.cases import DEFAULT, Case
from bench.runner import Plan, Shape
from expface_kernels.functional import DEFAULT_WORKSPACE_BYTES

TOY = Case(rows=32, classes=600, features=32)
# The shape of the single run's memory measurements, at each of MEMORY_CLASSES.
MEMORY = Case(rows=128, classes=1_000_000, features=128)
MEMORY_CLASSES = (100_000, 1_000_000, 4_000_000)
# Without pml_cosface, which costs what pml_arcface does, and without compiling anew for every shape.
CPU_PEERS = (
    "ours",
    "ours@0",
    "eager",
    "compiled_dynamic",
    "pml_arcface",
    "torch_linear",
    "torch_linear_dynamic",
    "torch_linear_chunked",
    "ours_sampled",
    "partial_fc",
)
# Compiling takes most of two minutes.
QUICK_PEERS = tuple(name for name in CPU_PEERS if not name.endswith("_dynamic"))
GPU_PEERS = (
    "ours",
    "ours@0",
    "eager",
    "compiled",
    "torch_linear",
    "torch_linear_compiled",
    "torch_linear_auto",
    "cce",
    "cce_exact",
    "liger",
)
FRONTIER_PARTS = (0.25, 0.5, 0.75)
"""Of the exponentials, cached by the workspaces between none and all."""


@dataclass(frozen=True)
class Sweep:
    """Lists the shapes around two cases: many classes of few features, and the main case."""

    many: Case
    main: Case
    peers: tuple[str, ...]
    rounds: int
    seconds: float
    classes: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    features: tuple[int, ...] = ()
    directions: tuple[bool, ...] = (False, True)
    """False for forwards alone, True for forward and backward."""
    memory_everywhere: bool = True
    """False: at the smallest shape alone, to see that it works."""

    def cases(self) -> list[Case]:
        """List every shape once, the one with the fewest FLOPs first."""
        found = {self.main}
        found |= {dataclasses.replace(self.many, classes=c) for c in self.classes}
        found |= {dataclasses.replace(self.main, rows=b) for b in self.rows}
        found |= {dataclasses.replace(self.main, features=d) for d in self.features}
        return by_flops(found)

    def plan(self, cases: Sequence[Case] | None = None) -> Plan:
        """Measure the peers at every shape in every direction; at the main one ours with more workspaces."""
        shapes = []
        for i, case in enumerate(self.cases() if cases is None else cases):
            more = frontier(case) if cases is None and case == self.main and "ours" in self.peers else ()
            names = tuple(dict.fromkeys([*self.peers, *more]))
            for backward in self.directions:
                memory = self.memory_everywhere or (i == 0 and backward == self.directions[-1])
                shapes.append(Shape(dataclasses.replace(case, backward=backward), names, memory=memory))
        return Plan(tuple(shapes), self.rounds, seconds=self.seconds)


FULL = Sweep(
    many=dataclasses.replace(DEFAULT, rows=64, features=128),
    main=DEFAULT,
    peers=CPU_PEERS,
    rounds=7,
    seconds=2100,
    classes=(10_000, 100_000, 300_000, 1_000_000, 4_000_000, 10_000_000),
    rows=(64, 128, 256),
    features=(128, 256, 512),
)
QUICK = Sweep(
    many=dataclasses.replace(DEFAULT, rows=64, features=64),
    main=dataclasses.replace(DEFAULT, rows=128, classes=30_000, features=128),
    peers=QUICK_PEERS,
    rounds=5,
    seconds=90,
    classes=(10_000, 100_000, 300_000),
    rows=(64, 128),
    features=(64, 128),
)
TOY_SWEEP = Sweep(
    many=dataclasses.replace(DEFAULT, rows=8, features=16),
    main=dataclasses.replace(DEFAULT, rows=16, classes=2000, features=32),
    peers=QUICK_PEERS,
    rounds=2,
    seconds=600,  # it needs some; nothing may be left out of a check
    classes=(500, 2000),
    rows=(8, 16),
    features=(32,),
    memory_everywhere=False,
)
_GPU_CASE = Case(1024, 1_000_000, 512, device="cuda", autocast="bfloat16")
GPU = Sweep(
    many=_GPU_CASE,
    main=_GPU_CASE,
    peers=GPU_PEERS,
    rounds=20,
    seconds=420,  # tuning comes first: together nine minutes
    classes=(100_000, 1_000_000, 4_000_000),
    rows=(256, 1024, 4096),
    directions=(True,),
)


def by_flops(cases: Iterable[Case]) -> list[Case]:
    """Sort cases by the FLOPs of a step; of equals the fewer classes first, and float32 centers."""
    return sorted(cases, key=lambda case: (case.flops, case.classes, -case.itemsize))


def frontier(case: Case) -> tuple[str, ...]:
    """Name ours with workspaces from none to all of the exponentials."""
    everything = case.rows * case.classes * case.itemsize
    parts = [f"ours@{int(part * everything)}" for part in FRONTIER_PARTS]
    # The default holds all of them where they are few.
    return ("ours@0", *parts, "ours" if everything <= DEFAULT_WORKSPACE_BYTES else f"ours@{everything}")


def gpu_plan(sweep: Sweep) -> Plan:
    """Measure every number of rows with every number of classes; the main one in autocast's dtype, too."""
    crossed = [
        dataclasses.replace(sweep.main, rows=b, classes=c, dtype=dtype)
        for b in sweep.rows
        for c in sweep.classes
        for dtype in dict.fromkeys([sweep.main.dtype, sweep.main.autocast or sweep.main.dtype])
        if dtype == sweep.main.dtype or b == sweep.main.rows
    ]
    return sweep.plan(by_flops(crossed))


def single(
    case: Case,
    names: tuple[str, ...],
    memory_peers: tuple[str, ...],
    memory_cases: Sequence[Case],
    *,
    rounds: int,
    runs: int,
    spin: bool,
) -> Plan:
    """Time the case in several runs; measure memory of some peers there and at more cases.

    Ours without a workspace joins those, untimed. No memory is measured where there are no memory peers.
    """
    shapes = [Shape(case, names, memory=False)]
    if memory_peers:
        more = ("ours@0",) if any(peers.is_ours(name) for name in memory_peers) else ()
        weighed = tuple(dict.fromkeys([*memory_peers, *more]))
        shapes += [Shape(c, weighed, timed=False) for c in (case, *memory_cases)]
    return Plan(tuple(shapes), rounds, runs, spin=spin)
