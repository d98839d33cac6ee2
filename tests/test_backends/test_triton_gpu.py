"""What only a GPU can show: no waiting, graphs, memory, tf32, the labels' own check.

B rows · C classes · D features. `make test-gpu` also runs the tests of every backend on the GPU.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expface_kernels import ArcFace, ExpFace, MarginSoftmaxHead, margin_cross_entropy
from expface_kernels.backends.base import NO_TARGET, OpConfig
from expface_kernels.backends.triton import TritonBackend, calls, tuning
from expface_kernels.backends.triton.tuning import Tile
from expface_kernels.functional import topk_cosine
from expface_kernels.workshop import autotune, costs
from expface_kernels.workshop.recording import Case
from tests.cases import GPU, batch, loss_on, truth
from tests.tolerances import CAPS, LIBRARY_TEMPORARIES, PLAIN_TF32, assert_close, relative_error

pytestmark = pytest.mark.skipif(not GPU, reason="needs a GPU")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
KEEP = 2**28


def _on_gpu(
    kind: str, rows: int, classes: int, features: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, w, y) of tests.cases.batch on the GPU; x and w are leaves that want gradients."""
    x, w, y = batch(kind, rows, classes, features, seed)
    return x.to("cuda", dtype).requires_grad_(), w.to("cuda", dtype).requires_grad_(), y.cuda()


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, an operation of torch's that waits for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_guard_raises_on_what_waits() -> None:
    value = torch.ones(3, device="cuda")
    for wait in (lambda: value.sum().item(), lambda: value[value > 0], lambda: torch.ones(3).cuda()):
        with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
            wait()


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "E kept": {"workspace_bytes": KEEP},
    "s = 128": {"scale": 128.0},
    "statistics": {"return_stats": True},
    "rows": {"reduction": "none"},
    "detached": {"target_gradient": "detached"},
}


