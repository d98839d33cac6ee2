"""The public function: every argument, subsets, margins, reductions, frozen inputs.

B rows · C classes · D features · x (B, D) embeddings · w (C, D) class centres · y (B,) labels
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expface_kernels import (
    ArcFace,
    CosFace,
    ExpFace,
    margin_cross_entropy,
    ops,
    pipeline,
    reference,
)
from tests.cases import MARGINS, batch, leaves, truth
from tests.steps import WIDE, assert_steps_close, differs, small, step
from tests.tolerances import assert_close

# Options that change a number; the others have a test of their own.
EFFECTS: dict[str, Any] = {
    "margin": ArcFace(0.5),
    "scale": 8.0,
    "reduction": "sum",
    "ignore_index": int(small()[2][0]),
    "target_gradient": "detached",
    "class_subset": torch.unique(small()[2]),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_every_option_changes_the_step_and_agrees_with_the_reference(name: str, backend: str) -> None:
    options: dict[str, Any] = {"scale": 16.0, name: EFFECTS[name]}
    changed = step(*small(), backend=backend, **options)
    assert differs(changed, step(*small(), backend=backend, scale=16.0))
    assert_steps_close(changed, truth(*small(), **options))


def test_defaults_are_the_documented_ones() -> None:
    assert_steps_close(
        step(*small()),
        truth(*small(), ExpFace(0.7), scale=64.0, reduction="mean", target_gradient="exact"),
    )
    assert step(*small(), None)[0] == step(*small())[0]


def test_workspace_bytes_bounds_what_the_forward_saves_and_changes_no_result(small_tiles: int) -> None:
    x, w, y = leaves(*small()[:2])[0], leaves(*small()[:2])[1], small()[2]

    def saved(workspace_bytes: int) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            margin_cross_entropy(x, w, y, workspace_bytes=workspace_bytes)
        return sum(sizes)

    tile = 4 * 8 * small_tiles  # bytes of float32 exponentials of a tile of classes for 8 rows
    everything, one_tile, nothing = (saved(size) for size in (1 << 20, tile, 0))
    assert nothing < one_tile <= nothing + 2 * tile
    assert one_tile < everything
    for size in (tile, 0):
        assert_steps_close(step(*small(), workspace_bytes=size), step(*small()))


def test_backend_chooses_who_computes(backend: str) -> None:
    x, w = leaves(*small()[:2], dtype=WIDE)
    loss = margin_cross_entropy(x, w, small()[2], scale=16.0, backend=backend)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    if backend == "reference":  # the only one whose gradient has a gradient
        (second,) = torch.autograd.grad((dx**2).sum(), x)
        assert torch.isfinite(second).all()
    else:
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad((dx**2).sum(), x)


@pytest.mark.parametrize("ignored", [(), (0, 3), (1,), tuple(range(8))])
def test_reductions_agree_with_each_other_over_the_counted_rows(
    ignored: tuple[int, ...], backend: str
) -> None:
    x, w, y = small()
    y[list(ignored)] = -100
    rows = margin_cross_entropy(x, w, y, reduction="none", backend=backend)
    assert rows.shape == (8,)
    assert (rows[list(ignored)] == 0).all()
    counted = 8 - len(ignored)
    assert int((rows > 0).sum()) == counted
    assert_close(margin_cross_entropy(x, w, y, reduction="sum", backend=backend), rows.sum(), dtype=WIDE)
    mean = margin_cross_entropy(x, w, y, backend=backend)
    assert_close(mean, rows.sum() / max(counted, 1), dtype=WIDE)


def test_weights_of_a_users_own_on_the_rows_reach_the_gradient(backend: str) -> None:
    x, w, y = small()
    y[2] = -100
    weights = torch.linspace(-1, 3, 8, dtype=WIDE)
    x, w = leaves(x, w, WIDE)
    loss = margin_cross_entropy(x, w, y, scale=16.0, reduction="none", backend=backend)
    dx, dw = torch.autograd.grad((weights * loss).sum(), (x, w))
    exact = reference.margin_cross_entropy(x, w, y, scale=16.0, reduction="none")
    one_by_one = [torch.autograd.grad(row, (x, w), retain_graph=True) for row in exact]
    assert_close(dx, sum(c * row[0] for c, row in zip(weights, one_by_one, strict=True)), dtype=WIDE)
    assert_close(dw, sum(c * row[1] for c, row in zip(weights, one_by_one, strict=True)), dtype=WIDE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_class_subset_is_the_loss_over_those_centres_alone(dtype: torch.dtype, backend: str) -> None:
    x, w, y = small()
    w = w.to(dtype).double()
    y[3] = -100
    subset = torch.unique(torch.cat([y[y >= 0], torch.tensor([0, 19])]))
    places = torch.where(y >= 0, torch.searchsorted(subset, y), -100)
    expected, dx, part = truth(x, w[subset], places)
    dw = torch.zeros_like(w).index_copy(0, subset, part)
    strided = torch.stack([subset, subset], 1)[:, 0]
    for chosen in (subset, strided):
        got = step(x, w.to(dtype), y, class_subset=chosen, backend=backend)
        assert_close(got[0], expected, dtype=WIDE)
        assert_close(got[1], dx, dtype=WIDE)
        assert_close(got[2], dw, dtype=dtype)
        outside = torch.ones(20, dtype=torch.bool).index_fill(0, subset, False)
        assert (got[2][outside] == 0).all()
    stats = margin_cross_entropy(x, w, y, class_subset=subset, backend=backend, return_stats=True)[1]
    assert set(stats.hardest_negative_class[y >= 0].tolist()) <= set(subset.tolist())


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_class_subset_is_copied_where_bad_ones_are_not_refused(
    on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Tensor] = []
    negatives = pipeline.negatives

    def seen(*args: Any, **options: Any) -> Any:
        taken.append(args[4])
        return negatives(*args, **options)

    monkeypatch.setattr(pipeline, "negatives", seen)
    monkeypatch.setattr(ops, "on_cpu", lambda values: on_cpu)
    x, w, _ = small()
    subset = torch.tensor([0, 5, 19 if on_cpu else 2**40])
    loss = margin_cross_entropy(x, w, torch.zeros(x.shape[0], dtype=torch.int64), class_subset=subset)
    assert (taken[0] is subset) == on_cpu
    assert taken[0].tolist() == [0, 5, 19]
    assert bool(loss.isnan()) == (not on_cpu)


def test_a_margin_per_row_is_that_margin_on_that_row(backend: str) -> None:
    x, w, y = small()
    m = torch.linspace(0, 0.7, 8, dtype=WIDE)
    rows = step(x, w, y, ArcFace(m), scale=16.0, reduction="none", backend=backend)[0]
    alone = [step(x[b : b + 1], w, y[b : b + 1], ArcFace(m[b].item()), scale=16.0)[0] for b in range(8)]
    assert_close(rows, torch.stack(alone), dtype=WIDE)


@pytest.mark.parametrize("target_gradient", ["exact", "detached"])
def test_a_margin_made_from_the_rows_carries_its_gradient_to_them(target_gradient: str, backend: str) -> None:
    """As AdaFace and MagFace do: the margin of a row depends on its norm."""

    def loss_of(x: Tensor, w: Tensor, function: Any, **options: Any) -> Tensor:
        margin = CosFace(0.1 * torch.linalg.vector_norm(x, dim=1).clamp(0.1, 10))
        return function(x, w, y, margin, scale=16.0, target_gradient=target_gradient, **options)

    x, w, y = small()
    y[5] = -100
    grads = []
    for function, options in (
        (margin_cross_entropy, {"backend": backend}),
        (reference.margin_cross_entropy, {}),
    ):
        x_, w_ = leaves(x, w, WIDE)
        grads.append(torch.autograd.grad(loss_of(x_, w_, function, **options), (x_, w_)))
    assert_close(grads[0][0], grads[1][0], dtype=WIDE)
    assert_close(grads[0][1], grads[1][1], dtype=WIDE)
    # The loss itself does not see a row's length: what points along the row came through the margin.
    along = (grads[0][0] * x).sum(1)
    assert (along[y >= 0].abs() > 0).all()
    assert along[5] == 0


@pytest.mark.parametrize("make", [ArcFace, ExpFace])
def test_finite_differences_confirm_every_gradient_of_the_exact_mode(make: Any, backend: str) -> None:
    x, w, y = batch("random", 4, 6, 5)
    x, w = x.requires_grad_(), w.mul(100).requires_grad_()  # at length 1, where a step of 1e-6 is small
    m = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=WIDE, requires_grad=True)
    options = {"scale": 5.0, "reduction": "none", "backend": backend}
    assert torch.autograd.gradcheck(
        lambda x, w, m: margin_cross_entropy(x, w, y, make(m), **options), (x, w, m)
    )


def test_a_function_of_a_users_own_is_a_margin(backend: str) -> None:
    x, w, y = small()
    own = step(x, w, y, lambda theta: torch.cos(theta) - 0.35, backend=backend)
    assert_steps_close(own, step(x, w, y, CosFace(0.35), backend=backend))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rows=st.integers(1, 9),
    classes=st.integers(2, 40),
    features=st.integers(2, 20),
    scale=st.floats(0.5, 80),
    margin=st.sampled_from(MARGINS),
    target_gradient=st.sampled_from(("exact", "detached")),
    reduction=st.sampled_from(("mean", "sum", "none")),
    kind=st.sampled_from(("random", "mixed", "learnt")),
    workspace_bytes=st.sampled_from((0, 1 << 20)),
    seed=st.integers(0, 1000),
)
def test_cpu_equals_the_reference_in_float64_for_any_small_input(
    rows: int, classes: int, features: int, kind: str, workspace_bytes: int, seed: int, **options: Any
) -> None:
    x, w, y = batch(kind, rows, classes, features, seed)
    got = step(x, w, y, backend="cpu", workspace_bytes=workspace_bytes, **options)
    assert_steps_close(got, truth(x, w, y, **options))


def test_rows_and_centres_may_have_any_strides(backend: str) -> None:
    x, w, y = small()
    expected = step(x, w, y, backend=backend)
    wide = torch.stack([x, torch.full_like(x, torch.nan)], 2)[..., 0]
    transposed = w.T.contiguous().T
    assert not wide.is_contiguous()
    assert not transposed.is_contiguous()
    assert_steps_close(step(wide, transposed, y, backend=backend), expected)
