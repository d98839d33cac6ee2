"""What a training step will cost on a GPU: counted from the launches that the code really makes.

    python -m expface_kernels.workshop.costs --gpu h100 --rows 1024 --classes 1000000 --features 512

FLOPs and bytes follow from the arguments of each launch and operator, as if every tensor went through memory
once in each; milliseconds are the larger of FLOPs over a reachable rate and bytes over a reachable bandwidth:
a roofline, no measurement. Peak bytes are those of the tensors alive at once, inputs left out.
n classes of a launch · B_pad padded rows · D features
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expface_kernels.backends.triton import calls
from expface_kernels.workshop.recording import Case
from expface_kernels.workshop.traffic import PeakMemory, traffic


@dataclass(frozen=True)
class Gpu:
    """Reachable rates: of dense 16-bit and tf32 products and float32 ones (TFLOP/s), of memory (TB/s)."""

    arch: str
    half: float
    tf32: float
    float32: float
    bandwidth: float


GPUS = {
    "h100": Gpu("sm_90", 790, 395, 60, 3.0),
    "h200": Gpu("sm_90", 790, 395, 60, 4.3),
    "a100": Gpu("sm_80", 280, 140, 18, 1.8),
    "b200": Gpu("sm_100", 1800, 900, 70, 7.2),
    "mi300x": Gpu("gfx942", 1000, 500, 130, 4.5),
}


@dataclass
class Step:
    """One kind of launch, all its calls together."""

    name: str
    dtype: torch.dtype
    calls: int = 0
    flops: int = 0
    read: int = 0
    """bytes"""
    written: int = 0
    """bytes"""
    multiplications: int = 1
    """Products of the hardware for one of ours: 3 for tf32x3."""

    def milliseconds(self, gpu: Gpu) -> float:
        rate = gpu.half
        if self.dtype == torch.float32:
            rate = gpu.float32 if self.multiplications == 1 else gpu.tf32
        compute = self.multiplications * self.flops / (rate * 1e12)
        return 1e3 * max(compute, (self.read + self.written) / (gpu.bandwidth * 1e12))


Traffic = tuple[int, int, int]  # FLOPs, bytes read, bytes written
Arguments = dict[str, Any]


def _classes(a: Arguments, block: str) -> tuple[int, int]:
    """(classes of a launch, the same padded to whole tiles)."""
    n = a["class_end"] - a["class_begin"]
    return n, -(-n // a[block]) * a[block]


def _centres(a: Arguments, n: int) -> int:
    """Bytes of reading n centres: rows of w, and of what goes with them."""
    listed = 8 * n if a.get("INDEXED") else 0
    return n * a["D"] * a["p_w"].element_size() + listed + (4 * n if a.get("SHIFTED") else 0)


def _columns(a: Arguments) -> int:
    """Columns of the row operand that a product over D reads."""
    return -(-a["D"] // a["BK"]) * a["BK"]


def _forward(a: Arguments) -> Traffic:
    n, padded = _classes(a, "BN")
    rows, per_tile = a["B_pad"], padded // a["BN"] * a["B_pad"]
    read = rows * _columns(a) * a["p_x"].element_size() + 8 * rows + _centres(a, n) + 4 * n
    written = 4 * per_tile * (1 + (a["MAXIMA"] or a["HARDEST"]) + a["HARDEST"])
    if a["KEEP"]:
        written += n * rows * a["p_e"].element_size()
    return 2 * rows * padded * _columns(a), read, written


def _probability(a: Arguments) -> Traffic:
    n, padded = _classes(a, "BN")
    rows = a["B_pad"]
    read = rows * _columns(a) * a["p_x"].element_size() + 16 * rows + _centres(a, n) + 4 * n
    written = padded * rows * a["p_p"].element_size() + 4 * padded * (rows // a["BM"])
    return 2 * rows * padded * _columns(a), read, written


def _kept_columns(a: Arguments) -> Traffic:
    n = a["classes"]
    return 0, n * a["B_pad"] * a["p_e"].element_size() + 4 * a["B_pad"] + 4 * n, 4 * n


def _weight(a: Arguments) -> Traffic:
    n, padded = _classes(a, "BM")
    rows = a["B_pad"]
    operand = rows * a["D_PAD"] * a["p_op"].element_size()
    read = padded * rows * a["p_p"].element_size() + operand + 4 * padded * a["parts"] + 8
    # Inverse norms, segments; a launch's share of the tangents, of which each row has at most one.
    read += _centres(a, n) + 8 * n + a["p_tangents"].nbytes * n // (a["p_segment"].numel() - 1)
    return 2 * rows * padded * a["D_PAD"], read, n * a["D"] * a["p_dw"].element_size()


def _copy(a: Arguments) -> Traffic:
    n = a["classes"]
    read = _centres(a, n) + (4 * n if a["UNIT"] else 0)
    return 0, read, n * a["D"] * a["p_out"].element_size()


def _operands(a: Arguments) -> Traffic:
    rows, padded = a["rows"], a["rows_pad"]
    read = rows * a["D"] * a["p_v"].element_size() + (8 * rows if a["INDEXED"] else 0)
    written = padded * a["p_inv"].element_size() + (4 * padded if a["SHIFT"] else 0)
    return 0, read, written + (padded * a["D_PAD"] * a["p_out"].element_size() if a["STORE"] else 0)


def _pair(a: Arguments) -> int:
    """Bytes of reading each row, its label and its own centre."""
    row = a["D"] * (a["p_x"].element_size() + a["p_w"].element_size())
    return a["B"] * (row + 8 + (8 if a["INDEXED"] else 0))


def _lengths(a: Arguments) -> Traffic:
    return 0, _pair(a), 16 * a["B"]


def _pulls(a: Arguments) -> Traffic:
    return 0, _pair(a) + 16 * a["B"], 4 * a["B"] * a["D"]


def _segments(a: Arguments) -> Traffic:
    return 0, a["B"] * (4 * a["D"] + 16), 4 * a["B"] * a["D"]


def _input(a: Arguments) -> Traffic:
    read = _pair(a) + a["B"] * (16 + 8 * a["D"])
    return 0, read, a["B"] * a["D"] * a["p_dx"].element_size()


KERNELS: dict[str, Callable[[Arguments], Traffic]] = {
    "forward_tile": _forward,
    "probability_tile": _probability,
    "kept_columns": _kept_columns,
    "weight_gradient_tile": _weight,
    "copy_centres": _copy,
    "row_operands": _operands,
    "pair_lengths": _lengths,
    "target_pulls": _pulls,
    "segment_sums": _segments,
    "input_gradient": _input,
}


def library_product(a: Tensor, b: Tensor) -> Traffic:
    """a (m, k) times b (k, n), added to what is float32."""
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    total = 4 * a.shape[0] * b.shape[1]
    return flops, a.numel() * a.element_size() + b.numel() * b.element_size() + total, total


OPERATORS = "torch's operators"
"""The step that holds everything but kernels of ours and library products: sums over tiles, rows, labels."""


@dataclass
class Recorder:
    """Adds up launches and library products as they are made."""

    steps: dict[str, Step] = field(default_factory=dict)

    def launch(self, kernel: Any, programs: int, arguments: Arguments) -> None:
        dtype = next((arguments[n].dtype for n in ("p_x", "p_op") if n in arguments), torch.float32)
        thrice = 3 if arguments.get("PRECISION") == "tf32x3" else 1
        self._add(kernel.__name__, dtype, KERNELS[kernel.__name__](arguments), thrice)

    def product(self, a: Tensor, b: Tensor) -> None:
        self._add("library product, dX", a.dtype, library_product(a, b), 1)

    def operator(self, func: Any, args: Any, out: Any) -> None:
        """One of torch's; all of its bytes stand as read. A product is one that `product` has been shown."""
        if func.overloadpacket is not torch.ops.aten.addmm_ and (moved := traffic(func, args, out)):
            self._add(OPERATORS, torch.float32, (0, moved, 0), 1)

    def _add(self, name: str, dtype: torch.dtype, traffic: Traffic, multiplications: int) -> None:
        step = self.steps.setdefault(name, Step(name, dtype, multiplications=multiplications))
        step.calls += 1
        step.flops += traffic[0]
        step.read += traffic[1]
        step.written += traffic[2]


