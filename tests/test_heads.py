"""The head: construction, initial centres, state, copies, assignments, nearest classes, training.

B rows · C classes · D features
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expface_kernels import ArcFace, CosFace, ExpFace, MarginSoftmaxHead, NormFace, margin_cross_entropy
from expface_kernels.backends import cpu
from tests.cases import batch, leaves
from tests.tolerances import assert_close


class TrainedMargin(nn.Module):
    """cos θ − m with an m that trains."""

    def __init__(self, m: float = 0.35) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor(m))

    def forward(self, theta: Tensor) -> Tensor:
        return torch.cos(theta) - self.m


def small() -> tuple[Tensor, Tensor]:
    """x (8, 16) float32, y (8,) in [0, 20)."""
    x, _, y = batch("random", 8, 20, 16)
    return x.float(), y


def gradients(head: MarginSoftmaxHead, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dw)."""
    x = x.clone().requires_grad_()
    loss = head(x, y)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (x, head.weight))


def assert_same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left, right)


def test_defaults_are_the_documented_ones() -> None:
    head = MarginSoftmaxHead(16, 20)
    assert isinstance(head.margin, ExpFace)
    assert head.margin.m == 0.7
    assert (head.scale, head.reduction, head.ignore_index) == (64.0, "mean", -100)
    assert (head.target_gradient, head.backend, head.workspace_bytes) == ("detached", "auto", 256 * 2**20)
    assert head.weight.shape == (20, 16)
    assert head.weight.dtype == torch.float32
    assert head.weight.requires_grad
    assert head.local_weight is head.weight
    assert (head.class_start, head.num_local) == (0, 20)


def test_the_head_trains_detached_and_the_function_exact() -> None:
    x, y = small()
    head = MarginSoftmaxHead(16, 20, ArcFace(), scale=16.0)
    assert inspect.signature(margin_cross_entropy).parameters["target_gradient"].default == "exact"
    by_mode = {}
    for mode in ("exact", "detached"):
        a, w = leaves(x, head.weight)
        loss = margin_cross_entropy(a, w, y, ArcFace(), scale=16.0, target_gradient=mode)
        by_mode[mode] = (loss.detach(), *torch.autograd.grad(loss, (a, w)))
    assert_same(gradients(head, x, y), by_mode["detached"])
    head.target_gradient = "exact"
    assert_same(gradients(head, x, y), by_mode["exact"])
    assert not torch.equal(by_mode["exact"][1], by_mode["detached"][1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("margin", CosFace(0.1)),
        ("scale", 8.0),
        ("reduction", "none"),
        ("ignore_index", int(small()[1][0])),
        ("target_gradient", "exact"),
        ("workspace_bytes", 0),
        ("backend", "reference"),
    ],
)
def test_what_is_assigned_between_steps_is_what_a_fresh_head_would_have(name: str, value: Any) -> None:
    x, y = small()
    head = MarginSoftmaxHead(16, 20, scale=16.0)
    before = gradients(head, x, y)
    setattr(head, name, value)
    after = gradients(head, x, y)
    assert_same(after, gradients(MarginSoftmaxHead(16, 20, **{"scale": 16.0, name: value}), x, y))
    if name not in ("workspace_bytes", "backend"):  # these choose how, not what
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_initial_centres_are_normal_with_deviation_a_hundredth() -> None:
    w = MarginSoftmaxHead(128, 4000).weight.double()
    # Half a million draws: the mean is known to 1.4e-5 and the deviation to 1e-5, so these are 5 sigmas.
    assert abs(float(w.mean().detach())) < 7e-5
    assert abs(float(w.std().detach()) - 0.01) < 5e-5
    within = float((w.abs() < 0.01).double().mean())
    assert abs(within - 0.6827) < 4e-3  # as a normal, and no uniform, has it


