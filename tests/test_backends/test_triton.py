"""The triton backend against float64 truth: in the interpreter (TRITON_INTERPRET=1), or on a GPU.

B rows · C classes · D features. Truth is taken at the values that the products see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from expface_kernels import ArcFace, ExpFace, functional, margin_cross_entropy
from expface_kernels.backends.base import INVALID_TARGET, NO_TARGET, NORM_EPS, Pairs, Request
from expface_kernels.backends.triton import TritonBackend, calls, plan
from expface_kernels.functional import topk_cosine
from expface_kernels.margins import MarginFunction
from tests.cases import INTERPRETED, TRITON_DEVICE, batch, eager, truth
from tests.tolerances import COSINE, assert_close, assert_rows_close, relative_error, row_cap

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU, or TRITON_INTERPRET=1"
)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
KEEP = 2**28


def _run(
    x: Tensor, w: Tensor, y: Tensor, margin: MarginFunction, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dw) of the sum, back on the CPU."""
    a, b = (t.to(TRITON_DEVICE).detach().requires_grad_() for t in (x, w))
    subset = options.pop("class_subset", None)
    if subset is not None:
        options["class_subset"] = subset.to(TRITON_DEVICE)
    y = y.to(TRITON_DEVICE)
    loss = margin_cross_entropy(a, b, y, margin, reduction="sum", backend="triton", **options)
    loss.backward()
    return loss.detach().cpu(), a.grad.cpu(), b.grad.cpu()


def _eager_errors(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    margin: MarginFunction,
    right: Sequence[Tensor],
    orders: int,
    **options: Any,
) -> list[float]:
    """The worst error of loss, dx and dw that eager makes over some orders of the features.

    They have one truth and other roundings. A few learnt rows have the error of a single logit, which
    is nothing or all of s·2⁻²⁴ by luck: one order says little about what float32 does there.
    """
    found = []
    for seed in range(orders):
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))
        loss, dx, dw = eager(x[:, order], w[:, order], y, margin, reduction="sum", **options)
        there = (loss, right[0]), (dx, right[1][:, order]), (dw, right[2][:, order])
        found.append([relative_error(a, b) for a, b in there])
    return torch.tensor(found).amax(0).tolist()  # NaN, wherever it stands, is no measure


def _check(
    x: Tensor, w: Tensor, y: Tensor, *, margin: MarginFunction | None = None, orders: int = 1, **options: Any
) -> None:
    """Loss, dx, dw of stored x and w, by the policy; dw also with every centre's gradient made an equal."""
    margin = ArcFace() if margin is None else margin
    got = _run(x, w, y, margin, **options)
    options.pop("workspace_bytes", None)
    right = truth(x, w, y, margin, reduction="sum", **options)
    dtype = torch.promote_types(x.dtype, w.dtype)
    errors: list[float | None] = [None] * 3
    if "class_subset" not in options:
        errors[:] = _eager_errors(x, w, y, margin, right, orders, dtype=dtype, **options)
    assert_close(got[0], right[0], eager=errors[0] if dtype == F32 else None, dtype=F32, what="loss")
    assert_close(got[1], right[1], eager=errors[1], dtype=x.dtype, what="dx")
    assert_close(got[2], right[2], eager=errors[2], dtype=w.dtype, what="dw")
    lengths = torch.linalg.vector_norm(w.double(), dim=1, keepdim=True)
    assert_close(got[2] * lengths, right[2] * lengths, dtype=dtype, what="dw·|w|")


