"""The code in the documentation runs as it stands, on as many ranks as it is about."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.tolerances import SUM_ORDER, relative_error

ROOT = Path(__file__).resolve().parents[1]
RANKS = 4  # all that the launcher has: the text speaks of the default group


def code(file: str, section: str = "") -> str:
    """The python blocks of a page, or of its section of that name, one after the other."""
    text = (ROOT / file).read_text()
    if section:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks, f"{file}: no code in {section or 'it'}"
    return "\n".join(blocks)


def run(group: Any, text: str, name: str) -> dict[str, Any]:
    """What the code leaves: the last loss, and where the head's parameters are."""
    names: dict[str, Any] = {"torch": torch}
    torch.manual_seed(group.rank())
    with mock.patch.multiple(dist, init_process_group=mock.DEFAULT, destroy_process_group=mock.DEFAULT):
        exec(compile(text, name, "exec"), names)
    with torch.no_grad():
        norms = [p.detach().double().norm() for p in names["backbone"].parameters()]
    classes = names.get("classes", torch.zeros(0))
    return {"loss": names["loss"].item(), "backbone": torch.stack(norms), "classes": classes}


@pytest.mark.parametrize(
    ("file", "section"), [("docs/partial_fc.md", ""), ("README.md", "Many processes, samples of classes")]
)
def test_code_for_many_ranks_runs(file: str, section: str) -> None:
    results = run_ranks(RANKS, run, code(file, section), file)
    assert results[0]["loss"] > 0
    for found in results[1:]:
        assert found["loss"] == results[0]["loss"]  # the rows differ, the loss is of all
        assert relative_error(found["backbone"], results[0]["backbone"]) <= SUM_ORDER  # and they train alike
    if file.startswith("docs"):
        assert results[0]["classes"].shape == (32, 5)
