"""What the triton backend's host code promises: no waiting for the device, lazy imports, reasons, sizes."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from expface_kernels import backends, margin_cross_entropy, ops, pipeline
from expface_kernels.backends.base import OpConfig
from expface_kernels.backends.triton import TritonBackend, calls, tuning
from expface_kernels.backends.triton.backward import BackwardCall
from expface_kernels.backends.triton.forward import ForwardCall
from expface_kernels.backends.triton.plan import PAD, Plan
from expface_kernels.workshop.recording import Case
from tests.cases import INTERPRETED, MARGINS, TRITON_DEVICE, batch
from tests.tolerances import assert_close

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_on_a_gpu_the_library_adds_a_16_bit_product_to_what_is_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(torch, "addmm", lambda *arguments, **options: seen.append((arguments, options)))
    a, b = (SimpleNamespace(dtype=dtype, is_cuda=True, device=SimpleNamespace(type="cuda")) for _ in range(2))
    total = torch.zeros(2, 3)
    calls.add_mm_f32(total, a, b)  # type: ignore[arg-type]
    [((first, *operands), options)] = seen
    assert first is options.pop("out") is total
    assert operands == [a, b]
    assert options == {"out_dtype": F32}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_many_chunks_are_added_up_in_float32(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    total, right = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(100):
        p, w = (torch.rand(16, n, generator=random).to(dtype) for n in (3, 4))
        calls.add_mm_f32(total, p.T, w)
        right += p.T.double() @ w.double()
    assert_close(total, right, dtype=F32, eager=0.0)


# What would make the host wait for the device: a value, or a shape that depends on values.
WAITING = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::is_nonzero",
    "aten::equal",
)


class NoWaiting(TorchDispatchMode):
    """Raises on an operation that would wait, or that indexes with booleans."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        assert name not in WAITING, f"{name} waits for the device"
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{name} with a boolean index"
        if name in ("aten::_to_copy", "aten::copy_"):
            devices = {
                t.device.type for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)
            }
            devices.add(torch.device((kwargs or {}).get("device") or args[0].device).type)
            assert len(devices) == 1, f"{name} between {sorted(devices)}"
        return func(*args, **(kwargs or {}))


def test_the_mode_catches_what_waits() -> None:
    t, far = torch.arange(4), torch.empty(4, device="meta")
    waiting = (
        t[0].item, lambda: t[t > 1], lambda: torch.unique(t), lambda: bool(t.any()),
        lambda: t.to("meta"), lambda: far.copy_(t),
    )  # fmt: skip
    for wait in waiting:
        with pytest.raises(AssertionError, match=r"waits|boolean|between"), NoWaiting():
            wait()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "E kept": {"workspace_bytes": 2**30},
    "some of E kept": {"workspace_bytes": 2**20},
    "s = 128": {"scale": 128.0},
    "the hardest": {"find_hardest": True},
    "class list": {"subset": True},
    "float32 master as bfloat16": {"w_dtype": F32, "product_dtype": BF16},
    "float16": {"x_dtype": F16, "w_dtype": F16},
    "float32 master as float16": {"x_dtype": F32, "w_dtype": F32, "product_dtype": F16},
    "float32": {"x_dtype": F32, "w_dtype": F32},
}


# A meta tensor has no values at all: who asks for one, or moves one from or to the CPU, is refused.
@pytest.mark.parametrize("name", CASES)
def test_no_launch_code_asks_for_a_value(name: str) -> None:
    case = Case(300, 2000, 40, **CASES[name])
    with NoWaiting(), calls.watched(lambda *launch: None):
        case.run("sm_90")
        x, w = (torch.empty(9, 40, dtype=case.x_dtype, device="meta") for _ in range(2))
        y = torch.empty(9, dtype=torch.int64, device="meta")
        config = OpConfig(1.0, False, 0, False, case.product_dtype)
        ForwardCall(x, w, y, None, config, "sm_90").topk(5)
        for need_dx, need_dw in ((True, False), (False, True)):  # what is frozen takes paths of its own
            config = OpConfig(case.scale, True, case.workspace_bytes, False, case.product_dtype)
            out = ForwardCall(x, w, y, None, config, "sm_90").forward()
            g = torch.empty_like(out.log_l)
            backward = BackwardCall(x, w, y, None, config, "sm_90").backward
            backward(out.log_l, out.workspace, g, g, need_dx, need_dw)


