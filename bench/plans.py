"""Which shapes and peers a sweep has: on this machine's CPU, in two minutes, at toy size, on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from bench.cases import DEFAULT, Case
from bench.sweep import Plan, Stop
from bench.sweep_result import Axis
from expface_kernels.functional import DEFAULT_WORKSPACE_BYTES

# Not here: pml_cosface, which costs what pml_arcface does, and compiling anew for every shape.
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
"""Of the exponentials, kept by the workspaces between none and all."""


@dataclass(frozen=True)
class Grid:
    """Lines of shapes around two base cases: many classes of few features, and the default case."""

    many: Case
    main: Case
    classes: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    features: tuple[int, ...] = ()
    narrow_rows: tuple[int, ...] = ()
    """On a GPU: rows at which embeddings and centres are measured in autocast's dtype, too."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        found = (
            (Axis("classes", self.many), self.classes),
            (Axis("rows", self.main), self.rows),
            (Axis("features", self.main), self.features),
        )
        return tuple(axis for axis, values in found if values)

    def cases(self) -> list[Case]:
        """Every shape once, the one with the fewest FLOPs first."""
        found = {self.main}
        for axis in self.axes:
            found |= {axis.at(value, backward=True) for value in getattr(self, axis.varies)}
        return sorted(found, key=lambda case: (case.flops, case.classes))


@dataclass(frozen=True)
class Preset:
    """A sweep that has a name."""

    grid: Grid
    peers: tuple[str, ...]
    rounds: int
    seconds: float
    directions: tuple[bool, ...] = (False, True)


FULL = Preset(
    Grid(
        many=dataclasses.replace(DEFAULT, rows=64, features=128),
        main=DEFAULT,
        classes=(10_000, 100_000, 300_000, 1_000_000, 4_000_000, 10_000_000),
        rows=(64, 128, 256),
        features=(128, 256, 512),
    ),
    CPU_PEERS,
    rounds=7,
    seconds=2100,
)
QUICK = Preset(
    Grid(
        many=dataclasses.replace(DEFAULT, rows=64, features=64),
        main=dataclasses.replace(DEFAULT, rows=128, classes=30_000, features=128),
        classes=(10_000, 100_000, 300_000),
        rows=(64, 128),
        features=(64, 128),
    ),
    QUICK_PEERS,
    rounds=5,
    seconds=90,
)
TOY = Preset(
    Grid(
        many=dataclasses.replace(DEFAULT, rows=8, features=16),
        main=dataclasses.replace(DEFAULT, rows=16, classes=2000, features=32),
        classes=(500, 2000),
        rows=(8, 16),
        features=(32,),
    ),
    QUICK_PEERS,
    rounds=2,
    seconds=600,  # it needs some; nothing may be left out of a check
)
_GPU_CASE = Case(1024, 1_000_000, 512, device="cuda", autocast="bfloat16")
GPU = Preset(
    Grid(
        many=_GPU_CASE,
        main=_GPU_CASE,
        classes=(100_000, 1_000_000, 4_000_000),
        rows=(256, 1024, 4096),
        narrow_rows=(1024,),
    ),
    GPU_PEERS,
    rounds=20,
    seconds=420,  # tuning comes first: together nine minutes
    directions=(True,),
)


def stored(grid: Grid) -> list[Case]:
    """The main case with every number of rows: as it is stored, then in autocast's dtype."""
    wide = [dataclasses.replace(grid.main, rows=rows) for rows in grid.rows]
    narrow = [
        dataclasses.replace(grid.main, rows=rows, dtype=grid.main.autocast or grid.main.dtype)
        for rows in grid.narrow_rows
    ]
    return [*wide, *narrow]


def crossed(grid: Grid) -> list[Case]:
    """Every number of rows with every number of classes, the fewest FLOPs first; of equals, wide centres."""
    found = [dataclasses.replace(case, classes=classes) for case in stored(grid) for classes in grid.classes]
    return sorted(found, key=lambda case: case.flops)


def frontier(case: Case) -> tuple[str, ...]:
    """Ours with workspaces from none to all of the exponentials."""
    everything = case.rows * case.classes * case.itemsize
    parts = [f"ours@{int(part * everything)}" for part in FRONTIER_PARTS]
    # The default holds all of them where they are few.
    return ("ours@0", *parts, "ours" if everything <= DEFAULT_WORKSPACE_BYTES else f"ours@{everything}")


def plan(preset: Preset, peers: Sequence[str], command: str) -> Plan:
    """Lines of shapes, with the frontier at the main one."""
    grid = preset.grid
    stops = []
    for case in grid.cases():
        more = frontier(case) if case == grid.main and "ours" in peers else ()
        stops.append(Stop(case, tuple(dict.fromkeys([*peers, *more]))))
    return Plan(tuple(stops), grid.axes, preset.directions, preset.rounds, preset.seconds, command)


def gpu_plan(preset: Preset, peers: Sequence[str], command: str) -> Plan:
    """Every number of rows with every number of classes, some in two dtypes."""
    grid = preset.grid
    stops = tuple(Stop(case, tuple(peers)) for case in crossed(grid))
    axes = tuple(Axis("classes", case) for case in stored(grid))
    return Plan(stops, axes, preset.directions, preset.rounds, preset.seconds, command)
