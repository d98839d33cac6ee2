"""The Python of docs/checkpoints.md runs from top to bottom, as it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for block in 2 * blocks:  # it may be pasted again
        exec(block, names)
    assert torch.equal(names["other"].weight, names["centres"])
    assert torch.equal(names["smaller"].weight[[0, 2]], names["centres"][[7, 0]])
    assert load_file("new-centres.safetensors")["optimizer.step"].item() == 1
