"""Bad input of the glyph programs: one line that names the argument, and exit status 2, before training."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from examples.glyphs import demo, find_wrong_labels

BOTH = [
    (["--epochs", "x"], "--epochs: expected an integer of at least 1, got 'x'"),
    (["--epochs", "0"], "--epochs: expected an integer of at least 1, got '0'"),
    (["--seed", "-1"], "--seed: expected an integer of at least 0, got '-1'"),
    (["--out", "/dev/null"], "--out: expected a folder, got /dev/null (File exists)"),
    (["--data", "none.npz"], "none.npz does not exist"),
]
CASES = [
    *((program.main, *case) for program in (demo, find_wrong_labels) for case in BOTH),
    (demo.main, ["--losses", "expface", "softface"], "sphereface"),
    (
        demo.main,
        ["--json", "/dev/null/below"],
        "--json: expected a file that can be written, got /dev",
    ),
    *((find_wrong_labels.main, ["--share", share], "share: expected") for share in ("1", "-0.1", "nan")),
]


@pytest.mark.parametrize(("main", "arguments", "words"), CASES)
def test_bad_input_is_one_clear_line(
    main: Callable[[Sequence[str]], int],
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(find_wrong_labels, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["--toy", *arguments])
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error


@pytest.mark.parametrize(("before", "after"), [(None, "passive"), ("active", "active")])
def test_idle_threads_sleep_unless_the_user_said_otherwise(before: str | None, after: str) -> None:
    """As seen when torch is imported, by which time OpenMP has read it."""
    program = (
        "import os, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            print(os.environ.get('OMP_WAIT_POLICY'), flush=True)\n"
        "            os._exit(0)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import runpy; runpy.run_path('examples/glyphs/demo.py')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    if before is not None:
        environment["OMP_WAIT_POLICY"] = before
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == after