@pytest.mark.parametrize("workspace_bytes", [0, KEEP])
@pytest.mark.parametrize("kind", ["random", "learnt", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_in_every_dtype(dtype: torch.dtype, kind: str, workspace_bytes: int) -> None:
    x, w, y = batch(kind, 37, 203, 72)
    _check(x.to(dtype), w.to(dtype), y, workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("kind", ["near_centre", "opposite", "learnt"])
@pytest.mark.parametrize("workspace_bytes", [0, KEEP])
def test_near_rows_hold_row_by_row(kind: str, workspace_bytes: int) -> None:
    x, w, y = batch(kind, 20, 131, 40, seed=4)
    got = _run(x.float(), w.float(), y, ExpFace(), workspace_bytes=workspace_bytes)
    right = truth(x, w, y, ExpFace(), reduction="sum")
    assert_rows_close(got[1], right[1], cap=row_cap(64.0), what="dx")
    assert_close(got[2], right[2], dtype=F32, what="dw")


# One of each, past one block of rows, past two blocks of classes, D not a multiple of a block, many features.
RAGGED = [(1, 1, 8), (1, 2, 8), (3, 5, 8), (9, 5, 8), (129, 257, 24), (2, 30, 500), (2, 30, 1000)]


@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("kind", ["random", "learnt"])
def test_ragged_shapes(kind: str, shape: tuple[int, int, int]) -> None:
    x, w, y = batch(kind, *shape)
    _check(x.float(), w.float(), y, orders=8)
    if shape[1] > 2:
        _check(x.to(BF16), w.to(BF16), y, orders=8, workspace_bytes=0)


@pytest.mark.parametrize("workspace_bytes", [0, 2 * 384 * 256, KEEP])  # of 700 classes 384 are kept, or all
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("kind", ["random", "mixed"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_the_wide_forward_tile(
    dtype: torch.dtype, kind: str, listed: bool, workspace_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 classes, from D = 512 on: whole tiles, a part of one, and none of what is beside the list."""
    x, w, y = batch(kind, 130, 700, 512)
    x, w = x.to(dtype), w.to(dtype)
    widths = []

    def watched(kernel: Any, programs: int, tile: Any, **arguments: Any) -> None:
        widths.append((kernel.__name__, tile.bn))
        calls.launch(kernel, programs, tile, **arguments)

    monkeypatch.setattr("expface_kernels.backends.triton.forward.launch", watched)
    options: dict[str, Any] = {}
    if listed:
        options["class_subset"] = torch.cat([torch.arange(0, 700, 2), y]).unique()
    _check(x, w, y, workspace_bytes=workspace_bytes, **options)
    kept = workspace_bytes and dtype == BF16
    assert (("forward_tile", 256) in widths) == (workspace_bytes != KEEP or not kept)


@pytest.mark.parametrize("scale", [128.0, 256.0])
@pytest.mark.parametrize("kind", ["random", "learnt", "flat"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scales_at_random_init_and_opposite_to_everything(
    dtype: torch.dtype, kind: str, scale: float
) -> None:
    x, w, y = batch(kind, 15, 3 if kind == "flat" else 203, 64)
    x, w = x.to(dtype), w.to(dtype)
    if kind == "flat":  # 16-bit rows opposite to three centres that nearly agree cancel in both gradients
        got = _run(x, w, y, ExpFace(), scale=scale)
        assert_close(got[0], truth(x, w, y, ExpFace(), scale=scale, reduction="sum")[0], dtype=F32)
        assert all(bool(t.isfinite().all()) for t in got)
    else:
        _check(x, w, y, scale=scale)


# float16 keeps nothing.
@pytest.mark.parametrize(
    ("dtype", "workspace_bytes"), [(F32, 0), (F32, KEEP), (BF16, 0), (BF16, KEEP), (F16, 0)], ids=str
)
@pytest.mark.parametrize("kind", ["random", "learnt"])
@pytest.mark.parametrize("lengths", [(0.01, 30.0), (1e-3, 1e3)], ids=str)
def test_lengths_of_centres(
    lengths: tuple[float, float], dtype: torch.dtype, kind: str, workspace_bytes: int
) -> None:
    x, w, y = batch(kind, 20, 141, 40)
    low, high = lengths
    if high == 30.0:
        length = low * (high / low) ** torch.linspace(0, 1, 141, dtype=torch.float64)
    else:
        length = torch.where(torch.arange(141) % 2 == 0, low, high).double()
    w = w / torch.linalg.vector_norm(w, dim=1, keepdim=True) * length[:, None]
    x, w = x.to(dtype), w.to(dtype)
    got = _run(x, w, y, ArcFace(), workspace_bytes=workspace_bytes)
    right = truth(x, w, y, ArcFace(), reduction="sum")
    assert_close(got[1], right[1], dtype=dtype, what="dx")
    assert_close(got[2] * length[:, None], right[2] * length[:, None], dtype=dtype, what="dw·|w|")


@pytest.mark.parametrize("product", [BF16, F16], ids=str)
@pytest.mark.parametrize("kind", ["random", "learnt"])
@pytest.mark.parametrize("workspace_bytes", [0, KEEP])
def test_float32_masters_multiply_in_what_autocast_says(
    product: torch.dtype, kind: str, workspace_bytes: int
) -> None:
    x, w, y = batch(kind, 21, 150, 40)
    x, w = x.to(product).float(), w.to(product).float()  # so that the cast changes nothing
    right = truth(x, w, y, ArcFace(), reduction="sum")
    with torch.autocast(TRITON_DEVICE, product):
        got = _run(x, w, y, ArcFace(), workspace_bytes=workspace_bytes)
    assert (got[1].dtype, got[2].dtype) == (F32, F32)
    for name, actual, expected in zip(("loss", "dx", "dw"), got, right, strict=True):
        assert_close(actual, expected, dtype=F32 if name == "loss" else product, what=name)
    assert relative_error(got[1], right[1]) > 1e-6  # it did multiply in 16 bit


@pytest.mark.parametrize("lengths", [1e-6, 1e6])
def test_float16_products_take_float32_rows_and_centres_of_any_length(lengths: float) -> None:
    for kind in ("random", "learnt"):
        x, w, y = batch(kind, 21, 150, 40)
        x, w = (lengths * x).float(), (lengths * w).float()
        right = truth(x, w, y, ArcFace(), reduction="sum")
        with torch.autocast(TRITON_DEVICE, F16):
            got = _run(x, w, y, ArcFace())
        for name, actual, expected in zip(("loss", "dx", "dw"), got, right, strict=True):
            assert_close(actual, expected, dtype=F16, what=name)


@pytest.mark.parametrize("workspace_bytes", [0, KEEP])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)], ids=str)
def test_a_class_list_equals_the_gathered_centres(
    dtypes: tuple[torch.dtype, torch.dtype], workspace_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "CHUNK_BYTES", 0)
    for kind in ("random", "learnt"):
        x, w, y = batch(kind, 20, 400, 40)
        subset = torch.unique(torch.cat([y, torch.arange(0, 400, 3)]))
        x, w = x.to(dtypes[0]), w.to(dtypes[1])
        _check(x, w, y, class_subset=subset, workspace_bytes=workspace_bytes)


# A segment of segments, and one more.
@pytest.mark.parametrize(("rows", "labels"), [(70, 1), (70, 2), (1100, 1)])
def test_repeated_labels_add_up_in_segments_of_segments(rows: int, labels: int) -> None:
    x, w, _ = batch("random", rows, 5, 8)
    _check(x.float(), w.float(), torch.arange(rows) % labels + 1, margin=ExpFace())
    x, w, y = batch("learnt", rows, labels, 8)  # every row belongs to few centres of five
    w = torch.cat([w, -w.flip(1)[:1], w.roll(1, 1)[:1]])
    _check(x.float(), w.float(), y, margin=ExpFace())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace_bytes", [0, KEEP])
def test_a_second_run_gives_the_same_bits(dtype: torch.dtype, workspace_bytes: int) -> None:
    for kind in ("mixed", "learnt"):
        x, w, y = batch(kind, 40, 203, 24)
        x, w = x.to(dtype), w.to(dtype)
        runs = [_run(x, w, y % 7, ExpFace(), workspace_bytes=workspace_bytes) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_partly_kept_exponentials_join_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CHUNK_BYTES", 0)
    for kind in ("mixed", "learnt"):
        for dtype in (F32, BF16):
            x, w, y = batch(kind, 20, 500, 24)
            _check(x.to(dtype), w.to(dtype), y, workspace_bytes=2 * 128 * 128 * dtype.itemsize)


def test_kept_exponentials_of_rows_30_decades_apart() -> None:
    # Three centres that nearly agree: rows on them have l near e^64, rows opposite to them e^−64.
    x, w, y = batch("flat", 20, 3, 16)
    x = torch.where((torch.arange(20) % 2 == 0)[:, None], x, -x).float()
    got = _run(x, w.float(), y, ArcFace(), workspace_bytes=KEEP)
    again = _run(x, w.float(), y, ArcFace(), workspace_bytes=0)
    for name, kept, formed in zip(("loss", "dx", "dw"), got, again, strict=True):
        assert_close(kept, formed.double(), dtype=F32, what=name)


def _forward(x: Tensor, w: Tensor, y: Tensor, subset: Tensor | None, request: Request) -> Any:
    moved = [t if t is None else t.to(TRITON_DEVICE) for t in (x, w, y, subset)]
    return TritonBackend().forward(*moved, request)


@pytest.mark.parametrize("scale", [64.0, 128.0])
def test_a_shard_of_targets_only_and_rows_without_a_target(scale: float) -> None:
    x, w, _ = batch("random", 4, 1, 16)
    y = torch.tensor([0, NO_TARGET, INVALID_TARGET, 0])
    request = Request(scale, True, 0, True, None)
    out = _forward(x.float(), w.float(), y, None, request)
    assert out.log_l.isneginf().tolist() == [True, False, False, True]
    assert out.hardest_class.tolist() == [-1, 0, 0, -1]
    assert out.theta.isnan().tolist() == [False, False, True, False]
    assert float(out.theta[1]) == 0
    g = torch.tensor([0.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    h = torch.tensor([0.0, 9.0, 0.0, 0.0], dtype=torch.float64)
    moved = [t.to(TRITON_DEVICE) for t in (x.float(), w.float(), y)]
    dx, dw = TritonBackend().backward(
        *moved, None, out.log_l, out.workspace, g.to(dw_device := TRITON_DEVICE), h.to(dw_device), request,
        True, True,
    )  # fmt: skip
    # The live row has log l = s·cos: its gradient is s·G·(wn − cos·xn)/|x|, and H is ignored.
    xn, wn = (t.double() / t.double().norm(dim=1, keepdim=True) for t in (x[1:2].float(), w.float()))
    cos = (xn * wn).sum()
    assert_close(dx[1:2].cpu(), scale * 0.5 * (wn - cos * xn) / x[1].norm(), dtype=F32)
    assert_close(dw.cpu(), scale * 0.5 * (xn - cos * wn) / w.norm(), dtype=F32)
    assert not dx[[0, 2, 3]].any()


@pytest.mark.parametrize("workspace_bytes", [0, KEEP])
@pytest.mark.parametrize("rows", [0, 5])
def test_a_shard_without_a_class_has_sums_of_0_and_gradients_0(rows: int, workspace_bytes: int) -> None:
    x, w = (torch.ones(n, 8, device=TRITON_DEVICE, requires_grad=True) for n in (rows, 0))
    n = functional.negatives_of(
        x,
        w,
        torch.full((rows,), NO_TARGET, device=TRITON_DEVICE),
        counted=torch.ones(rows, dtype=torch.bool, device=TRITON_DEVICE),
        scale=64.0,
        class_subset=None,
        workspace_bytes=workspace_bytes,
        backend="triton",
        find_hardest=True,
    )
    assert n.log_l.isneginf().all()
    assert not n.theta.any()
    assert n.hardest_cos.isneginf().all()
    assert n.hardest_class.tolist() == [-1] * rows
    torch.autograd.backward([n.log_l, n.theta], [torch.zeros_like(n.log_l), torch.ones_like(n.theta)])
    assert x.grad is not None
    assert not x.grad.any()
    assert w.grad is not None
    assert w.grad.shape == (0, 8)


@pytest.mark.parametrize(
    "dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, BF16)], ids=str
)
def test_the_hardest_negative_and_topk_are_those_of_the_cosines(
    dtypes: tuple[torch.dtype, torch.dtype], small_tiles: int
) -> None:
    x, w, y = batch("mixed", 20, 300, 24)
    x, w = x.to(dtypes[0]), w.to(dtypes[1])
    xn, wn = (t.double() / t.double().norm(dim=1, keepdim=True) for t in (x, w))
    cos = xn @ wn.T
    for scale in (64.0, 128.0):
        out = _forward(x, w, y, None, Request(scale, False, 0, True, None))
        best, found = cos.scatter(1, y[:, None], -9.0).max(1)
        assert torch.equal(out.hardest_class.cpu(), found)
        torch.testing.assert_close(out.hardest_cos.cpu(), best, rtol=0, atol=COSINE)
    got, classes = topk_cosine(x.to(TRITON_DEVICE), w.to(TRITON_DEVICE), 5, backend="triton")
    best, found = cos.topk(5, dim=1)
    assert torch.equal(classes.cpu(), found)
    torch.testing.assert_close(got.cpu().double(), best, rtol=0, atol=COSINE)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has to hold all of w, and then takes all of it: below")
def test_offsets_pass_2_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    classes, features = 4_200_000, 512
    w = torch.empty(classes, features, dtype=BF16)  # 4.3 GB, of which only the touched pages exist
    subset = torch.tensor([0, classes - 2, classes - 1])
    x, few, y = batch("learnt", 4, 3, features)
    w[subset] = few.to(BF16)
    # Zeros would touch all of dw's pages.
    monkeypatch.setattr(torch, "zeros", torch.empty)
    right = truth(x.to(BF16), few.to(BF16), y, ArcFace(), reduction="sum")
    a, b = x.to(BF16).requires_grad_(), w.requires_grad_()
    request = Request(64.0, True, 0, False, None)
    out = TritonBackend().forward(a.detach(), b.detach(), y, subset, request)
    psi = torch.cos(out.theta + 0.5)
    q = torch.sigmoid(out.log_l - 64 * psi)
    h = q * 64 * torch.sin(out.theta + 0.5)
    dx, dw = TritonBackend().backward(
        a.detach(), b.detach(), y, subset, out.log_l, out.workspace, q, h, request, True, True
    )
    assert_close(dx, right[1], dtype=BF16)
    assert_close(dw[subset], right[2], dtype=BF16)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has to hold all of w: below")
@pytest.mark.parametrize("workspace_bytes", [0, KEEP])
def test_offsets_of_features_pass_2_to_the_31(workspace_bytes: int) -> None:
    # As in a transposed w of many classes: of the 4.5 GB only the touched pages exist.
    stride = 320_000_000
    w = torch.empty(7 * stride + 3, dtype=BF16).as_strided((3, 8), (1, stride))
    x, few, y = batch("learnt", 4, 3, 8)
    few = few.to(BF16)
    w.copy_(few)
    _check(x.to(BF16), w, y, workspace_bytes=workspace_bytes)


def _true_gradients(
    x: Tensor, w: Tensor, y: Tensor, g: Tensor, h: Tensor, scale: float, some: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(log l (B,), dx (B, D), dw of the classes `some`) in float64, a chunk of classes at a time.

    Eqs. 3, 10, 11. Every label is a class; s ≤ 70, so that plain float64 sums do.
    """
    pairs = Pairs(x, w, y, None)
    u, v = pairs.tangents()
    total, pull = torch.zeros_like(g), torch.zeros_like(pairs.xn)
    for start in range(0, w.shape[0], 2**17):
        wn = torch.nn.functional.normalize(w[start : start + 2**17].double(), eps=NORM_EPS)
        weight = torch.exp(scale * pairs.xn @ wn.T)
        weight[start + torch.arange(wn.shape[0], device=y.device) == y[:, None]] = 0.0
        total += weight.sum(1)
        pull += weight @ wn
    a = scale * (g / total)[:, None] * pull
    dx = (a - (a * pairs.xn).sum(1, keepdim=True) * pairs.xn - h[:, None] * u) / pairs.x_norm
    own = w[some].double()
    norm = torch.linalg.vector_norm(own, dim=1, keepdim=True)
    wn, mine = own / norm, some[:, None] == y
    p = torch.where(mine, 0.0, torch.exp(scale * wn @ pairs.xn.T) / total)
    c = scale * (p * g) @ pairs.xn
    dw = (c - (c * wn).sum(1, keepdim=True) * wn - (mine.double() * h) @ v) / norm
    return total.log(), dx, dw


def test_all_of_many_classes() -> None:
    # On a GPU C·D passes 2^31. Rows lie at about 35° from centres at both ends.
    classes, features = (1000, 24) if INTERPRETED else (4_200_000, 512)
    if not INTERPRETED and torch.cuda.mem_get_info()[0] < 14e9:
        pytest.skip("needs 14 GB of GPU memory: w and dw of 4.2 million classes")
    generator = torch.Generator(TRITON_DEVICE).manual_seed(0)
    made: dict[str, Any] = {"device": TRITON_DEVICE, "generator": generator}
    w = torch.empty(classes, features, device=TRITON_DEVICE, dtype=BF16).normal_(0, 0.01, generator=generator)
    y = torch.tensor([classes - 1, classes - 2, 0, classes - 1, classes // 2], device=TRITON_DEVICE)
    x = (w[y].float() + 0.007 * torch.randn(5, features, **made)).to(BF16)
    some = torch.tensor([0, 1, classes // 2, classes - 3, classes - 2, classes - 1], device=TRITON_DEVICE)
    g, h = torch.rand(2, 5, dtype=torch.float64, **made)
    request = Request(64.0, True, 0, False, None)
    out = TritonBackend().forward(x, w, y, None, request)
    dx, dw = TritonBackend().backward(x, w, y, None, out.log_l, out.workspace, g, h, request, True, True)
    assert dx is not None
    assert dw is not None
    log_l, right_dx, right_dw = _true_gradients(x, w, y, g, h, 64.0, some)
    assert_close(out.log_l, log_l, dtype=F32, what="log l")
    assert_close(dx, right_dx, dtype=BF16, what="dx")
    for j, got, right in zip(some.tolist(), dw[some], right_dw, strict=True):
        assert_close(got, right, dtype=BF16, what=f"dw of class {j}")
