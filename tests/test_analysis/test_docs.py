"""docs/curves.md: its Python runs, its commands parse, its table is the one that the command prints."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
import torch

from expface_kernels.__main__ import main
from expface_kernels.analysis import AngularMonitor, LabelNoiseRanker, plots
from expface_kernels.cli import curves
from tests.test_package import ROOT

PAGE = ROOT / "docs" / "curves.md"
TEXT = PAGE.read_text()


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == language]


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    found = blocks("python")
    assert len(found) == 3
    for block in found:
        exec(compile(block, str(PAGE), "exec"), names)
    monitor, ranker = names["monitor"], names["ranker"]
    assert isinstance(monitor, AngularMonitor)
    assert isinstance(ranker, LabelNoiseRanker)
    assert [angles.rows for angles in monitor.epochs] == [384, 384]
    assert len(ranker.ranking()) == 384
    assert (tmp_path / "angles.png").is_file()
    assert torch.load(tmp_path / "monitor.pt", weights_only=True)["epoch"] == 3


def test_the_table_of_the_page_is_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "draw_views", lambda margins, out: [])
    assert main(["curves", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.split("Pictures:")[0]
    (table,) = blocks("")
    assert [line.rstrip() for line in printed.splitlines()] == table.splitlines()


def test_the_options_that_the_page_names_exist() -> None:
    parser = argparse.ArgumentParser()
    curves.add_parser(parser.add_subparsers())
    parser.parse_args(
        ["curves", "--margin", "arcface:0.5,boundary=monotonic", "--only", "--out", "x", "--json", "y"]
    )
    named = {
        word for quoted in re.findall(r"`(--[^`]+)`", TEXT) for word in shlex.split(quoted) if word[0] == "-"
    }
    assert named == {"--margin", "--only", "--out", "--json"}