def test_initial_centres_depend_on_the_seed_alone_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = MarginSoftmaxHead(16, 20, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = MarginSoftmaxHead(16, 20, seed=3), MarginSoftmaxHead(16, 20, seed=4)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    with torch.no_grad():
        again.weight.zero_()
    again.reset_parameters()
    assert torch.equal(first.weight, again.weight)


def test_device_and_dtype_are_those_of_the_centres() -> None:
    assert MarginSoftmaxHead(16, 20, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    assert MarginSoftmaxHead(16, 20, device="meta").weight.is_meta
    empty = MarginSoftmaxHead(16, 20, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert torch.equal(empty.weight, MarginSoftmaxHead(16, 20).weight)


def test_state_is_the_weight_and_what_a_margin_of_modules_brings() -> None:
    assert list(MarginSoftmaxHead(16, 20).state_dict()) == ["weight"]
    assert list(MarginSoftmaxHead(16, 20, TrainedMargin()).state_dict()) == ["weight", "margin.m"]
    source, target = MarginSoftmaxHead(16, 20, seed=1), MarginSoftmaxHead(16, 20, seed=2)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(source.weight, target.weight)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("margin", [ArcFace(0.3, "easy"), TrainedMargin(0.2)], ids=["plain", "module"])
def test_copies_compute_the_same_and_share_nothing(how: str, margin: Any) -> None:
    x, y = small()
    head = MarginSoftmaxHead(16, 20, margin, scale=30.0, target_gradient="exact", reduction="sum")
    twin = copy.deepcopy(head) if how == "deepcopy" else pickle.loads(pickle.dumps(head))
    assert_same(gradients(head, x, y), gradients(twin, x, y))
    with torch.no_grad():
        twin.weight.zero_()
    assert (head.weight != 0).any()
    assert twin.margin is not head.margin


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_casting_the_head_casts_the_centres_and_their_gradient(dtype: torch.dtype) -> None:
    x, y = small()
    head = MarginSoftmaxHead(16, 20)
    stored = head.weight.detach().to(dtype)
    head.to(dtype)
    loss, dx, dw = gradients(head, x, y)
    assert head.weight.dtype == dw.dtype == dtype
    assert dx.dtype == torch.float32
    assert torch.equal(head.weight, stored)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("target_gradient", ["exact", "detached"])
def test_a_margin_with_parameters_is_registered_and_trains(target_gradient: str) -> None:
    x, y = small()
    head = MarginSoftmaxHead(16, 20, TrainedMargin(), target_gradient=target_gradient)
    assert [name for name, _ in head.named_parameters()] == ["weight", "margin.m"]
    before = head(x, y)
    before.backward()
    assert head.margin.m.grad > 0  # a larger margin is a larger loss
    torch.optim.SGD(head.parameters(), lr=0.01).step()
    assert head.margin.m < 0.35
    assert head(x, y) < before


@pytest.mark.parametrize("first", [ExpFace(0.5), TrainedMargin()], ids=["plain", "module"])
@pytest.mark.parametrize(
    "second", [NormFace(), TrainedMargin(0.1), torch.cos], ids=["plain", "module", "function"]
)
def test_any_kind_of_margin_may_replace_any_other(first: Any, second: Any) -> None:
    x, y = small()
    head = MarginSoftmaxHead(16, 20, first)
    head.margin = second
    assert head.margin is second
    assert_same(gradients(head, x, y), gradients(MarginSoftmaxHead(16, 20, second), x, y))
    registered = [name for name, _ in head.named_parameters()]
    assert registered == (["weight", "margin.m"] if isinstance(second, nn.Module) else ["weight"])


def test_statistics_come_along_with_the_same_loss() -> None:
    x, y = small()
    head = MarginSoftmaxHead(16, 20)
    loss, stats = head(x, y, return_stats=True)
    assert torch.equal(loss, head(x, y))
    assert stats.target_angle.shape == y.shape


@pytest.mark.parametrize("tiles", ["one", "many", "uneven"])
@pytest.mark.parametrize("k", [1, 2, 7, 19, 45])
def test_topk_is_the_head_of_the_sorted_cosines(
    tiles: str, k: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w, _ = batch("mixed", 9, 45, 16)
    if (
        tiles != "one"
    ):  # of 8 or of 2 classes, so that k is larger than a tile, and 45 is a multiple of neither
        monkeypatch.setattr(cpu, "TILE_CLASSES", (8, 8) if tiles == "many" else (2, 2))
    head = MarginSoftmaxHead(16, 45, backend=backend, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(w)
    cos, classes = head.topk(x, k)
    expected, order = nn.functional.cosine_similarity(x[:, None], w[None], dim=2).sort(dim=1, descending=True)
    assert cos.shape == classes.shape == (9, k)
    assert classes.dtype == torch.int64
    assert torch.equal(classes, order[:, :k])
    assert_close(cos, expected[:, :k], dtype=torch.float64)


@pytest.mark.parametrize(
    ("x_dtype", "w_dtype", "out_dtype"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_topk_widens_16_bit_inputs_and_has_no_gradient(
    x_dtype: torch.dtype, w_dtype: torch.dtype, out_dtype: torch.dtype, backend: str, small_tiles: int
) -> None:
    x, w, _ = batch("random", 6, 45, 16)
    x = x.to(x_dtype).requires_grad_()
    head = MarginSoftmaxHead(16, 45, backend=backend, dtype=w_dtype)
    with torch.no_grad():
        head.weight.copy_(w)
    cos, classes = head.topk(x, 3)
    similarity = nn.functional.cosine_similarity(x[:, None].double(), head.weight[None].double(), dim=2)
    expected, order = similarity.topk(3, dim=1)
    assert cos.dtype == out_dtype
    assert torch.equal(classes, order)
    assert_close(cos, expected, dtype=out_dtype)
    assert not cos.requires_grad


def test_topk_knows_no_margin() -> None:
    x, _ = small()
    plain, steep = MarginSoftmaxHead(16, 20, NormFace()), MarginSoftmaxHead(16, 20, ArcFace(1.0), scale=1.0)
    assert_same(plain.topk(x, 5), steep.topk(x, 5))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_a_short_training_run_learns_its_classes(optimizer: Any) -> None:
    g = torch.Generator().manual_seed(1)  # not the centres' own
    directions = torch.randn(12, 16, generator=g)
    y = torch.arange(96) % 12
    x = directions[y] + 0.3 * torch.randn(96, 16, generator=g)
    head = MarginSoftmaxHead(16, 12, scale=16.0)
    # Centres of length 0.04: a gradient is 25 times that of a unit vector, and so SGD's step is small.
    chosen = optimizer(head.parameters(), lr=0.01 if optimizer is torch.optim.AdamW else 0.02)
    losses = []
    for _ in range(40):
        loss, stats = head(x, y, return_stats=True)
        chosen.zero_grad()
        loss.backward()
        chosen.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    assert stats.correct.all()
    assert torch.equal(head.topk(x, 1)[1][:, 0], y)
