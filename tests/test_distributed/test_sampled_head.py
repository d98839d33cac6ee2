"""A head of one process that samples its classes: its state, its sparse gradient, what optimizers make of it.

B rows · C classes · D features · S classes of a sample
"""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from expface_kernels import ExpFace, MarginSoftmaxHead, clip_grad_norm_, margin_cross_entropy
from expface_kernels.distributed.sampling import Sampler
from tests.cases import batch
from tests.tolerances import CLIPPED, SUM_ORDER, relative_error

B, C, D = 8, 60, 16
RATE = 0.5
PAGE = Path(__file__).parents[2] / "docs" / "partial_fc.md"
LR, MOMENTUM, DECAY = 0.05, 0.9, 0.1


def rows() -> tuple[Tensor, Tensor]:
    """x (B, D) float32 that wants a gradient, y (B,)."""
    x, _, y = batch("random", B, C, D)
    return x.float().requires_grad_(), y


def sampled(**options: Any) -> MarginSoftmaxHead:
    return MarginSoftmaxHead(D, C, **{"sample_rate": RATE, "scale": 16.0, **options})


def sample_of(step: int, seed: int = 0) -> Tensor:
    found = Sampler(RATE, seed, step, 0)(rows()[1], C)
    assert found is not None
    return found


def is_in(sample: Tensor) -> Tensor:
    """(C,) bool"""
    return torch.zeros(C, dtype=torch.bool).index_fill_(0, sample, True)


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("workspace_bytes", [0, 2**20])
def test_a_step_is_the_function_over_its_sample(sparse_grad: bool, workspace_bytes: int) -> None:
    head = sampled(sparse_grad=sparse_grad, workspace_bytes=workspace_bytes, seed=4)
    for step in range(3):
        x, y = rows()
        assert head.sampling_step == step
        loss, stats = head(x, y, return_stats=True)
        loss.backward()
        x2, y = rows()
        w = head.weight.detach().clone().requires_grad_()
        sample = sample_of(step, seed=4)
        options: Any = {"scale": 16.0, "target_gradient": "detached", "workspace_bytes": workspace_bytes}
        right, right_stats = margin_cross_entropy(x2, w, y, **options, class_subset=sample, return_stats=True)
        right.backward()
        assert torch.equal(loss, right)
        assert torch.equal(x.grad, x2.grad)
        grad = head.weight.grad
        assert grad.is_sparse == sparse_grad
        assert torch.equal(grad.to_dense(), w.grad)
        assert torch.equal(stats.hardest_negative_class, right_stats.hardest_negative_class)
        if sparse_grad:
            assert torch.equal(grad._indices()[0], sample)
            assert grad._values().shape == (C // 2, D)
        head.weight.grad = None
    assert not torch.equal(sample_of(0), sample_of(1))


def test_without_sampling_a_sparse_gradient_has_all_rows() -> None:
    x, y = rows()
    grads = []
    for sparse_grad in (True, False):
        head = sampled(sample_rate=1.0, sparse_grad=sparse_grad)
        head(x, y).backward()
        grads.append(head.weight.grad)
    assert torch.equal(grads[0].coalesce().indices()[0], torch.arange(C))
    assert torch.equal(grads[0].to_dense(), grads[1])


def test_sparse_gradients_of_several_backwards_add_up() -> None:
    x, y = rows()
    dense, sparse = sampled(), sampled(sparse_grad=True)
    for head in (dense, sparse):
        for half in (slice(0, 4), slice(4, 8)):
            (head(x[half], y[half]) / 2).backward()
    assert sparse.weight.grad.is_sparse
    assert relative_error(sparse.weight.grad.to_dense(), dense.weight.grad) <= SUM_ORDER


def test_evaluation_takes_all_classes_and_draws_nothing() -> None:
    x, y = rows()
    head, full = sampled().eval(), sampled(sample_rate=1.0)
    assert torch.equal(head(x, y), full(x, y))
    assert head.sampling_step == 0
    head.train()(x, y)
    assert head.sampling_step == 1
    head.sample_rate = 1.0
    assert torch.equal(head(x, y), full(x, y))
    assert head.sampling_step == 1


@pytest.mark.parametrize("nested", [False, True])
def test_the_step_is_part_of_the_state_and_continues_the_samples(nested: bool) -> None:
    x, y = rows()
    heads = [sampled(), sampled()]
    first, second = (nn.ModuleDict({"head": h}) if nested else h for h in heads)
    for _ in range(3):
        heads[0](x, y)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    prefix = "head." if nested else ""
    assert list(state) == [f"{prefix}weight", f"{prefix}sampling_step"]
    assert int(state[f"{prefix}sampling_step"]) == 3
    second.load_state_dict(state)
    assert list(state) == [f"{prefix}weight", f"{prefix}sampling_step"]  # left as it was
    for _ in range(2):
        assert torch.equal(heads[0](x, y), heads[1](x, y))
    # A head without samples has no step and minds none; one with samples keeps its own where there is none.
    full = sampled(sample_rate=1.0)
    assert list(full.state_dict()) == ["weight"]
    full.load_state_dict(heads[0].state_dict())
    heads[0].load_state_dict(full.state_dict())
    assert heads[0].sampling_step == 5


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_draw_the_same_samples(how: str) -> None:
    x, y = rows()
    head = sampled()
    head(x, y)
    twin = copy.deepcopy(head) if how == "deepcopy" else pickle.loads(pickle.dumps(head))
    assert torch.equal(head(x, y), twin(x, y))
    assert twin.sampling_step == 2


def test_wrong_arguments_raise_as_without_samples_and_draw_nothing() -> None:
    x, y = rows()
    head = sampled()
    with pytest.raises(ValueError, match=r"^labels: expected 0 <= label < 60 or ignore_index=-100, got 60"):
        head(x, torch.where(y == y[0], C, y))
    with pytest.raises(ValueError, match=r"^embeddings: expected 16 features"):
        head(x[:, :3], y)
    assert head.sampling_step == 0


class LargestOutput(TorchDispatchMode):
    """Elements of the largest strided tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in strided((args, kwargs))}
        for tensor in strided(out):
            if tensor.untyped_storage()._cdata not in inputs:  # views cost nothing
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


def strided(tree: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [t for t in leaves if isinstance(t, Tensor) and t.layout == torch.strided]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.SparseAdam])
def test_nothing_in_a_sampled_step_is_as_large_as_the_classes(optimizer: Any) -> None:
    classes = 200_000
    head = MarginSoftmaxHead(4, classes, sample_rate=0.001, sparse_grad=True)
    x, y = torch.randn(8, 4, requires_grad=True), torch.randint(classes, (8,))
    chosen = optimizer(head.parameters(), lr=0.1)
    head(x, y).backward()
    chosen.step()  # the first step makes the optimizer's state
    with LargestOutput() as seen:
        head(x, y).backward()
        chosen.step()
    assert 0 < seen.elements < classes // 10
    with LargestOutput() as seen:
        head.sparse_grad = False
        head(x, y).backward()
    assert seen.elements >= classes  # or the check would see nothing


# IF 2140 and 1462: what happens to rows that a step's sample lacks? Two semantics, named by `sparse_grad`.


def two_steps(head: MarginSoftmaxHead, optimizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Weights before, after one and after two steps; dense gradients of the two."""
    x, y = rows()
    weights, grads = [head.weight.detach().clone()], []
    for _ in range(2):
        optimizer.zero_grad()
        head(x, y).backward()
        grads.append(head.weight.grad.to_dense())
        optimizer.step()
        weights.append(head.weight.detach().clone())
    return weights, grads


def test_with_dense_gradients_momentum_and_decay_move_rows_that_are_not_sampled() -> None:
    head = sampled()
    optimizer = torch.optim.SGD(head.parameters(), LR, momentum=MOMENTUM, weight_decay=DECAY)
    weights, grads = two_steps(head, optimizer)
    first, second = is_in(sample_of(0)), is_in(sample_of(1))
    assert (first & ~second).any()
    assert (~first & ~second).any()
    # Every row, sampled or not, obeys the optimizer's formula; unsampled ones with gradient 0.
    speed = grads[0] + DECAY * weights[0]
    expected = weights[0] - LR * speed
    assert relative_error(weights[1], expected) <= SUM_ORDER
    expected -= LR * (MOMENTUM * speed + grads[1] + DECAY * expected)
    assert relative_error(weights[2], expected) <= SUM_ORDER
    assert (grads[1][~second] == 0).all()
    assert (weights[2] != weights[1])[first & ~second].any(1).all()  # momentum of the step before
    assert (weights[2] != weights[1])[~first & ~second].any(1).all()  # decay alone


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.SparseAdam])
def test_with_sparse_gradients_rows_that_are_not_sampled_stay_as_they_are(optimizer: Any) -> None:
    head = sampled(sparse_grad=True)
    chosen = optimizer(head.parameters(), lr=LR)
    weights, _ = two_steps(head, chosen)
    for step in range(2):
        inside = is_in(sample_of(step))
        assert torch.equal(weights[step + 1][~inside], weights[step][~inside])
        assert (weights[step + 1] != weights[step])[inside].any(1).all()
    if optimizer is torch.optim.SparseAdam:  # nor does their state
        never = ~is_in(sample_of(0)) & ~is_in(sample_of(1))
        assert (chosen.state[head.weight]["exp_avg_sq"][never] == 0).all()
        assert (chosen.state[head.weight]["exp_avg_sq"][~never] > 0).any(1).all()


