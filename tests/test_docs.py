"""Every page of documentation runs: its Python, its commands, and what it shows of their output."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from expface_kernels.__main__ import PROGRAM, main
from expface_kernels.analysis import plots
from tests.distributed import run_ranks
from tests.test_compat.theirs import CombinedMarginLoss
from tests.tolerances import CLIPPED, SUM_ORDER, assert_close, relative_error

ROOT = Path(__file__).resolve().parents[1]
RANKS = 4  # all that the launcher has: the text speaks of the default group
MARGIN = """
import torch
class Halved:
    def __call__(self, theta):
        return torch.cos(theta) / 2
"""
NUMBER = re.compile(r"[\d.,]+(?:e[-+]?\d+)?")


def blocks(file: str, language: str, section: str = "") -> list[str]:
    """Return the fenced blocks of a page, or of its section of that name."""
    text = (ROOT / file).read_text()
    if section:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found = [block for name, block in fenced if name == language]
    assert found, f"{file}: no {language or 'plain'} block in {section or 'it'}"
    return found


def execute(file: str, code: list[str], **names: Any) -> dict[str, Any]:
    """Run blocks one after the other in one namespace, and return it."""
    for block in code:
        exec(compile(block, file, "exec"), names)
    return names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a user's directory, with a margin in it."""
    (tmp_path / "mymargins.py").write_text(MARGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_python_of_readme_runs_and_the_function_equals_the_head() -> None:
    small = [block.replace("100_000", "1_000") for block in blocks("README.md", "python")]
    names = execute("README.md", small)
    head, rows = names["head"], (names["backbone"](names["images"]), names["labels"])
    as_function = torch.autograd.grad(names["loss"], head.weight)[0]
    as_head = torch.autograd.grad(head(*rows), head.weight)[0]
    assert relative_error(as_function, as_head) <= SUM_ORDER
    assert names["mine"](*rows).isfinite()


def test_the_training_loop_of_getting_started_learns(folder: Path) -> None:
    names = execute("docs/getting_started.md", blocks("docs/getting_started.md", "python"))
    assert names["accept_rate"] > 0.8  # untrained, it is 1 pair in 1000
    saved = torch.load("model.pt", weights_only=True)
    assert saved["threshold"] == names["threshold"]
    assert names["angles"].rows == names["CLASSES"]


def test_the_python_of_curves_runs(folder: Path) -> None:
    names = execute("docs/curves.md", blocks("docs/curves.md", "python"))
    assert [angles.rows for angles in names["monitor"].epochs] == [384, 384]
    assert len(names["ranker"].ranking()) == 384
    assert (folder / "angles.png").is_file()
    assert torch.load("monitor.pt", weights_only=True)["epoch"] == 3


def test_the_table_of_curves_is_what_the_command_prints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "draw_views", lambda margins, out: [])
    assert main(["curves"]) == 0
    printed = capsys.readouterr().out.split("Pictures:")[0]
    (table,) = blocks("docs/curves.md", "")
    assert [line.rstrip() for line in printed.splitlines()] == table.splitlines()


def test_the_python_of_checkpoints_runs_and_may_be_pasted_again(folder: Path) -> None:
    names = execute("docs/checkpoints.md", 2 * blocks("docs/checkpoints.md", "python"))
    assert torch.equal(names["other"].weight, names["centres"])
    assert torch.equal(names["smaller"].weight[[0, 2]], names["centres"][[7, 0]])
    assert load_file("new-centres.safetensors")["optimizer.step"].item() == 1


def test_the_python_of_tools_runs() -> None:
    for block in blocks("docs/tools.md", "python"):
        execute("docs/tools.md", [block], __name__="docs")


def _commands() -> Iterator[tuple[str, str]]:
    """Yield (arguments, what the page shows or nothing) of each console block."""
    for block in blocks("docs/tools.md", "console"):
        first, _, shown = block.partition("\n")
        assert first.startswith(f"$ {PROGRAM} ")
        yield first.removeprefix(f"$ {PROGRAM} "), shown