@pytest.mark.parametrize("subset", [False, True], ids=["all classes", "subset"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_a_step_never_waits(dtype: torch.dtype, way: str, subset: bool) -> None:
    x, w, y = _on_gpu("mixed", 20, 300, 64, dtype)
    y[3] = -100
    options = {"workspace_bytes": 0, **WAYS[way]}
    if subset:
        options["class_subset"] = torch.arange(300, device="cuda")

    def step() -> None:
        out = margin_cross_entropy(x, w, y, ArcFace(), **options)
        (out[0] if isinstance(out, tuple) else out).sum().backward()

    step()  # compiles
    with no_waiting():
        step()


def _head() -> Callable[[], Any]:
    x, _, y = _on_gpu("random", 20, 300, 64, F32)
    head = MarginSoftmaxHead(64, 300, device="cuda")
    return lambda: head(x, y).backward()


def _autocast(dtype: torch.dtype) -> Callable[[], Any]:
    x, w, y = _on_gpu("random", 20, 300, 64, F32)

    def step() -> None:
        with torch.autocast("cuda", dtype):
            loss = margin_cross_entropy(x, w, y)
        loss.backward()

    return step


def _per_row_margin() -> Callable[[], Any]:
    x, w, y = _on_gpu("random", 20, 300, 64, BF16)
    m = torch.full((20,), 0.4, device="cuda", dtype=F64, requires_grad=True)
    return lambda: margin_cross_entropy(x, w, y, ArcFace(m)).backward()


def _topk() -> Callable[[], Any]:
    x, w, _ = _on_gpu("random", 20, 300, 64, BF16)
    return lambda: topk_cosine(x, w, 5)


OTHERS: dict[str, Callable[[], Callable[[], Any]]] = {
    "head": _head,
    "autocast to bfloat16": lambda: _autocast(BF16),
    "autocast to float16": lambda: _autocast(F16),
    "a margin for each row": _per_row_margin,
    "topk": _topk,
}


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_waits_either(name: str) -> None:
    step = OTHERS[name]()
    step()
    with no_waiting():
        step()


@pytest.mark.parametrize("workspace_bytes", [0, KEEP])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_a_captured_step_replays_with_equal_results(dtype: torch.dtype, workspace_bytes: int) -> None:
    x, w, y = _on_gpu("random", 70, 1000, 64, dtype)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        loss = margin_cross_entropy(x, w, y, ArcFace(), workspace_bytes=workspace_bytes)
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made once, such as a library's workspace, must not be captured
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = []
    for kind in ("mixed", "learnt"):
        other = _on_gpu(kind, 70, 1000, 64, dtype, seed=1)
        with torch.no_grad():
            for held, new in zip((x, w, y), other, strict=True):
                held.copy_(new)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
        seen.append(captured[2].clone())
    assert not torch.equal(*seen)


@pytest.mark.parametrize("workspace_bytes", [0, KEEP])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_a_second_run_gives_the_same_bits_at_working_size(dtype: torch.dtype, workspace_bytes: int) -> None:
    for kind in ("mixed", "learnt"):
        x, w, y = _on_gpu(kind, 1000, 20_011, 512, dtype)
        y = y if kind == "learnt" else y % 50  # labels that repeat
        runs = []
        for _ in range(3):
            loss = margin_cross_entropy(x, w, y, workspace_bytes=workspace_bytes)
            runs.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
        assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_peak_memory_is_that_of_the_cost_model(dtype: torch.dtype, kept: bool) -> None:
    case = Case(1024, 200_000, 512, dtype, dtype, workspace_bytes=KEEP if kept else 0)
    _check_peak(case)


def test_peak_memory_at_a_million_classes_is_below_400_mb_beside_dw() -> None:
    case = Case(1024, 1_000_000, 512)
    allocated = _check_peak(case)
    assert allocated - costs.costs(case, "sm_90").gradient <= 400e6


@pytest.mark.parametrize("scale", [64.0, 128.0])
@pytest.mark.parametrize("hardest", [False, True])
def test_the_forwards_peak_is_that_of_the_cost_model(hardest: bool, scale: float) -> None:
    """Of few features, so that the tiles' sums, maxima and arguments are most of it."""
    case = Case(4096, 400_000, 64, scale=scale, find_hardest=hardest)
    x, w, y = _drawn(case)

    def forward() -> None:
        TritonBackend().forward(x, w, y, None, case.config)

    model = costs.costs(case, tuning.architecture(x.device)).forward_peak
    assert abs(_requested(forward) - model) <= LIBRARY_TEMPORARIES


def _drawn(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(case.rows, case.features, device="cuda").to(case.x_dtype)
    w = torch.empty(case.classes, case.features, device="cuda", dtype=case.w_dtype).normal_()
    return x, w, torch.randint(case.classes, (case.rows,), device="cuda")


def _requested(action: Callable[[], None]) -> int:
    """Bytes that were asked for at the peak of its second run: the library's workspace is made once."""
    action()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    action()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def _check_peak(case: Case) -> int:
    """Holds the bytes that a step asks for against the model's; returns what the allocator gave for them."""
    x, w, y = _drawn(case)
    config = OpConfig(case.scale, True, case.workspace_bytes, False, None)

    def step() -> None:
        out = TritonBackend().forward(x, w, y, None, config)
        g, h = torch.ones_like(out.log_l), torch.ones_like(out.theta)
        TritonBackend().backward(x, w, y, None, out.log_l, out.workspace, g, h, config, True, True)

    allocated = torch.cuda.memory_allocated()
    model = costs.costs(case, tuning.architecture(x.device)).peak
    assert abs(_requested(step) - model) <= LIBRARY_TEMPORARIES
    return torch.cuda.max_memory_allocated() - allocated


@pytest.fixture
def allow_tf32() -> Iterator[Callable[[bool], None]]:
    """Sets torch's switch, and puts it back."""
    before = torch.backends.cuda.matmul.allow_tf32

    def switch(allowed: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = allowed

    yield switch
    switch(before)


@pytest.mark.skipif(torch.version.hip is not None, reason="no tf32 there")
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_librarys_products_add_up_in_float32(dtype: torch.dtype) -> None:
    total = torch.ones(1, 40, device="cuda")
    right = total.double()
    for _ in range(3):
        p, w = torch.rand(96, 128, device="cuda").to(dtype), torch.rand(96, 40, device="cuda").to(dtype)
        calls.add_mm_f32(total, p[:, :1].T, w)
        right += p[:, :1].T.double() @ w.double()
    assert_close(total, right, dtype=F32, eager=0.0)


def test_float32_is_plain_tf32_only_where_torch_was_told_so(allow_tf32: Callable[[bool], None]) -> None:
    for kind in ("random", "mixed"):
        x, w, y = batch(kind, 130, 3000, 512)
        right = truth(x, w, y, ArcFace(), reduction="sum")
        errors = {}
        for allowed in (False, True):
            allow_tf32(allowed)
            a, b = x.float().requires_grad_(), w.float().requires_grad_()
            loss_on("triton", a, b, y, ArcFace(), reduction="sum").backward()
            errors[allowed] = [relative_error(a.grad, right[1]), relative_error(b.grad, right[2])]
        assert max(errors[False]) <= CAPS[F32]
        assert min(errors[True]) > CAPS[F32]
        assert max(errors[True]) <= PLAIN_TF32


@pytest.mark.parametrize("bad", [300, -1, 2**40])
@pytest.mark.parametrize("subset", [False, True])
def test_a_bad_label_gives_a_row_of_nan_without_waiting(
    bad: int, subset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EXPFACE_CHECK_LABELS", raising=False)
    x, w, y = _on_gpu("mixed", 20, 300, 64, BF16)
    classes = torch.arange(300, device="cuda") if subset else None
    right = margin_cross_entropy(x, w, y, reduction="none", class_subset=classes)
    y[7] = bad
    with no_waiting():
        loss = margin_cross_entropy(x, w, y, reduction="none", class_subset=classes)
    assert loss.isnan().nonzero().tolist() == [[7]]
    others = torch.arange(20, device="cuda") != 7
    assert torch.equal(loss[others], right[others])


def test_a_bad_label_raises_at_once_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPFACE_CHECK_LABELS", "1")
    x, w, y = _on_gpu("random", 20, 300, 64, BF16)
    y[7] = 300
    with pytest.raises(ValueError, match=r"labels: expected 0 <= label < 300 .* got 300 in row 7"):
        margin_cross_entropy(x, w, y)


def test_calls_on_another_stream_than_the_default_agree() -> None:
    x, w, y = _on_gpu("mixed", 70, 1000, 64, BF16)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        loss = margin_cross_entropy(x, w, y, ExpFace())
        return loss.detach(), *torch.autograd.grad(loss, (x, w))

    right, side = step(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = step()
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


def test_rows_without_a_target_on_this_shard_hold_their_log_sum() -> None:
    x, w, _ = _on_gpu("learnt", 300, 3000, 128, F32)
    y = torch.full((300,), NO_TARGET, device="cuda")
    out = TritonBackend().forward(x.detach(), w.detach(), y, None, OpConfig(64.0, False, 0, False, None))
    xn, wn = (torch.nn.functional.normalize(t.detach().double()) for t in (x, w))
    assert_close(out.log_l, torch.logsumexp(64 * xn @ wn.T, 1), dtype=F32)
    assert not out.theta.any()


def test_the_tuning_tool_measures_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = [Tile(64, 64, 32, 4, 2), Tile(128, 64, 32, 4, 2)]
    monkeypatch.setattr(autotune, "candidates", lambda *args: tiles)
    sizes = ["--rows", "300", "--classes", "5000", "--features", "64", "--dtype", "bfloat16"]
    path = tmp_path / "tuned.json"
    options = autotune.parser().parse_args([*sizes, "--output", str(path)])
    lines: list[str] = []
    autotune.measure(options, autotune.Machine.here(), lines.append)
    assert sum(line.endswith(" ms") for line in lines) == 3 * len(tuning.ROLES), lines
    entry = json.loads(path.read_text())[tuning.architecture(torch.device("cuda", 0))]
    assert set(entry["tiles"]["64 bfloat16 bfloat16 ieee"]) == set(tuning.ROLES)
