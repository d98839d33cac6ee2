"""README's numbers are those of bench/results, and there are no others."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from bench import model, readme
from bench.__main__ import main
from bench.cases import MEMORY, TOY
from bench.result import Memory
from tests.test_bench.made_up import made_up
from tests.test_bench.test_result import RESULT

TEXT = readme.README.read_text()
# A measured number has one of these units.
MEASURED = re.compile(
    r"\d[\d.,]*[\s-]?(?:[mµun]?s|seconds?|min|minutes?|h|hours?|[kKMGT]i?B|[MGT]?FLOP/s|×|x|times|fold|%)(?![\w-])"
)
# What has such a unit and was not measured: the options' defaults, and what an example or a study does.
CHOSEN = (
    "`workspace_bytes` (256 MiB)",
    "(`workspace_bytes`, 256 MiB)",
    "With 30% wrong labels",
    "flips 15% of the labels",
)


def test_readme_agrees_with_the_results() -> None:
    assert readme.rendered(TEXT) == TEXT, "run `make readme-tables`"
    assert main(["readme", "--check"]) == 0


def test_every_block_is_in_readme_once() -> None:
    names = re.findall(r"<!-- bench: ([\w-]+) -->", TEXT)
    assert sorted(names) == sorted(readme.BLOCKS)
    assert TEXT.count("<!-- /bench -->") == len(names)


def test_no_measured_number_stands_outside_the_blocks() -> None:
    text = readme.outside(TEXT)
    for chosen in CHOSEN:
        assert text.count(chosen) == 1, chosen
        text = text.replace(chosen, "")
    assert MEASURED.findall(text) == []


@pytest.mark.parametrize(
    "typed",
    [
        "took 2.5 s", "80 µs", "3 ms", "4 minutes", "2.5 hours", "3.1× as fast", "2.97 times", "a 3-fold",
        "40% faster", "124 MB", "131 MiB", "1.5 GB", "800 GFLOP/s", "12\nseconds",
    ],
)  # fmt: skip
def test_a_measured_number_is_known_by_its_unit(typed: str) -> None:
    assert MEASURED.findall(typed)


@pytest.mark.parametrize("text", ["C = 100,000", "s=64", "ArcFace 0.5", "PyTorch 2.10", "m2 is in radians"])
def test_other_numbers_are_none(text: str) -> None:
    assert MEASURED.findall(text) == []


@pytest.mark.parametrize("block", ["speed", "kept", "memory", "sweep", "sampled", "model"])
def test_a_number_that_was_changed_by_hand_is_noticed(block: str) -> None:
    """The last number of the block."""
    found = readme.BLOCKS[block](readme.RESULTS)
    old = re.findall(r"\d[\d.,]*\d", found)[-1]
    changed = TEXT.replace(found, found.replace(old, "7.77"))
    assert readme.rendered(changed) != changed
    assert readme.rendered(changed) == TEXT


def test_check_says_so_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "README.md"
    path.write_text("<!-- bench: speed -->\nold\n<!-- /bench -->\n")
    monkeypatch.setattr(readme, "README", path)
    assert main(["readme", "--check"]) == 1
    assert "make readme-tables" in capsys.readouterr().err
    assert "old" in path.read_text()
    assert main(["readme"]) == 0
    assert "old" not in path.read_text()
    assert main(["readme", "--check"]) == 0
    path.write_text("<!-- bench: nothing -->\n<!-- /bench -->\n")
    assert main(["readme"]) == 2
    assert "nothing" in capsys.readouterr().err


def _results(folder: Path) -> Path:
    """A file of each kind, with made-up numbers."""
    case = dataclasses.replace(MEMORY, classes=1_000_000)
    entries = [dataclasses.replace(entry, case=case if entry.case != TOY else TOY) for entry in RESULT.memory]
    larger = dataclasses.replace(case, classes=4_000_000)
    entries.append(dataclasses.replace(entries[0], case=larger, extra_bytes=None))
    single = dataclasses.replace(RESULT, memory=tuple(entries))
    (folder / readme.MAIN).write_text(single.to_json())
    (folder / readme.SHARED).write_text(single.to_json())
    sweep = made_up()
    (folder / readme.SWEEP).write_text(sweep.to_json())
    card = sweep.machine | {"gpu": {"card": "NVIDIA Test"}}
    (folder / "gpu-test.json").write_text(dataclasses.replace(sweep, machine=card).to_json())
    figures = {
        "seconds": 225.0, "cpu": "Test", "cores": 2, "seed": 0, "epochs": 8, "characters": 2200, "fonts": 20,
        "test_characters": 500, "test_fonts": 8,
        "losses": {"expface": {"seconds": 174.4, "tar": {"0.001": 0.7804}, "rank1": 0.8617}},
    }  # fmt: skip
    (folder / readme.DEMO).write_text(json.dumps(figures))
    sampled = {
        "sizes": {
            "rows": 64, "draw_classes": 10**7, "draw_rate": 0.01, "step_classes": 10**6, "step_rate": 0.1,
            "features": 256,
        },
        "draw": {"ratio": 0.0123}, "step": {"ratio": 0.143}, "step with SGD": {"ratio": 0.157},
        "draw_bytes": {"10000000": 9.9e6, "100000000": 11.2e6},
    }  # fmt: skip
    (folder / readme.SAMPLED).write_text(json.dumps(sampled))
    return folder


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        ("speed", ["| **this package** (exact) |", "| 4.50, 3.00 |", "run 2"]),
        ("shared", ["**this package** 4.50 and 3.00"]),
        (
            "memory",
            [
                "`python -m bench --toy` measures memory too",
                f"(bench/results/{readme.MAIN})",
                "C = 1,000,000",
                "| 4 |",
                "not measured",
            ],
        ),
        ("sweep", ["classes-seconds.png", "C^1.00", "4.0 bytes a class", "python -m bench sweep --quick`"]),
        (
            "sampled",
            ["1% of 10,000,000", "0.012", "10 MB at C", "11 MB at C = 100,000,000", "0.14 ", "0.16 "],
        ),
        ("gpu", ["NVIDIA Test", "(3.00)"]),
        ("demo", ["174 s", "0.780", "0.862", "3.8 minutes"]),
    ],
)
def test_blocks_hold_the_numbers_of_their_files(tmp_path: Path, block: str, parts: list[str]) -> None:
    found = " ".join(readme.BLOCKS[block](_results(tmp_path)).split())
    for part in parts:
        assert part in found, part


def test_a_block_without_its_file_is_empty(tmp_path: Path) -> None:
    for name in readme.BLOCKS:
        assert readme.BLOCKS[name](tmp_path) == ""
