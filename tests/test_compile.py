"""torch.compile with fullgraph=True: same losses, gradients and errors, and no graph for every step.

B rows · C classes · D features
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from expface_kernels import ArcFace, CosFace, ExpFace, MarginSoftmaxHead, margin_cross_entropy
from tests.cases import batch
from tests.tolerances import assert_close

FEATURES, CLASSES = 16, 20


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """A backbone of one layer, and the head."""

    def __init__(self, margin: Any = None, **options: Any) -> None:
        super().__init__()
        self.backbone = nn.Linear(FEATURES, FEATURES)
        self.head = MarginSoftmaxHead(FEATURES, CLASSES, margin, **{"scale": 16.0, **options})

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.head(self.backbone(x), y)


class ModelWithStats(Model):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.head(self.backbone(x), y, return_stats=True)


class ModelWithSubset(Model):
    subset: Tensor

    def forward(self, x: Tensor, y: Tensor) -> Any:
        rows = self.backbone(x)
        return margin_cross_entropy(rows, self.head.weight, y, scale=16.0, class_subset=self.subset)


def small(rows: int = 8) -> tuple[Tensor, Tensor]:
    """x (B, D) float32 and y (B,)."""
    x, _, y = batch("random", rows, CLASSES, FEATURES)
    return x.float(), y


def step(model: nn.Module, run: Callable[..., Any], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The loss, what comes with it, and the gradients of everything."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x, y)
    loss, stats = out if isinstance(out, tuple) else (out, None)
    loss.sum().backward()
    found = {"loss": loss.detach(), "dx": x.grad}
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | ({} if stats is None else stats._asdict())


def assert_steps_equal(compiled: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    assert compiled.keys() == eager.keys()
    for name, value in eager.items():
        got = compiled[name]
        assert got.dtype == value.dtype, name
        if not value.is_floating_point():
            assert torch.equal(got, value), name
            continue
        assert torch.equal(got.isnan(), value.isnan()), name
        assert_close(got.nan_to_num(), value.nan_to_num(), dtype=torch.float32, what=name)


class TrainedMargin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor(0.3))

    def forward(self, theta: Tensor) -> Tensor:
        return torch.cos(theta + self.m)


def with_frozen(part: str) -> Model:
    model = Model()
    getattr(model, part).requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "compiler"),
    [
        (Model(), "aot_eager"),
        (Model(ArcFace(0.5, "monotonic"), target_gradient="exact", reduction="none"), "aot_eager"),
        (Model(backend="reference"), "aot_eager"),
        (Model(TrainedMargin()), "aot_eager"),
        (ModelWithSubset(), "aot_eager"),
        (with_frozen("head"), "aot_eager"),
        (with_frozen("backbone"), "aot_eager"),
        # The default compiler, which also rewrites what is around the op; the other one is faster.
        (ModelWithStats(), "inductor"),
    ],
    ids=["defaults", "exact rows", "reference", "trained", "subset", "no dw", "no dx", "statistics"],
)
def test_a_compiled_model_is_one_graph_and_equals_the_eager_one(model: Model, compiler: str) -> None:
    x, y = small()
    model = copy.deepcopy(model)
    model.subset = torch.unique(torch.cat([y, torch.tensor([0, CLASSES - 1])]))
    y[2] = -100
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    assert_steps_equal(step(model, compiled, x, y), step(model, model, x, y))


def test_compiled_autocast_equals_eager_autocast() -> None:
    x, y = small()
    model = Model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_steps_equal(step(model, compiled, x, y), step(model, model, x, y))


SCHEDULES: dict[str, Callable[[MarginSoftmaxHead, int], None]] = {
    "parameter": lambda head, i: setattr(head.margin, "m", 0.3 + 0.05 * i),
    "scale": lambda head, i: setattr(head, "scale", 10.0 + i),
    "new margin": lambda head, i: setattr(head, "margin", ExpFace(0.9 - 0.05 * i)),
    "two margins in turn": lambda head, i: setattr(
        head, "margin", CosFace(0.1 + 0.01 * i) if i % 2 else ArcFace(0.1 + 0.01 * i)
    ),
    "per row": lambda head, i: setattr(head.margin, "m", torch.full((8,), 0.5 + 0.01 * i)),
}


@pytest.mark.parametrize(
    ("schedule", "margin"),
    [
        ("parameter", ExpFace()),
        ("parameter", ArcFace(0.5, "monotonic")),
        ("scale", ExpFace()),
        ("new margin", ExpFace()),
        ("two margins in turn", ExpFace()),
        ("per row", CosFace()),
    ],
    ids=str,
)
def test_a_schedule_over_twelve_steps_needs_few_graphs(schedule: str, margin: Any) -> None:
    """A float is compiled as a constant once, then as a variable: two graphs for each kind of margin."""
    x, y = small()
    model = Model(copy.deepcopy(margin))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for i in range(12):
        SCHEDULES[schedule](model.head, i)
        assert_steps_equal(step(model, compiled, x, y), step(model, model, x, y))
    assert counter.frame_count <= (4 if schedule == "two margins in turn" else 3)


def test_the_size_of_the_batch_may_change_from_step_to_step() -> None:
    model = Model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rows in (8, 32, 3, 5, 17, 1, 2):  # torch compiles for one row apart
        x, y = small(rows)
        assert_steps_equal(step(model, compiled, x, y), step(model, model, x, y))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_a_bad_label_raises_from_compiled_code_too(label: int) -> None:
    x, y = small()
    model = Model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x, y)
    y[3] = label
    text = f"labels: expected 0 <= label < {CLASSES} or ignore_index=-100, got {label} in row 3"
    with pytest.raises(ValueError, match=re.escape(text)):
        compiled(x, y)
