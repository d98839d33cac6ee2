"""The triton backend at shapes of every kind: ragged, wide, listed, repeated labels, past 2³¹ numbers.

B rows · C classes · D features; in the interpreter (TRITON_INTERPRET=1), or on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from expface_kernels import ArcFace, ExpFace
from expface_kernels.backends.base import NORM_EPS, OpConfig, TargetGeometry
from expface_kernels.backends.triton import TritonBackend, calls, plan, tuning
from tests.cases import GPU, INTERPRETED, TRITON_DEVICE, batch, truth
from tests.test_backends.triton_steps import BF16, F16, F32, KEEP, NEEDS_TRITON, check
from tests.tolerances import assert_close

pytestmark = NEEDS_TRITON
WIDE_GPU = GPU and tuning.architecture(torch.device("cuda", 0)) in ("sm_90", "sm_100")


# One of each, past one block of rows, past two blocks of classes, D not a multiple of a block, many features.
RAGGED = [(1, 1, 8), (1, 2, 8), (3, 5, 8), (9, 5, 8), (129, 257, 24), (2, 30, 500), (2, 30, 1000)]


@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("kind", ["random", "learnt"])
def test_ragged_shapes(kind: str, shape: tuple[int, int, int]) -> None:
    x, w, y = batch(kind, *shape)
    check(x.float(), w.float(), y, orders=8)
    if shape[1] > 2:
        check(x.to(BF16), w.to(BF16), y, orders=8, workspace_bytes=0)


@pytest.mark.parametrize("workspace_bytes", [0, 2 * 384 * 256, KEEP])  # of 700 classes 384 are kept, or all
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("kind", ["random", "mixed"])
@pytest.mark.skipif(GPU and not WIDE_GPU, reason="this card has no room for 256 classes")
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
    with tuning.trying(tuning.ruled_blocks("sm_90", 512, dtype, dtype, "ieee")):
        check(x, w, y, workspace_bytes=workspace_bytes, **options)
    kept = workspace_bytes and dtype == BF16
    assert (("forward_tile", 256) in widths) == (workspace_bytes != KEEP or not kept)


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
        check(x, w, y, class_subset=subset, workspace_bytes=workspace_bytes)


# A segment of segments, and one more.
@pytest.mark.parametrize(("rows", "labels"), [(70, 1), (70, 2), (1100, 1)])
def test_repeated_labels_add_up_in_segments_of_segments(rows: int, labels: int) -> None:
    x, w, _ = batch("random", rows, 5, 8)
    check(x.float(), w.float(), torch.arange(rows) % labels + 1, margin=ExpFace())
    x, w, y = batch("learnt", rows, labels, 8)  # every row belongs to few centres of five
    w = torch.cat([w, -w.flip(1)[:1], w.roll(1, 1)[:1]])
    check(x.float(), w.float(), y, margin=ExpFace())


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
    config = OpConfig(64.0, True, 0, False, None)
    out = TritonBackend().forward(a.detach(), b.detach(), y, subset, config)
    psi = torch.cos(out.theta + 0.5)
    q = torch.sigmoid(out.log_l - 64 * psi)
    h = q * 64 * torch.sin(out.theta + 0.5)
    dx, dw = TritonBackend().backward(
        a.detach(), b.detach(), y, subset, out.log_l, out.workspace, q, h, config, True, True
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
    check(x.to(BF16), w, y, workspace_bytes=workspace_bytes)


def _true_gradients(
    x: Tensor, w: Tensor, y: Tensor, g: Tensor, h: Tensor, scale: float, some: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(log l (B,), dx (B, D), dw of the classes `some`) in float64, a chunk of classes at a time.

    Eqs. 3, 10, 11. Every label is a class; s ≤ 70, so that plain float64 sums do.
    """
    pairs = TargetGeometry(x, w, y, None)
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
    config = OpConfig(64.0, True, 0, False, None)
    out = TritonBackend().forward(x, w, y, None, config)
    dx, dw = TritonBackend().backward(x, w, y, None, out.log_l, out.workspace, g, h, config, True, True)
    assert dx is not None
    assert dw is not None
    log_l, right_dx, right_dw = _true_gradients(x, w, y, g, h, 64.0, some)
    assert_close(out.log_l, log_l, dtype=F32, what="log l")
    assert_close(dx, right_dx, dtype=BF16, what="dx")
    for j, got, right in zip(some.tolist(), dw[some], right_dw, strict=True):
        assert_close(got, right, dtype=BF16, what=f"dw of class {j}")