class _Operators(TorchDispatchMode):
    """Shows the recorder every operator of torch's."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.recorder.operator(func, args, out)
        return out


@dataclass(frozen=True)
class Costs:
    """A step's launches, and the bytes it holds at most beside x, w and y; dw is part of them."""

    steps: tuple[Step, ...]
    peak: int
    gradient: int
    """Bytes of dw."""
    forward_peak: int = 0
    """The most of them before the backward; 0 where that was not looked at."""

    @property
    def flops(self) -> int:
        return sum(step.flops for step in self.steps)

    @property
    def moved(self) -> int:
        return sum(step.read + step.written for step in self.steps)

    @property
    def extra(self) -> int:
        """Peak bytes beside dw."""
        return self.peak - self.gradient

    def milliseconds(self, gpu: Gpu) -> float:
        return sum(step.milliseconds(gpu) for step in self.steps)


def costs(case: Case, arch: str) -> Costs:
    """Costs of one forward and backward of the op."""
    recorder, memory = Recorder(), PeakMemory()
    forward: list[int] = []
    with calls.watched(recorder.launch, recorder.product), memory, _Operators(recorder):
        case.run(arch, between=lambda: forward.append(memory.peak))
    gradient = case.classes * case.features * case.w_dtype.itemsize
    inputs = gradient + case.rows * (case.features * case.x_dtype.itemsize + 8)
    inputs += 8 * case.classes if case.subset else 0
    # case.run makes its inputs under the same mode.
    return Costs(tuple(recorder.steps.values()), memory.peak - inputs, gradient, forward[0] - inputs)


def report(result: Costs, name: str) -> str:
    gpu = GPUS[name]
    lines = [f"{'step':22} {'calls':>5} {'TFLOP':>7} {'GB':>7} {'ms':>7}"]
    for s in result.steps:
        moved = (s.read + s.written) / 1e9
        lines.append(f"{s.name:22} {s.calls:5} {s.flops / 1e12:7.3f} {moved:7.3f} {s.milliseconds(gpu):7.3f}")
    return "\n".join([*lines, sums(result, name, f"together, on {name}")])


def sums(result: Costs, name: str, title: str) -> str:
    """The last lines of a report: all steps together, on the GPU of that name, and what they hold."""
    total = f"{result.flops / 1e12:7.3f} {result.moved / 1e9:7.3f} {result.milliseconds(GPUS[name]):7.3f}"
    return (
        f"{title:28} {total}\n"
        f"peak extra memory {result.extra / 1e6:.0f} MB, beside dw's {result.gradient / 1e6:.0f} MB"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m expface_kernels.workshop.costs")
    parser.add_argument("--gpu", default="h100", choices=list(GPUS))
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--workspace-bytes", type=int, default=0)
    options = parser.parse_args(argv)
    dtype = getattr(torch, options.dtype)
    case = Case(
        options.rows, options.classes, options.features, dtype, dtype, workspace_bytes=options.workspace_bytes
    )
    print(report(costs(case, GPUS[options.gpu].arch), options.gpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
