"""What README and docs/benchmarks.md claim holds in bench/results; they have no other measured numbers."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from PIL import Image

from bench import peers, plots, readme
from bench.__main__ import main
from bench.peers.base import GPU_ONLY, NO_MARGIN
from bench.records import BYTES, SECONDS, UNAVAILABLE, Run, load
from bench.report import FROM, TO, exponent, growth
from tests.test_bench.made_up import HEADER, changed, made_up, written

WITH_MARGIN, WITHOUT = 1.8, 1.4
"""How many times as fast as every peer ours is at least."""
LINEAR = (0.9, 1.1)
"""The exponent of seconds over classes."""
FLAT = 0.05
"""The largest exponent of memory over classes, of either sign."""
MAIN, SWEEP = load(readme.RESULTS / readme.MAIN), load(readme.RESULTS / readme.SWEEP)
TEXTS = {path: path.read_text() for path in readme.DOCUMENTS}


def _too_near(run: Run) -> dict[str, float]:
    """Peers than which ours is not as much faster as is promised, and how many times as fast it is."""
    return {
        name: times
        for name, times in readme.times_ours(run).items()
        if times < (WITHOUT if peers.get(name).margins == NO_MARGIN else WITH_MARGIN)
    }


def _grows_otherwise(run: Run) -> str | None:
    """What is not as promised of ours without a workspace; None where all is."""
    found = growth(run, _line(backward=True), "ours@0")
    if found is None or (found.first, found.last) != (FROM, TO):
        return "range"
    if not LINEAR[0] <= found.seconds_exponent <= LINEAR[1]:
        return SECONDS
    flat = found.memory_exponent is not None and abs(found.memory_exponent) < FLAT
    return None if flat else BYTES


def _line(*, backward: bool):  # type: ignore[no-untyped-def]
    return next(c for c in SWEEP.cases() if (c.rows, c.features, c.backward) == (64, 128, backward))


def test_ours_is_ahead_of_every_peer_by_what_is_promised() -> None:
    rest = {m.peer for m in MAIN.measurements if m.status == UNAVAILABLE}
    assert all(peers.get(name).devices == GPU_ONLY for name in rest)
    assert set(readme.times_ours(MAIN)) | rest | {"ours", "ours_sampled"} == set(peers.PEERS)
    assert MAIN.header.settings == {"spin": False, "keep_memory": False}
    assert MAIN.ok
    assert _too_near(MAIN) == {}


@pytest.mark.parametrize(
    ("peer", "times", "near"),
    [
        ("compiled", 1.79, True),
        ("compiled", 1.81, False),
        ("torch_linear", 1.39, True),
        ("partial_fc", 1.79, True),
    ],
)
def test_a_peer_that_comes_too_near_would_be_noticed(peer: str, times: float, near: bool) -> None:
    own = MAIN.at(readme.main_case(MAIN))["ours_sampled" if peer == "partial_fc" else "ours"]
    values = tuple(times * second for second in own.values)
    run = changed(
        MAIN, lambda m: dataclasses.replace(m, values=values) if (m.peer, m.what) == (peer, SECONDS) else m
    )
    assert set(_too_near(run)) == ({peer} if near else set())


def test_time_grows_in_proportion_to_the_classes_and_memory_does_not() -> None:
    assert SWEEP.complete
    assert SWEEP.ok
    assert _grows_otherwise(SWEEP) is None
    forward = growth(SWEEP, _line(backward=False), "ours@0")
    assert forward is not None
    assert LINEAR[0] <= forward.seconds_exponent <= LINEAR[1]
    held = [
        (c, m.value) for c, m in SWEEP.line(_line(backward=False), "ours@0", BYTES) if m.value and c >= FROM
    ]
    assert held[-1][0] >= 10 * FROM
    assert abs(exponent(held)) < FLAT


@pytest.mark.parametrize("what", [SECONDS, BYTES, "range"])
def test_another_growth_would_be_noticed(what: str) -> None:
    power = {SECONDS: 0.3, BYTES: 0.2}.get(what, 0.0)
    run = changed(
        SWEEP,
        lambda m: (
            None
            if what == "range" and m.case.classes == TO
            else dataclasses.replace(m, values=tuple(v * (m.case.classes / FROM) ** power for v in m.values))
            if m.what == what
            else m
        ),
    )
    assert _grows_otherwise(run) == what


def test_the_pictures_are_those_of_the_published_sweep() -> None:
    for path in (readme.RESULTS / readme.PLOTS).iterdir():
        with Image.open(path) as image:
            found = {name: image.info.get(name) for name in plots.source(SWEEP)}
        assert found == plots.source(SWEEP), "run `python -m bench plots`"
    shown = re.findall(r"cpu-sweep/([\w-]+\.png)", "".join(TEXTS.values()))
    assert set(shown) == {path.name for path in (readme.RESULTS / readme.PLOTS).iterdir()}


def test_the_documents_agree_with_the_results() -> None:
    assert readme.rendered() == TEXTS, "run `make readme-tables`"
    blocks = re.findall(r"<!-- bench: ([\w-]+) -->", "".join(TEXTS.values()))
    assert set(blocks) == set(readme.BLOCKS)
    assert len(re.findall("<!-- /bench -->", "".join(TEXTS.values()))) == len(blocks)


# A measured number has one of these units.
MEASURED = re.compile(
    r"\d[\d.,]*[\s-]?(?:[mµun]?s|seconds?|min|minutes?|h|hours?|[kKMGT]i?B|[MGT]?FLOP/s|×|x|times|fold|%)(?![\w-])"
)
# What has such a unit and was not measured: the options' defaults, and what an example or a study does.
CHOSEN = ("(256 MiB)", ", 256 MiB)", "With 30% wrong labels", "flips 15% of the labels")


def test_no_measured_number_stands_outside_the_blocks() -> None:
    for text in TEXTS.values():
        for chosen in CHOSEN:
            text = text.replace(chosen, "")
        assert MEASURED.findall(readme.outside(text)) == []


def test_check_says_so_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "README.md"
    path.write_text("<!-- bench: headline -->\nold\n<!-- /bench -->\n")
    monkeypatch.setattr(readme.rendered, "__defaults__", ((path,), readme.RESULTS))
    assert main(["readme", "--check"]) == 1
    assert "make readme-tables" in capsys.readouterr().err
    assert "old" in path.read_text()
    assert main(["readme"]) == 0
    assert "old" not in path.read_text()
    assert main(["readme", "--check"]) == 0
    path.write_text("<!-- bench: nothing -->\n<!-- /bench -->\n")
    assert main(["readme"]) == 2
    assert "nothing" in capsys.readouterr().err


EXPECTED = {
    "speed": "eager partial-FC step, 10% of the classes sampled (exact) | 0.00082 | 1.00, 1.00 | 10 MB |",
    "sweep": "| this package, `workspace_bytes=0` (exact) | 100,000 to 300,000 | 1.00 |",
    "shared": "| **this package** (exact) | 3.00, 3.00 |",
    "kept": "| eager head (exact) | 0.0082 | 3.00 | 0.0082 | 3.00 |",
    "gpu": "| **this package** (exact) | 2.73 (3.00) |",
}
"""A part of what blocks say of the made-up results."""


def test_blocks_hold_the_numbers_of_their_files_and_are_empty_without(tmp_path: Path) -> None:
    for name in readme.BLOCKS:
        assert readme.BLOCKS[name](tmp_path) == ""
    run = made_up(runs=2)
    for name in (readme.MAIN, readme.SHARED, readme.KEPT, readme.SWEEP):
        written(tmp_path / name, run)
    card = dataclasses.replace(HEADER, machine=HEADER.machine | {"gpu": {"card": "NVIDIA Test"}})
    written(tmp_path / "gpu-test.jsonl", dataclasses.replace(run, header=card))
    for name, part in EXPECTED.items():
        assert part in readme.BLOCKS[name](tmp_path)
