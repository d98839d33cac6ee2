from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from bench import show

ROOT = Path(__file__).resolve().parents[2]
COLUMNS, ROWS = ["head", "C=1\nD=2", "[x]"], [["ours [a]", "1.5", "2"], ["a longer name", "10", "–"]]


@pytest.mark.parametrize("kind", [show.Rich, show.Plain])
def test_every_cell_title_and_caption_is_there_brackets_too(kind: type[show.Rich] | type[show.Plain]) -> None:
    file = io.StringIO()
    out = kind(file)
    out.table("A title [1]", COLUMNS, ROWS, "A caption")
    out.line("[bold] is no markup")
    text = file.getvalue()
    for part in (
        "A title [1]",
        "ours [a]",
        "a longer name",
        "1.5",
        "10",
        "–",
        "[x]",
        "A caption",
        "[bold] is",
    ):
        assert part in text, part


def test_plain_columns_stand_under_one_another() -> None:
    file = io.StringIO()
    show.Plain(file).table("t", COLUMNS, ROWS, "")
    header, first, second = file.getvalue().splitlines()[2:]
    assert header.index("C=1 D=2") + len("C=1 D=2") == first.index("1.5") + 3 == second.index("10") + 2


def test_without_a_terminal_notes_are_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with show.progress() as progress:
        progress.task("sweep", 3)(1)
        progress.note("shape 1 of 3")
    assert capsys.readouterr().err == "shape 1 of 3\n"


def test_a_bare_machine_needs_neither_rich_nor_matplotlib_nor_metric_learning(tmp_path: Path) -> None:
    """What `make bench-gpu PY=python3` finds on a GPU machine, but for the GPU."""
    path = tmp_path / "x.json"
    code = f"""
import sys
for name in ("rich", "tqdm", "matplotlib", "pytorch_metric_learning", "cut_cross_entropy", "liger_kernel"):
    sys.modules[name] = None
from bench.__main__ import main
assert main(["gpu"]) == 2, "there is a GPU"
argv = ["--toy", "--classes", "500", "--forward-only", "--peers", "ours", "eager", "pml_arcface", "liger"]
sys.exit(main(["sweep", *argv, "--json", {str(path)!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert path.is_file()
    assert "pytorch-metric-learning is not installed" in done.stdout
    assert "there is no GPU" in done.stderr
    assert "no pictures: matplotlib is not installed" in done.stderr