@pytest.mark.parametrize(
    ("reduction", "return_stats", "subset"),
    [("mean", True, True), ("sum", False, False), ("none", True, False)],
)
def test_nothing_around_the_op_asks_for_a_value(
    reduction: str, return_stats: bool, subset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "autocast_dtype", lambda x: None)  # which knows no meta tensors
    x, w = (torch.empty(9, 40, device="meta", requires_grad=True) for _ in range(2))
    y = torch.empty(9, 1, dtype=torch.int32, device="meta")
    classes = torch.empty(7, dtype=torch.int64, device="meta") if subset else None
    options = {"reduction": reduction, "return_stats": return_stats, "class_subset": classes}
    for margin in MARGINS:
        with NoWaiting():
            out = margin_cross_entropy(x, w, y, margin, backend="triton", **options)
            (out[0] if isinstance(out, tuple) else out).sum().backward()
    assert x.grad is not None
    assert w.grad is not None


class OpCalls(TorchDispatchMode):
    """The arguments of each call of the op, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.expface_kernels.cosine_lse.default:
            names = [argument.name for argument in func._schema.arguments]
            self.seen.append(dict(zip(names, args, strict=False)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("scale", "usable"), [(70.0, 2**20), (70.5, 0)])
def test_the_op_is_told_of_no_workspace_that_its_scale_cannot_use(
    scale: float, usable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "autocast_dtype", lambda x: None)  # which knows no meta tensors
    x, w = (torch.empty(9, 40, device="meta", requires_grad=True) for _ in range(2))
    y = torch.empty(9, dtype=torch.int64, device="meta")
    with OpCalls() as calls_made:
        margin_cross_entropy(x, w, y, scale=scale, workspace_bytes=2**20, backend="triton").backward()
    assert [call["workspace_bytes"] for call in calls_made.seen] == [usable]


@pytest.mark.parametrize("subset", [False, True])
def test_the_check_of_labels_asks_for_no_value(subset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPFACE_CHECK_LABELS", raising=False)
    labels = torch.empty(9, dtype=torch.int64, device="meta")
    with NoWaiting():  # the op's own code: a call with meta tensors would not reach it
        ops.local_labels._init_fn(labels, labels[:7] if subset else None, 9, -100)


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU, or the interpreter")
@pytest.mark.parametrize("subset", [False, True])
@pytest.mark.parametrize("scale", [64.0, 128.0])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_neither_forward_nor_backward_waits(dtype: torch.dtype, scale: float, subset: bool) -> None:
    x, w, y = (t.to(TRITON_DEVICE) for t in batch("learnt", 9, 40, 16))
    x, w = x.to(dtype), w.to(dtype)
    classes = torch.arange(40, device=TRITON_DEVICE) if subset else None
    for workspace_bytes in (0, 2**20):
        config = OpConfig(scale, True, workspace_bytes, True, None)
        with NoWaiting():
            out = TritonBackend().forward(x, w, y, classes, config)
            g = torch.ones_like(out.log_l)
            TritonBackend().backward(x, w, y, classes, out.log_l, out.workspace, g, g, config, True, True)


SWITCHES = """
import torch
from expface_kernels.backends.base import OpConfig
from expface_kernels.backends.triton.launch import Call

def precision(dtype):
    x = torch.empty(4, 40, dtype=dtype, device="meta")
    return Call(x, x, x[:, 0].long(), None, OpConfig(64.0, True, 0, False, None), "sm_90").blocks.precision

matmul, found = torch.backends.cuda.matmul, [precision(torch.float32)]
for statement in {statements}:
    exec(statement)
    found.append(precision(torch.float32))
    assert precision(torch.bfloat16) == "ieee"
