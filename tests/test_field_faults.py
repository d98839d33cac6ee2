"""Faults that users of heads met once more on this package: each is refused, or right.

B rows · C classes · D features; gen and LABELS are those of the reports, float64
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from expface_kernels import (
    ArcFace,
    CosFace,
    MarginSoftmaxHead,
    clip_grad_norm_,
    margin_cross_entropy,
)
from expface_kernels.compat.insightface import PartialFC_V2
from tests.cases import gen
from tests.distributed import run_ranks
from tests.tolerances import SHARDED, relative_error

F64 = torch.float64
LABELS = torch.tensor([0, 34, 35, 63, 64, 69])
ROOT = Path(__file__).parents[1]


def head_of(w: Tensor, group: Any = None, **options: Any) -> MarginSoftmaxHead:
    head = MarginSoftmaxHead(w.shape[1], w.shape[0], ArcFace(), dtype=F64, process_group=group, **options)
    with torch.no_grad():
        head.local_weight.copy_(w[head.class_start : head.class_start + head.num_local])
    return head


def message(call: Callable[[], Any]) -> str:
    """What it raises, as "Type: text"; "" for nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def recomputed(group: Any) -> dict[str, Any]:
    """A step of a sampled head, plain and under activation checkpointing, then one more of each."""
    found: dict[str, Any] = {}
    for way in ("plain", "reentrant", "not reentrant"):
        x, w = gen(6, 16, 70)
        x.requires_grad_()
        head = head_of(w, group, sample_rate=0.3)
        for step in range(2):
            if way == "plain":
                loss = head(x, LABELS)
            else:
                loss = checkpoint(head, x, LABELS, use_reentrant=way == "reentrant")
            loss.backward()
            found[way, step] = (loss.detach(), x.grad.clone(), head.sampling_step)
    return found


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_recomputed_forward_takes_the_sample_of_the_first_and_counts_once(ranks: int) -> None:
    results = [recomputed(None)] if ranks == 0 else run_ranks(ranks, recomputed)
    for found in results:
        assert found["plain", 0][0] != found["plain", 1][0]
        for way in ("reentrant", "not reentrant"):
            for step in range(2):
                loss, dx, count = found[way, step]
                assert count == step + 1
                assert torch.equal(loss, found["plain", step][0])
                assert relative_error(dx, found["plain", step][1]) <= SHARDED[F64]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("shared_labels", [True, False])
def test_accumulated_checkpointed_forwards_each_take_their_own_sample_again(
    reentrant: bool, shared_labels: bool
) -> None:
    """Two forwards before one backward, which runs both again, the second one first."""
    gradients = []
    for checkpointed in (False, True):
        x, w = gen(6, 16, 70)
        x.requires_grad_()
        head = head_of(w, None, sample_rate=0.3)
        labels = [LABELS, LABELS if shared_labels else LABELS.flip(0)]
        if checkpointed:
            losses = [checkpoint(head, x, y, use_reentrant=reentrant) for y in labels]
        else:
            losses = [head(x, y) for y in labels]
        sum(losses).backward()
        assert head.sampling_step == 2
        gradients.append((x.grad, head.weight.grad))
    for plain, again in zip(*gradients, strict=True):
        assert relative_error(again, plain) <= SHARDED[F64]


def test_centres_do_not_depend_on_the_default_device() -> None:
    right = MarginSoftmaxHead(16, 70).weight
    with torch.device("meta"):
        assert torch.equal(MarginSoftmaxHead(16, 70, device="cpu").weight, right)


@pytest.mark.parametrize("name", ["num_classes", "embedding_size", "seed"])
@pytest.mark.parametrize("options", [{}, {"sample_rate": 0.5}, {"sparse_grad": True}], ids=str)
def test_what_a_head_was_built_with_stays(name: str, options: dict[str, Any]) -> None:
    head = MarginSoftmaxHead(16, 70, **options)
    with pytest.raises(AttributeError, match=f"^{name}: expected .* was built, got 200; build another"):
        setattr(head, name, 200)
    with pytest.raises(ValueError, match="0 <= label < 70"):
        head(torch.randn(1, 16), torch.tensor([150]))


def stepping_between(group: Any) -> str:
    x, w = gen(6, 16, 70)
    head = head_of(w, group)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    a, b = head(x.requires_grad_(), LABELS), head(x, LABELS)
    a.backward()
    optimizer.step()
    return message(b.backward)


def test_a_backward_after_the_optimizer_is_refused_as_by_torch() -> None:
    for found in [stepping_between(None), *run_ranks(1, stepping_between)]:
        assert found.startswith("RuntimeError: one of the variables needed for gradient computation has been")


class Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(16, 16), head

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.head(self.backbone(x), y)
        return loss


