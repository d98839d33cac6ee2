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


MILLION, LARGER = (dataclasses.replace(MEMORY, classes=classes) for classes in (1_000_000, 4_000_000))
LABELS = {
    "ours": "ours (exact)",
    "ours@0": "ours, workspace 0 MiB (exact)",
    "eager": "eager head (exact)",
    "compiled": "compiled head (exact)",
    "torch_linear_compiled": "linear (no margin)",
    "ours_sampled": "ours, sampled",
    "partial_fc": "partial-FC",
}
TIMED = {"compiled": ([4.0] * 3, [2.0] * 3), "torch_linear_compiled": ([3.0] * 3, [1.5] * 3)}
SINGLE = dataclasses.replace(
    RESULT,
    gates=tuple(dataclasses.replace(RESULT.gates[0], peer=p, label=label) for p, label in LABELS.items()),
    runs=tuple(run | {p: found[i] for p, found in TIMED.items()} for i, run in enumerate(RESULT.runs)),
    memory=tuple(
        Memory(peer, LABELS[peer], case, held, why_not, None)
        for peer, case, held, why_not in (
            ("ours", TOY, 2_700_000, None),
            ("eager", TOY, 1_640_000_000, None),
            ("compiled", TOY, None, "needs about 5 GB, more than 75% of the 4 GB that are free"),
            ("ours@0", TOY, 700_000, None),
            ("ours", MILLION, 3_700_000, None),
            ("eager", MILLION, 2_058_300_000, None),
            ("ours", LARGER, None, None),
            ("eager", LARGER, None, "needs about 16.4 GB, more than 75% of the 20.9 GB that are free"),
        )
    ),
)
KEPT = dataclasses.replace(
    SINGLE,
    command="python -m bench --toy --keep-memory --json x.json",
    runs=(
        {
            "ours": [1.0], "eager": [1.8], "compiled": [1.6], "torch_linear_compiled": [1.2],
            "ours_sampled": [0.5], "partial_fc": [0.55],
        },
    ),
)  # fmt: skip


def _results(folder: Path) -> Path:
    """A file of each kind, with made-up numbers."""
    (folder / readme.MAIN).write_text(SINGLE.to_json())
    (folder / readme.SHARED).write_text(SINGLE.to_json())
    (folder / readme.KEPT).write_text(KEPT.to_json())
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
    counted = {
        "kind": model.KIND, "schema": model.SCHEMA, "case": {"dtype": "bfloat16"},
        "ours": {"milliseconds": 5.43, "extra_bytes": 292_400_000},
        "eager": {"milliseconds": 53.8, "extra_bytes": 16_400_000_000},
        "command": "python -m bench --model h100 --rows 8 --json x.json",
    }  # fmt: skip
    (folder / readme.MODEL).write_text(json.dumps(counted))
    return folder