print(found)
"""
OLD_SWITCH = ["matmul.allow_tf32 = True", "matmul.allow_tf32 = False"]
OLDEST_SWITCH = [f"torch.set_float32_matmul_precision('{value}')" for value in ("high", "highest")]
NEW_SWITCH = ["matmul.fp32_precision = 'tf32'", "matmul.fp32_precision = 'ieee'"]


@pytest.mark.parametrize(
    "statements",
    [OLD_SWITCH, OLDEST_SWITCH, NEW_SWITCH, [*OLD_SWITCH, *NEW_SWITCH], [*NEW_SWITCH, *OLD_SWITCH]],
    ids=["old", "oldest", "new", "old, then new", "new, then old"],
)
def test_plain_tf32_is_allowed_by_any_of_torchs_switches(statements: list[str]) -> None:
    # In a process of its own: torch does not let everything be put back.
    code = SWITCHES.replace("{statements}", repr(statements))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(["tf32x3", *["tf32", "tf32x3"] * (len(statements) // 2)])


def test_the_switch_of_older_torch_is_read_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
        assert tuning.tf32_allowed() is allowed
        assert tuning.float32_precision("gfx942") == "ieee"


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, expface_kernels as e; e.backends.available(); assert 'triton' not in sys.modules"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = TritonBackend()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.unavailable() is None
    x = torch.empty(2, 4)
    assert backend.why_not(x, x) is None
    assert "float64" in str(backend.why_not(x, x.double()))
    assert "meta" in str(backend.why_not(x.to("meta"), x.to("meta")))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "cpu" in str(backend.why_not(x, x))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in str(backend.unavailable())
    assert backends.available()["triton"] == backend.unavailable()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in str(backend.unavailable())


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "it needs compute capability 8.0"), ((8, 0), None)]
)
def test_a_gpu_that_is_too_old_is_named(
    capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere:
        device, dtype, shape = torch.device("cuda"), BF16, (4, 8)

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = TritonBackend().why_not(Elsewhere(), Elsewhere())
    assert found == (reason and f"{reason}, this GPU has {capability[0]}.{capability[1]}")


def _plan(rows: int, classes: int, x: torch.dtype, w: torch.dtype, budget: int, cast: Any = None) -> Plan:
    a, b = torch.empty(rows, 8, dtype=x, device="meta"), torch.empty(classes, 8, dtype=w, device="meta")
    return Plan.of(a, b, classes, OpConfig(64.0, True, budget, False, cast))


@pytest.mark.parametrize(
    ("x", "w", "cast", "product"),
    [
        (BF16, BF16, None, BF16),
        (F16, F16, None, F16),
        (F32, BF16, None, F32),
        (F16, BF16, None, F32),
        (F32, F32, BF16, BF16),
        (F32, F32, F16, F16),
        (BF16, F32, None, F32),
    ],
)
def test_products_are_in_the_inputs_common_dtype_or_autocasts(
    x: torch.dtype, w: torch.dtype, cast: torch.dtype | None, product: torch.dtype
) -> None:
    assert _plan(4, 9, x, w, 0, cast).product == product


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("budget", [0, 2**20, 2**28, 2**50])
@pytest.mark.parametrize(("rows", "classes"), [(0, 5), (1, 1), (130, 5000), (1024, 1_000_000)])
def test_what_is_kept_stays_within_the_budget(
    rows: int, classes: int, budget: int, dtype: torch.dtype
) -> None:
    plan = _plan(rows, classes, dtype, dtype, budget)
    assert plan.kept_pad * plan.rows_pad * dtype.itemsize <= budget
    assert plan.kept_pad % PAD == 0
    assert dtype != F16 or plan.kept == 0
    workspace = torch.empty(plan.numel, device="meta")
    inv, _, e = plan.split(workspace)
    assert inv.shape == (plan.classes_pad,)
    assert e.shape == (plan.kept_pad, plan.rows_pad)
    chunks = plan.chunks(plan.kept, classes)
    assert all(stop - start <= plan.chunk and (start % PAD == 0) for start, stop in chunks)
    assert sum(stop - start for start, stop in chunks) == classes - plan.kept
