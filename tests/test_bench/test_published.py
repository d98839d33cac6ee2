"""What is promised of the published results holds in them, and the pictures beside them are theirs."""

from __future__ import annotations

import dataclasses

import pytest
from PIL import Image

from bench import peers, plots, readme, slopes
from bench.peers.base import GPU_ONLY, NO_MARGIN
from bench.result import Result
from bench.sweep_result import Sweep
from tests.test_bench.made_up import made_up

WITH_MARGIN, WITHOUT = 1.8, 1.4
"""How many times as fast as every peer ours is at least."""
LINEAR = (0.9, 1.1)
"""The exponent of seconds over classes."""
PEERS = {
    "eager", "compiled", "pml_arcface", "pml_cosface", "torch_linear", "torch_linear_compiled",
    "torch_linear_chunked", "partial_fc",
}  # fmt: skip
"""Those that are among them in any case."""
FLAT = 0.05
"""The largest exponent of memory over classes, of either sign."""


def _headline() -> Result:
    found = readme._single(readme.RESULTS, readme.MAIN)
    assert found is not None
    return found


def _sweep() -> Sweep:
    return readme._sweep(readme.RESULTS / readme.SWEEP)


def _too_near(result: Result) -> dict[str, float]:
    """Peers than which ours is not as much faster as is promised, and how many times as fast it is."""
    return {
        name: times
        for name, times in readme.times_ours(result).items()
        if times < (WITHOUT if peers.get(name).margins == NO_MARGIN else WITH_MARGIN)
    }


def _grows_otherwise(sweep: Sweep, *, backward: bool) -> str | None:
    """What is not as promised of ours without a workspace; None where all is."""
    axis = next(axis for axis in sweep.axes if axis.varies == "classes")
    found = slopes.slopes(sweep, axis, slopes.FLAT_PEER, backward=backward)
    if found is None or (found.first, found.last) != (slopes.FROM, slopes.TO):
        return "range"
    if not LINEAR[0] <= found.seconds_exponent <= LINEAR[1]:
        return "seconds"
    flat = found.memory_exponent is not None and abs(found.memory_exponent) < FLAT
    return None if flat else "memory"


def test_ours_is_ahead_of_every_peer_by_what_is_promised() -> None:
    result = _headline()
    assert set(readme.times_ours(result)) >= PEERS
    assert "--peers" not in result.command
    assert all(peers.get(name).devices == GPU_ONLY for name in result.skipped)
    assert (result.spin, result.keep_memory, result.ok) == (False, False, True)
    assert _too_near(result) == {}


@pytest.mark.parametrize(
    ("peer", "times", "near"),
    [
        ("compiled", 1.79, True),
        ("compiled", 1.81, False),
        ("torch_linear_compiled", 1.39, True),
        ("torch_linear_compiled", 1.41, False),
        ("partial_fc", 1.79, True),
        ("partial_fc", 1.81, False),
    ],
)
def test_a_peer_that_comes_too_near_would_be_noticed(peer: str, times: float, near: bool) -> None:
    result = _headline()
    assert result.best_run is not None
    ours = result.runs[result.best_run]["ours_sampled" if peer == "partial_fc" else "ours"]
    run = result.runs[result.best_run] | {peer: [times * seconds for seconds in ours]}
    assert set(_too_near(dataclasses.replace(result, runs=(run,)))) == ({peer} if near else set())


def test_time_grows_in_proportion_to_the_classes_and_memory_does_not() -> None:
    sweep = _sweep()
    assert sweep.complete
    assert sweep.ok
    assert _grows_otherwise(sweep, backward=True) is None


def test_so_it_is_with_the_forward_alone() -> None:
    """Whose memory comes last and may not be measured at every size."""
    sweep = _sweep()
    axis = next(axis for axis in sweep.axes if axis.varies == "classes")
    found = slopes.slopes(sweep, axis, slopes.FLAT_PEER, backward=False)
    assert found is not None
    assert LINEAR[0] <= found.seconds_exponent <= LINEAR[1]
    line = sweep.line(axis, slopes.FLAT_PEER, backward=False)
    held = [(c, p.extra_bytes) for c, p in line if c >= slopes.FROM and p.extra_bytes is not None]
    assert held[-1][0] >= 10 * slopes.FROM
    assert abs(slopes.exponent([(c, float(y)) for c, y in held])) < FLAT


@pytest.mark.parametrize("what", ["seconds", "memory", "range"])
def test_another_growth_would_be_noticed(what: str) -> None:
    def changed(value: float, classes: int, power: float) -> float:
        return value * (classes / slopes.FROM) ** power

    points = []
    for point in _sweep().points:
        c, held = point.case.classes, point.extra_bytes
        if what == "seconds":
            point = dataclasses.replace(point, seconds=tuple(changed(s, c, 0.3) for s in point.seconds))
        elif what == "memory" and held is not None:
            point = dataclasses.replace(point, extra_bytes=int(changed(held, c, 0.2)))
        elif what == "range" and c == slopes.TO:
            point = dataclasses.replace(point, seconds=())
        points.append(point)
    assert _grows_otherwise(dataclasses.replace(_sweep(), points=tuple(points)), backward=True) == what


def test_the_pictures_are_those_of_the_published_sweep() -> None:
    wanted = plots.source(_sweep())
    found = {}
    for path in (readme.RESULTS / readme.PLOTS).iterdir():
        with Image.open(path) as image:
            found[path.name] = {name: image.info.get(name) for name in wanted}
    names = ("classes-seconds", "classes-memory", "frontier", "speedups")
    assert found == {f"{name}.png": wanted for name in names}, "run `python -m bench plots`"
    assert wanted != plots.source(made_up())
