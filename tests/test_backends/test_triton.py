"""The triton backend against float64 truth: in the interpreter (TRITON_INTERPRET=1), or on a GPU.

B rows · C classes · D features. Truth is taken at the values that the products see.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from expface_kernels import ArcFace, ExpFace
from expface_kernels.backends.base import INVALID_TARGET, NO_TARGET, OpConfig
from expface_kernels.backends.triton import TritonBackend, plan
from expface_kernels.functional import topk_cosine
from expface_kernels.options import LossOptions
from expface_kernels.pipeline import negatives
from tests.cases import TRITON_DEVICE, batch, truth
from tests.test_backends.triton_steps import BF16, DTYPES, F16, F32, KEEP, NEEDS_TRITON, check, run
from tests.tolerances import COSINE, assert_close, assert_rows_close, relative_error, row_cap

pytestmark = NEEDS_TRITON


@pytest.mark.parametrize("workspace_bytes", [0, KEEP])
@pytest.mark.parametrize("kind", ["random", "learnt", "mixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_in_every_dtype(dtype: torch.dtype, kind: str, workspace_bytes: int) -> None:
    x, w, y = batch(kind, 37, 203, 72)
    check(x.to(dtype), w.to(dtype), y, workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("kind", ["near_centre", "opposite", "learnt"])
@pytest.mark.parametrize("workspace_bytes", [0, KEEP])
def test_near_rows_hold_row_by_row(kind: str, workspace_bytes: int) -> None:
    x, w, y = batch(kind, 20, 131, 40, seed=4)
    got = run(x.float(), w.float(), y, ExpFace(), workspace_bytes=workspace_bytes)
    right = truth(x, w, y, ExpFace(), reduction="sum")
    assert_rows_close(got[1], right[1], cap=row_cap(64.0), what="dx")
    assert_close(got[2], right[2], dtype=F32, what="dw")


@pytest.mark.parametrize("scale", [128.0, 256.0])
@pytest.mark.parametrize("kind", ["random", "learnt", "flat"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scales_at_random_init_and_opposite_to_everything(
    dtype: torch.dtype, kind: str, scale: float
) -> None:
    x, w, y = batch(kind, 15, 3 if kind == "flat" else 203, 64)
    x, w = x.to(dtype), w.to(dtype)
    if kind == "flat":  # 16-bit rows opposite to three centres that nearly agree cancel in both gradients
        got = run(x, w, y, ExpFace(), scale=scale)
        assert_close(got[0], truth(x, w, y, ExpFace(), scale=scale, reduction="sum")[0], dtype=F32)
        assert all(bool(t.isfinite().all()) for t in got)
    else:
        check(x, w, y, scale=scale)


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
    got = run(x, w, y, ArcFace(), workspace_bytes=workspace_bytes)
    right = truth(x, w, y, ArcFace(), reduction="sum")
    assert_close(got[1], right[1], dtype=dtype, what="dx")
    assert_close(got[2] * length[:, None], right[2] * length[:, None], dtype=dtype, what="dw·|w|")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_centres_whose_squares_overflow_float32_have_norms(dtype: torch.dtype) -> None:
    x, w, y = batch("random", 9, 70, 40)
    x, w = x.to(BF16), (w * 1e21).to(BF16).to(dtype)  # so that the cast changes nothing
    right = truth(x, w, y, ArcFace(), reduction="sum")
    with torch.autocast(TRITON_DEVICE, BF16):
        got = run(x, w, y, ArcFace())
    assert_close(got[0], right[0], dtype=F32, what="loss")
    assert_close(got[1], right[1], dtype=BF16, what="dx")


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
        got = run(x, w, y, ArcFace(), workspace_bytes=workspace_bytes)
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
            got = run(x, w, y, ArcFace())
        for name, actual, expected in zip(("loss", "dx", "dw"), got, right, strict=True):
            assert_close(actual, expected, dtype=F16, what=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("workspace_bytes", [0, KEEP])
def test_a_second_run_gives_the_same_bits(dtype: torch.dtype, workspace_bytes: int) -> None:
    for kind in ("mixed", "learnt"):
        x, w, y = batch(kind, 40, 203, 24)
        x, w = x.to(dtype), w.to(dtype)
        runs = [run(x, w, y % 7, ExpFace(), workspace_bytes=workspace_bytes) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_partly_kept_exponentials_join_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CHUNK_BYTES", 0)
    for kind in ("mixed", "learnt"):
        for dtype in (F32, BF16):
            x, w, y = batch(kind, 20, 500, 24)
            check(x.to(dtype), w.to(dtype), y, workspace_bytes=2 * 128 * 128 * dtype.itemsize)


def test_kept_exponentials_of_rows_30_decades_apart() -> None:
    # Three centres that nearly agree: rows on them have l near e^64, rows opposite to them e^−64.
    x, w, y = batch("flat", 20, 3, 16)
    x = torch.where((torch.arange(20) % 2 == 0)[:, None], x, -x).float()
    got = run(x, w.float(), y, ArcFace(), workspace_bytes=KEEP)
    again = run(x, w.float(), y, ArcFace(), workspace_bytes=0)
    for name, kept, formed in zip(("loss", "dx", "dw"), got, again, strict=True):
        assert_close(kept, formed.double(), dtype=F32, what=name)


def _forward(x: Tensor, w: Tensor, y: Tensor, subset: Tensor | None, config: OpConfig) -> Any:
    moved = [t if t is None else t.to(TRITON_DEVICE) for t in (x, w, y, subset)]
    return TritonBackend().forward(*moved, config)


@pytest.mark.parametrize("scale", [64.0, 128.0])
def test_a_shard_of_targets_only_and_rows_without_a_target(scale: float) -> None:
    x, w, _ = batch("random", 4, 1, 16)
    y = torch.tensor([0, NO_TARGET, INVALID_TARGET, 0])
    config = OpConfig(scale, True, 0, True, None)
    out = _forward(x.float(), w.float(), y, None, config)
    assert out.log_l.isneginf().tolist() == [True, False, False, True]
    assert out.hardest_class.tolist() == [-1, 0, 0, -1]
    assert out.theta.isnan().tolist() == [False, False, True, False]
    assert float(out.theta[1]) == 0
    g = torch.tensor([0.0, 0.5, 0.0, 0.0], dtype=torch.float64)
    h = torch.tensor([0.0, 9.0, 0.0, 0.0], dtype=torch.float64)
    moved = [t.to(TRITON_DEVICE) for t in (x.float(), w.float(), y)]
    dx, dw = TritonBackend().backward(
        *moved, None, out.log_l, out.workspace, g.to(dw_device := TRITON_DEVICE), h.to(dw_device), config,
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
    y = torch.full((rows,), NO_TARGET, device=TRITON_DEVICE)
    options = LossOptions(workspace_bytes=workspace_bytes, backend="triton")
    n = negatives(x, w, y, torch.ones_like(y, dtype=torch.bool), None, options, find_hardest=True)
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
        out = _forward(x, w, y, None, OpConfig(scale, False, 0, True, None))
        best, found = cos.scatter(1, y[:, None], -9.0).max(1)
        assert torch.equal(out.hardest_class.cpu(), found)
        torch.testing.assert_close(out.hardest_cos.cpu(), best, rtol=0, atol=COSINE)
    got, classes = topk_cosine(x.to(TRITON_DEVICE), w.to(TRITON_DEVICE), 5, backend="triton")
    best, found = cos.topk(5, dim=1)
    assert torch.equal(classes.cpu(), found)
    torch.testing.assert_close(got.cpu().double(), best, rtol=0, atol=COSINE)