def wrapped(group: Any) -> dict[str, str]:
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh.from_group(group, "cpu")
    heads: dict[str, Callable[[], nn.Module]] = {
        "head": lambda: MarginSoftmaxHead(16, 70, process_group=group),
        "PartialFC_V2": lambda: PartialFC_V2(ArcFace(), 16, 70, process_group=group),
    }
    found = {}
    for name, make in heads.items():
        found[name] = message(lambda make=make: fully_shard(make(), mesh=mesh))
        found[f"{name} in a model"] = message(lambda make=make: fully_shard(Model(make()), mesh=mesh))
        model = Model(make())
        fully_shard(model, mesh=mesh, ignored_params={model.head.weight})
        model(torch.randn(3, 16), torch.tensor([0, 1, 69])).backward()
        assert model.head.weight.grad is not None
    head = heads["head"]()
    found["pickled"] = message(lambda: torch.save(head, "/dev/null"))
    return found


def test_fsdp_and_pickle_refuse_a_sharded_head_and_name_the_cure() -> None:
    for found in run_ranks(2, wrapped):
        assert "state_dict(), or for any number of ranks use save_sharded or save_centres" in found.pop(
            "pickled"
        )
        for name, text in found.items():
            assert text.startswith("RuntimeError: FSDP: expected a module without a sharded head"), name
            assert "ignored_params={head.weight}" in text


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev], ids=["grad", "jacrev"])
def test_transforms_of_torch_func_are_refused_with_the_way_out(transform: Any) -> None:
    x, w = gen(6, 16, 70)
    with pytest.raises(RuntimeError, match=r"not torch\.func\.jvp.*backend='reference' has them all"):
        transform(lambda x: margin_cross_entropy(x, w, LABELS))(x)
    right = torch.func.grad(lambda x: margin_cross_entropy(x, w, LABELS, backend="reference"))(x)
    leaf = x.clone().requires_grad_()
    margin_cross_entropy(leaf, w, LABELS).backward()
    assert relative_error(leaf.grad, right) < 1e-5


def test_numbers_of_numpy_are_numbers() -> None:
    x, w = gen(6, 16, 70)
    kinds = {np.float32: 32.0, np.float16: 32.0, np.int64: 32, np.int8: 32}
    right = margin_cross_entropy(x, w, LABELS, scale=32.0)
    for kind, value in kinds.items():
        assert torch.equal(margin_cross_entropy(x, w, LABELS, scale=kind(value)), right)
    loss = margin_cross_entropy(
        x, w, LABELS, workspace_bytes=np.int32(2**20), ignore_index=np.int16(-1), scale=np.float64(32)
    )
    assert torch.equal(loss, right)
    head = MarginSoftmaxHead(16, np.int64(70), CosFace(np.float32(0.25)), sample_rate=np.float32(0.5))
    assert head.topk(x.float(), np.int64(3))[1].shape == (6, 3)
    assert (type(head.margin.m), type(head.sample_rate), head.margin.m) == (float, float, 0.25)


def f_of_cosines(cosines: Tensor, labels: Tensor) -> Tensor:
    return cosines


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: MarginSoftmaxHead(4, 4, seed=2**70), ValueError, "seed: expected"),
        (lambda: MarginSoftmaxHead(4, 4, device="gpu"), ValueError, "device: expected one .* got 'gpu'"),
        pytest.param(
            lambda: MarginSoftmaxHead(4, 4, device="cuda"), ValueError, "device: .* got 'cuda'", marks=NO_GPU
        ),
        (lambda: MarginSoftmaxHead(4, 4, f_of_cosines), TypeError, r"margin: .* got f_of_cosines\(cosines"),
        (lambda: clip_grad_norm_([], "5"), TypeError, "max_norm: expected a number, got str '5'"),
        (
            lambda: margin_cross_entropy(torch.eye(4).to_sparse(), torch.eye(4), torch.arange(4)),
            TypeError,
            "embeddings: expected a dense tensor, got one of layout torch.sparse_coo",
        ),
    ],
    ids=["seed", "gpu", "cuda", "margin", "clip", "sparse"],
)
def test_what_torch_would_say_less_clearly(call: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=f"^{text}"):
        call()


SNIPPET = """
    import torch
    from expface_kernels import MarginSoftmaxHead, margin_cross_entropy

    x, w, y = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1])
    loss = margin_cross_entropy(x, w, y, scale=32.0)
    loss.backward()
    margin_cross_entropy(x, w, y, return_stats=True)[1].lse.mean()
    head = MarginSoftmaxHead(3, 4)
    head.forward(x, y).backward()
    loss, stats = head.forward(x, y, return_stats=True)
    head.scale += 1.0
"""


def test_users_types_follow_from_return_stats(tmp_path: Path) -> None:
    file = tmp_path / "user.py"
    file.write_text(textwrap.dedent(SNIPPET) + "margin_cross_entropy(x, w, y, scala=3.0)\n")
    command = [sys.executable, "-m", "mypy", "--config-file="]
    command += ["--follow-imports=silent", f"--cache-dir={tmp_path}", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    last = len(file.read_text().splitlines())
    assert errors, "the argument that there is not"
    assert all(line.startswith(f"{file}:{last}: ") for line in errors), done.stdout