EXPECTED: dict[str, list[str]] = {
    "speed": [
        "`python -m bench --toy`: forward and both gradients, B = 32, C = 600, D = 32, float32, expface",
        "medians of 3 rounds, in the quietest of 2 runs",
        "| head | seconds, run 2 | times eager, runs 1, 2 | extra memory |",
        "| **this package** (exact) | 1 | 4.50, 3.00 | 3 MB |",
        "| eager head (exact) | 3 | 1.00, 1.00 | 1.6 GB |",
        "| compiled head (exact) | 2 | 2.25, 1.50 | needs 5 GB |",
        "| linear (no margin) | 1.5 | 3.00, 2.00 | not measured |",
        "| this package, `workspace_bytes=0` (exact) | not timed | – | 1 MB |",
    ],
    "kept": [
        "(`python -m bench --toy --keep-memory`, [",
        "this package is only 1.60 times as fast as compiled head (exact) (with malloc as it is: 2.00) "
        "and 1.20 times as fast as linear (no margin) (with malloc as it is: 1.50); all of them: "
        "**this package** 1 s; eager head (exact) 1.8 s (1.80 times ours); compiled head (exact) 1.6 s "
        "(1.60 times ours); linear (no margin) 1.2 s (1.20 times ours); ours, sampled 0.5 s; "
        "partial-FC 0.55 s (1.10 times ours).",
    ],
    "shared": [
        "times the speed of the eager head: **this package** 4.50 and 3.00; compiled head (exact) 2.25 "
        "and 1.50; linear (no margin) 3.00 and 2.00."
    ],
    "memory": [
        "`python -m bench --toy` measures memory too",
        f"(bench/results/{readme.MAIN})",
        "B = 128, D = 128, in MB",
        "| head | C = 1,000,000 | C = 4,000,000 |",
        "| **this package** | 4 | not measured |",
        "| eager head (exact) | 2,058 | needs 16.4 GB |",
    ],
    "sweep": [
        "`python -m bench sweep --quick` (1 minutes, ",
        "![seconds against classes](bench/results/cpu-sweep/classes-seconds.png)",
        "![extra memory against classes](bench/results/cpu-sweep/classes-memory.png)",
        "From C = 100,000 to 300,000 with `workspace_bytes=0`, the time of a step grows as C^1.00 and its "
        "extra memory as C^0.04, by 4.0 bytes a class.",
    ],
    "sampled": [
        "drawing 1% of 10,000,000 classes takes 0.012 of the time of `torch.rand(C)` and `topk`, and "
        "10 MB at C = 10,000,000 and 11 MB at C = 100,000,000; a step at `sample_rate=0.1` with "
        "`sparse_grad` takes 0.14 of one over all classes at B = 64, C = 1,000,000, D = 256, and 0.16 "
        "with the optimizer's."
    ],
    "gpu": [
        "On one NVIDIA Test (`python -m bench sweep --quick`, [",
        "| **this package** | 8.19 (3.00) | 49.2 (3.00) | 49.2 (3.00) | 81.9 (3.00) | 98.3 (3.00) "
        "| 246 (3.00) |",
    ],
    "model": [
        "`python -m bench --model h100 --rows 8` counts what a step would cost: a roofline of 5.4 ms and "
        "292 MB beside the weight gradient, where an eager bfloat16 head has 54 ms and 16 GB."
    ],
    "demo": [
        "2,200 kanji, 20 fonts, 8 epochs in 174 s; on 500 other kanji in 8 other fonts TAR@FAR 1e-3 is "
        "0.780 and rank-1 0.862 (seed 0). The whole demo took 3.8 minutes"
    ],
}
"""What the blocks say of the made-up results: of each table one whole row at least."""


@pytest.mark.parametrize("block", readme.BLOCKS)
def test_blocks_hold_the_numbers_of_their_files(tmp_path: Path, block: str) -> None:
    found = " ".join(readme.BLOCKS[block](_results(tmp_path)).split())
    for part in EXPECTED[block]:
        assert part in found, part


def test_a_block_without_its_file_is_empty(tmp_path: Path) -> None:
    for name in readme.BLOCKS:
        assert readme.BLOCKS[name](tmp_path) == ""


def test_the_sweep_is_made_again_by_a_target_that_writes_what_readme_shows(tmp_path: Path) -> None:
    makefile = (readme.ROOT / "Makefile").read_text()
    for command, made_by in readme.MADE_BY.items():
        recipe = (
            makefile.partition(f"\n{made_by.removeprefix('make ')}:")[2].partition("\n")[2].splitlines()[0]
        )
        variables = {"$(PY)": "python", "$(RESULTS)": "bench/results"}
        for name, value in variables.items():
            recipe = recipe.replace(name, value)
        assert recipe.strip() == command
        sweep = dataclasses.replace(made_up(), command=command)
        (tmp_path / readme.SWEEP).write_text(sweep.to_json())
        assert f"`{made_by}` (1 minutes, " in readme.sweep(tmp_path)
    assert "`make bench-sweep` (" in readme.sweep(readme.RESULTS)


def test_a_lead_that_keeping_memory_does_not_lessen_is_not_called_less(tmp_path: Path) -> None:
    _results(tmp_path)
    runs = ({**KEPT.runs[0], "compiled": [2.1], "eager": [2.2]},)
    (tmp_path / readme.KEPT).write_text(dataclasses.replace(KEPT, runs=runs).to_json())
    assert "this package is 2.10 times as fast" in " ".join(readme.kept(tmp_path).split())
    (tmp_path / readme.MAIN).unlink()
    assert "with malloc as it is" not in " ".join(readme.kept(tmp_path).split())
