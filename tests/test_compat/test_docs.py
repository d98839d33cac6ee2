"""The code of docs/migrate.md after each swap runs, and is what its diffs make of the code before."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from expface_kernels import ArcFace, MarginSoftmaxHead
from expface_kernels.compat.insightface import PartialFC_V2
from expface_kernels.compat.pytorch_metric_learning import from_loss
from tests.distributed import run_ranks
from tests.test_compat import theirs
from tests.tolerances import CLIPPED, assert_close

PAGE = (Path(__file__).parents[2] / "docs" / "migrate.md").read_text()
RANKS = 4  # all that the launcher has: the text speaks of the default group
C, D = 1000, 512


def blocks(section: str, kind: str) -> list[str]:
    """The page's code of that kind, "diff" or "python", under a heading."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def side(diff: str, sign: str) -> str:
    """The code before ("-") or after ("+") a diff."""
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in (sign, " ", ""))


def insightface_script(group: Any, diff: str, restore: str, clip: str, folder: Path) -> None:
    """Their script after the swap: a step, save, the page's restore, a clipped step."""
    rank = dist.get_rank(group)
    cfg = SimpleNamespace(
        margin_list=(1.0, 0.5, 0.0),
        interclass_filtering_threshold=0,
        embedding_size=D,
        num_classes=C,
        sample_rate=1.0,
        fp16=False,
    )
    names: dict[str, Any] = {"cfg": cfg, "CombinedMarginLoss": theirs.CombinedMarginLoss}
    with mock.patch.object(nn.Module, "cuda", lambda module: module):
        exec(side(diff, "+"), names)
    module = names["module_partial_fc"]
    assert type(module) is PartialFC_V2
    assert module.world_size == RANKS
    backbone = DistributedDataParallel(nn.Linear(8, D), process_group=group)
    groups = [{"params": backbone.parameters()}, {"params": module.parameters()}]
    names |= {"torch": torch, "dist": dist, "rank": rank, "backbone": backbone}
    names["opt"] = torch.optim.SGD(groups, lr=1e-4, momentum=0.9)
    images, labels = torch.randn(2, 8), torch.randint(C, (2,))

    def backward(scale: float = 1.0) -> None:
        names["opt"].zero_grad()
        (module(backbone(images), labels) * scale).backward()

    backward()
    names["opt"].step()
    content = {"state_dict_softmax_fc": module.state_dict(), "state_optimizer": names["opt"].state_dict()}
    torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")
    kept = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.zero_()
    exec(restore.replace("checkpoint_gpu_", f"{folder}/checkpoint_gpu_"), names)
    assert torch.equal(module.weight, kept)
    backward(1e6)
    exec(clip.replace('"cuda"', '"cpu"'), names)
    rows = sum(p.grad.square().sum() for p in module.parameters())
    dist.all_reduce(rows, group=group)
    whole = rows + sum(p.grad.square().sum() for p in backbone.parameters())
    assert float(whole) == pytest.approx(25, rel=CLIPPED)


def test_insightfaces_script_runs_after_the_swap(tmp_path: Path) -> None:
    (diff,), (restore, clip) = blocks("InsightFace", "diff"), blocks("InsightFace", "python")
    assert "expface_kernels" not in side(diff, "-")
    changed = [line for line in diff.splitlines() if line[:1] in "+-" and line]
    assert len(changed) == 2, "only the import line changes"
    run_ranks(RANKS, insightface_script, diff, restore, clip, tmp_path)


def small(code: str) -> str:
    """A thousand classes do."""
    assert "100_000" in code
    return code.replace("100_000", f"{C}")


@pytest.fixture
def names() -> dict[str, Any]:
    pytest.importorskip("pytorch_metric_learning", exc_type=ModuleNotFoundError)
    torch.manual_seed(1)
    embeddings = torch.randn(8, D, requires_grad=True)
    return {
        "torch": torch,
        "embeddings": embeddings,
        "labels": torch.randint(C, (8,)),
        "MarginSoftmaxHead": MarginSoftmaxHead,
        "ArcFace": ArcFace,
    }


def test_pytorch_metric_learnings_code_runs_before_and_after(names: dict[str, Any]) -> None:
    swap, _ = blocks("pytorch-metric-learning", "diff")
    losses = []
    for sign in "-+":
        torch.manual_seed(2)  # of their centres
        exec(small(side(swap, sign)), names)
        losses.append(names["loss"].detach())
    assert isinstance(names["loss_func"], MarginSoftmaxHead)
    assert_close(losses[1], losses[0], dtype=torch.float32)


def test_the_head_without_theirs_is_the_one_from_theirs(names: dict[str, Any]) -> None:
    swap, anew = blocks("pytorch-metric-learning", "diff")
    exec(small(side(swap, "-")), names)
    exec(small(side(anew, "-")), names)
    made = from_loss(names["loss_func"])
    exec(small(side(anew, "+")), names)
    head = names["loss_func"]
    assert isinstance(made.margin, ArcFace)
    assert isinstance(head.margin, ArcFace)
    assert head.margin.m == round(made.margin.m, 3)
    for name in ("num_classes", "embedding_size", "scale", "reduction", "target_gradient"):
        assert getattr(head, name) == getattr(made, name)
    assert head.margin.boundary == made.margin.boundary