def _printed(call: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return a command's exit code and output; a CPU's plan has a process of its own."""
    if not call.startswith("plan") or "--device" in call:
        return main(shlex.split(call)), capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "expface_kernels", *shlex.split(call)],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"},  # or the library of the products would show
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout


def _difference(shown: str, printed: str) -> str:
    """Say where two texts differ, apart from numbers and widths, which depend on the machine."""
    for expected, got in zip_longest(shown.splitlines(), printed.splitlines(), fillvalue=""):
        one, two = (re.sub(r"[\s━─]+", " ", NUMBER.sub("N", line)).strip() for line in (expected, got))
        if one != two:
            return f"{one!r} is {two!r}"
    return ""


@pytest.mark.parametrize(("command", "shown"), list(_commands()), ids=lambda text: text[:40])
def test_each_command_shows_what_the_page_shows(
    command: str, shown: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call, _, tail = command.partition(" | tail -")
    code, printed = _printed(call, capsys)
    assert code == (1 if "does not fit" in printed else 0), printed
    if tail:
        printed = "".join(printed.splitlines(keepends=True)[-int(tail) :])
    if not shown:
        assert printed
    elif call.startswith("plan"):
        assert printed == shown  # nothing in it depends on the machine
    else:
        assert _difference(shown, printed) == ""


def _run_rank(group: Any, file: str, code: list[str]) -> dict[str, Any]:
    """Return what the code leaves on a rank: the last loss, the norms of the backbone's parameters."""
    torch.manual_seed(group.rank())
    # The launcher has made the default group, and ends it.
    group_line = re.compile(r"^.*(init|destroy)_process_group\(.*\n", re.MULTILINE)
    names = execute(file, [group_line.sub("", block) for block in code], torch=torch)
    with torch.no_grad():
        norms = [p.detach().double().norm() for p in names["backbone"].parameters()]
    return {"loss": names["loss"].item(), "backbone": torch.stack(norms), "classes": names["classes"]}


def test_code_for_many_ranks_runs() -> None:
    results = run_ranks(RANKS, _run_rank, "docs/partial_fc.md", blocks("docs/partial_fc.md", "python"))
    assert results[0]["loss"] > 0
    for found in results[1:]:
        assert found["loss"] == results[0]["loss"]  # the rows differ, the loss is of all
        assert relative_error(found["backbone"], results[0]["backbone"]) <= SUM_ORDER  # and they train alike
    assert results[0]["classes"].shape == (32, 5)


def _run_insightface(group: Any, swap: str, restore: str, clip: str, folder: Path) -> None:
    """Run their script after the swap: a step, save, the page's restore, a clipped step."""
    rank = dist.get_rank(group)
    cfg = SimpleNamespace(
        margin_list=(1.0, 0.5, 0.0), interclass_filtering_threshold=0, embedding_size=64, num_classes=100,
        sample_rate=1.0, fp16=False,
    )  # fmt: skip
    names = execute("docs/migrate.md", [swap], cfg=cfg, CombinedMarginLoss=CombinedMarginLoss)
    module = names["module_partial_fc"]
    backbone = DistributedDataParallel(torch.nn.Linear(8, 64), process_group=group)
    groups = [{"params": backbone.parameters()}, {"params": module.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=0.9)
    names |= {"torch": torch, "dist": dist, "rank": rank, "backbone": backbone, "opt": optimizer}
    images, labels = torch.randn(2, 8), torch.randint(100, (2,))

    def backward(scale: float) -> None:
        optimizer.zero_grad()
        (module(backbone(images), labels) * scale).backward()

    backward(1.0)
    optimizer.step()
    content = {"state_dict_softmax_fc": module.state_dict(), "state_optimizer": optimizer.state_dict()}
    torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")
    kept = module.weight.detach().clone()
    torch.nn.init.zeros_(module.weight)
    execute("docs/migrate.md", [restore.replace("checkpoint_gpu_", f"{folder}/checkpoint_gpu_")], **names)
    assert torch.equal(module.weight, kept)
    backward(1e6)
    execute("docs/migrate.md", [clip.replace('"cuda"', '"cpu"')], **names)
    squares = sum(p.grad.square().sum() for p in module.parameters())
    dist.all_reduce(squares, group=group)
    squares += sum(p.grad.square().sum() for p in backbone.parameters())
    assert float(squares) == pytest.approx(25, rel=CLIPPED)


def test_insightfaces_script_runs_after_the_swap(tmp_path: Path) -> None:
    run_ranks(RANKS, _run_insightface, *blocks("docs/migrate.md", "python", "InsightFace"), tmp_path)


def test_pytorch_metric_learnings_code_runs_after_the_swap() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses", exc_type=ModuleNotFoundError)
    page, embeddings = "docs/migrate.md", torch.randn(8, 512, requires_grad=True)
    swap, anew = blocks(page, "python", "pytorch-metric-learning")[:2]
    names = {"torch": torch, "embeddings": embeddings, "labels": torch.randint(1000, (8,))}
    torch.manual_seed(2)  # of their centers
    found = execute(page, [swap, anew], **names)
    torch.manual_seed(2)
    theirs = losses.ArcFaceLoss(num_classes=1000, embedding_size=512)
    assert_close(found["loss"], theirs(embeddings, names["labels"]), dtype=torch.float32)
    made, head = found["loss_func"], found["head"]
    assert head.margin.m == round(made.margin.m, 3)
    assert head.margin.boundary == made.margin.boundary
    for name in ("num_classes", "embedding_size", "scale", "reduction", "target_gradient"):
        assert getattr(head, name) == getattr(made, name)
