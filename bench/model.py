"""`python -m bench --model GPU`: a step's cost there, ours beside the eager head's. Counted, not measured.

Ours is counted from its launches (expface_kernels.backends.triton.costs), the eager head from its operators,
run without data: an operator reads its inputs and writes its outputs, a view moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.cases import Case
from bench.peers.eager import margin_loss
from expface_kernels.backends.triton import costs
from expface_kernels.backends.triton.recording import Case as Launches

DTYPES = ("bfloat16", "float16", "float32")
_aten = torch.ops.aten
_ALLOCATIONS = {_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided}
_GATHERS = {_aten.index}
_SCATTERS = {_aten.index_put_, _aten._index_put_impl_}


@dataclass
class Operators(TorchDispatchMode):
    """Adds up what operators do: FLOPs of products, bytes, roofline seconds on `gpu`."""

    gpu: costs.Gpu
    flops: int = 0
    moved: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        moved = traffic(func, args, out)
        count = flop_registry.get(func.overloadpacket)
        flops = int(count(*args, **(kwargs or {}), out_val=out)) if count is not None else 0
        half = flops and out.dtype.itemsize == 2
        rate = 1e12 * (self.gpu.half if half else self.gpu.float32)
        self.flops += flops
        self.moved += moved
        self.seconds += max(flops / rate, moved / (self.gpu.bandwidth * 1e12))
        return out


def traffic(func: Any, args: Any, out: Any) -> int:
    """Bytes that one operator reads and writes."""
    packet, returns = func.overloadpacket, func._schema.returns
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    if view or packet in _ALLOCATIONS:
        return 0
    if packet in _GATHERS:
        return 2 * _bytes(out) + _bytes(args[1])
    if packet in _SCATTERS:
        return 2 * _bytes(args[2]) + _bytes(args[1])
    return _bytes(args) + _bytes(out)


def _bytes(tensors: Any) -> int:
    """Of all tensors in there; what is expanded lies in memory once."""
    found = [t for t in tree_leaves(tensors) if isinstance(t, Tensor)]
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in found)


@dataclass(frozen=True)
class EagerCosts:
    """Of one step: FLOPs of products, bytes moved, roofline seconds, peak bytes beside inputs and dw."""

    flops: int
    moved: int
    seconds: float
    extra: int


def eager_costs(case: Case, dtype: torch.dtype, gpu: costs.Gpu) -> EagerCosts:
    """The eager head's forward and backward with inputs, logits and gradients in `dtype`."""
    x = torch.empty(case.rows, case.features, dtype=dtype, device="meta", requires_grad=True)
    w = torch.empty(case.classes, case.features, dtype=dtype, device="meta", requires_grad=True)
    labels = torch.empty(case.rows, dtype=torch.int64, device="meta")
    memory, operators = costs.PeakMemory(), Operators(gpu)
    with memory, operators:
        margin_loss(x, w, labels, case.margin_function(), case.scale, case.target_gradient).backward()
    return EagerCosts(operators.flops, operators.moved, operators.seconds, memory.peak - w.nbytes)


def report(case: Case, gpu: str, dtype: str, workspace_bytes: int) -> str:
    """Steps of ours, then the eager head's sums, as text; ValueError for an unknown GPU or dtype."""
    for name, value, known in (("model", gpu, costs.GPUS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {list(known)}, got {value!r}")
    wide = getattr(torch, dtype)
    launches = Launches(
        case.rows, case.classes, case.features, wide, wide, case.scale, workspace_bytes=workspace_bytes
    )
    ours = costs.costs(launches, costs.GPUS[gpu].arch)
    eager = eager_costs(case, wide, costs.GPUS[gpu])
    sums = f"{eager.flops / 1e12:7.3f} {eager.moved / 1e9:7.3f} {1e3 * eager.seconds:7.3f}"
    return "\n".join(
        [
            f"B={case.rows:,}, C={case.classes:,}, D={case.features:,}, {dtype}, "
            f"workspace {workspace_bytes:,} bytes: a roofline, nothing is measured",
            costs.report(ours, gpu),
            f"{'eager head, on ' + gpu:28} {sums}",
            f"peak extra memory {eager.extra / 1e6:.0f} MB, beside dw",
        ]
    )
