"""docs/tools.md: every command runs, and shows what the page shows; the page's Python runs too."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import pytest
import torch

from expface_kernels.__main__ import PROGRAM, main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "tools.md").read_text()
OWN = """
import torch
class Halved:
    def __call__(self, theta):
        return torch.cos(theta) / 2
"""
NUMBER = re.compile(r"[\d.,]+(?:e[-+]?\d+)?")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def _commands() -> Iterator[tuple[str, str]]:
    """(command, what it prints or nothing) of each console block."""
    for block in _blocks("console"):
        first, _, shown = block.partition("\n")
        assert first.startswith(f"$ {PROGRAM} ")
        yield first.removeprefix(f"$ {PROGRAM} "), shown


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's directory, with a margin in it."""
    (tmp_path / "mymargins.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(os.getcwd())


def _same(shown: str, printed: str) -> str:
    """Where they differ, numbers and widths apart, which another machine changes; empty where nowhere."""
    for expected, got in zip_longest(shown.splitlines(), printed.splitlines(), fillvalue=""):
        one, two = (re.sub(r"[\s━─]+", " ", NUMBER.sub("N", line)).strip() for line in (expected, got))
        if one != two:
            return f"{one!r} is {two!r}"
    return ""


def _run(call: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and output. A CPU's plan runs in a process of its own: here it would count that buffers
    are filled with NaN, for other tests."""
    if not call.startswith("plan") or "--device" in call:
        return main(shlex.split(call)), capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "expface_kernels", *shlex.split(call)],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"},  # or the library of the products would show
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.parametrize(("command", "shown"), list(_commands()), ids=lambda text: text[:40])
def test_each_command_shows_what_the_page_shows(
    command: str, shown: str, elsewhere: None, capsys: pytest.CaptureFixture[str]
) -> None:
    call, _, tail = command.partition(" | tail -")
    code, printed = _run(call, capsys)
    assert code == (1 if "does not fit" in printed else 0), printed
    if tail:
        printed = "".join(printed.splitlines(keepends=True)[-int(tail) :])
    if not shown:
        assert printed
    elif call.startswith("plan"):
        assert printed == shown  # nothing in it depends on the machine
    else:
        assert _same(shown, printed) == ""


@pytest.mark.parametrize("block", _blocks("python"), ids=lambda text: text.split("\n")[0])
def test_the_pages_python_runs(block: str) -> None:
    exec(compile(block, "docs/tools.md", "exec"), {"__name__": "docs"})
    assert torch.is_grad_enabled()


def test_the_comparison_can_fail() -> None:
    assert _same("a 1.0 b", "a 2e-5  b") == ""
    assert _same("a 1.0 b", "a 1.0 c")
    assert _same("a\nb", "a")