def test_plain_sgd_does_the_same_with_both() -> None:
    by_kind = []
    for sparse_grad in (False, True):
        head = sampled(sparse_grad=sparse_grad)
        by_kind.append(two_steps(head, torch.optim.SGD(head.parameters(), LR))[0][2])
    assert relative_error(*by_kind) <= SUM_ORDER


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_torch_decays_nothing_with_sparse_gradients_as_the_page_says(optimizer: Any) -> None:
    x, y = rows()
    head, backbone = sampled(sparse_grad=True), nn.Linear(D, D)
    head(backbone(x), y).backward()
    with pytest.raises(RuntimeError) as raised:
        optimizer(head.parameters(), lr=LR, weight_decay=DECAY).step()
    said = str(raised.value).partition(". ")[0]
    assert f'{optimizer.__name__} "{said}"' in PAGE.read_text().replace("\n", " ")
    # What to do, says the page: centres in a group of their own.
    groups = [{"params": backbone.parameters()}, {"params": head.parameters(), "weight_decay": 0.0}]
    before = head.weight.detach().clone()
    optimizer(groups, lr=LR, weight_decay=DECAY).step()
    assert torch.equal((head.weight != before).any(1), is_in(sample_of(0)))


def test_a_sparse_gradient_is_clipped_with_the_others() -> None:
    norms = []
    for sparse_grad in (False, True):
        head = sampled(sparse_grad=sparse_grad, margin=ExpFace())
        x, y = rows()
        head(x, y).backward()
        norms.append(clip_grad_norm_([x, *head.parameters()], 0.5))
        total = x.grad.square().sum() + head.weight.grad.to_dense().square().sum()
        assert float(total) == pytest.approx(0.25, rel=CLIPPED)
    assert torch.equal(*norms)
