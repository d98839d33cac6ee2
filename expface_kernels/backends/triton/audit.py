"""Compile the kernels for GPUs that need not be there, and look at what came out.

    python -m expface_kernels.backends.triton.audit [--json] [--all] [--arch …] [--features …] [--case …]

Registers, shared memory, tensor-core instructions, and spills by where they stand: a spill is harmful in a
loop with matrix instructions, and between the first and the last of them where the compiler has unrolled it;
it costs little outside.
Exit status 1 where a kernel spills there, exceeds its architecture's shared memory, or should use tensor
cores and does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from expface_kernels.backends.triton import interpreted, tuning
from expface_kernels.backends.triton.recording import Case, launches

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
FEATURES = (128, 256, 500, 512, 1024)
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}  # bytes a block
# The instruction that a 16-bit product has to use.
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "gfx942": "v_mfma"}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16, E kept": {"workspace_bytes": 2**50},
    "bf16, s=128, hardest": {"scale": 128.0, "find_hardest": True},
    "bf16, class list": {"subset": True},
    "bf16, class list, sparse gradient": {"subset": True, "sparse_grad": True},
    "float32 master as bf16": {"w_dtype": F32, "product_dtype": BF16},
    "fp16": {"x_dtype": F16, "w_dtype": F16},
    "float32 master as fp16": {"x_dtype": F16, "w_dtype": F32, "product_dtype": F16},
    "float32": {"x_dtype": F32, "w_dtype": F32},
    "bf16, topk": {"topk": 5},
    "fp16, topk": {"x_dtype": F16, "w_dtype": F16, "topk": 5},
    "float32, topk": {"x_dtype": F32, "w_dtype": F32, "topk": 5},
}
STEP_KERNELS = ("forward_tile", "probability_tile", "weight_gradient_tile")
MATRIX_KERNELS = (*STEP_KERNELS, "cosine_tile")
THOROUGH_FEATURES = 512
"""For this D every case is looked at, and the kernels over rows, which have no entry in the tuning table."""
_TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
_MATRIX = re.compile(r"HGMMA|HMMA|UTC\w*MMA|v_mfma")
_LOCAL = re.compile(r"LDL|STL|scratch_(load|store)")
_SASS = re.compile(r"[ \t]+(?:/\*\w+\*/[ \t]+)?(?:@!?U?P\w+[ \t]+)?([A-Z][\w.]+)(.*)")
_GCN = re.compile(r"[ \t]+([a-z]\w+)(.*)")
_LABEL = re.compile(r"(\.[\w$]+):")
_BRANCH = re.compile(r"BRA|s_c?branch")
_TARGET = re.compile(r"\.L[\w$]+")
_SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Finding:
    """What one kernel of one case compiled to."""

    arch: str
    features: int
    case: str
    kernel: str
    registers: int
    shared: int
    """bytes"""
    spills_before: int
    spills_inside: int
    """In a loop with matrix instructions, or between the first and the last of them."""
    spills_after: int
    matrix: str
    """The matrix instruction; empty where there is none."""
    matrix_count: int

    def complaints(self) -> list[str]:
        where = f"{self.kernel} ({self.case}, D={self.features}, {self.arch})"
        found = []
        if self.spills_inside:
            found.append(f"{where}: {self.spills_inside} spills among its matrix instructions")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{where}: {self.shared} bytes of shared memory, at most {SHARED_LIMIT[self.arch]}")
        product = self.kernel in MATRIX_KERNELS and not _in_float32(self.case)
        if product and not self.matrix.startswith(TENSOR_CORE[self.arch]):
            found.append(f"{where}: {self.matrix or 'no matrix instruction'}, not {TENSOR_CORE[self.arch]}")
        return found


def _in_float32(case: str) -> bool:
    """Whether the case multiplies float32, for which some architectures have no matrix instruction."""
    return CASES[case].get("w_dtype") == F32 and "product_dtype" not in CASES[case]


def compiled(kernel: Any, arguments: dict[str, Any], arch: str) -> Any:
    """The kernel as a launch with these arguments would specialise it, compiled for `arch`."""
    from triton import compile as compile_source
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        divisible = isinstance(value, torch.Tensor)
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            constants[parameter.name] = value
            signature[parameter.name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(position,)] = [["tt.divisibility", 16]]
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    return compile_source(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def inspect(result: Any, arch: str) -> dict[str, Any]:
    """Registers, spills by position and matrix instructions of a compiled kernel."""
    if arch.startswith("gfx"):
        text = result.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        operations, loops = _operations(text, _GCN)
    else:
        text, registers = _disassembled(result.asm["cubin"], result.metadata.name in MATRIX_KERNELS)
        operations, loops = _operations(text, _SASS)
    matrix = [i for i, name in enumerate(operations) if _MATRIX.match(name)]
    local = [i for i, name in enumerate(operations) if _LOCAL.match(name)]
    first, last = (matrix[0], matrix[-1]) if matrix else (len(operations), len(operations))
    main = [(start, stop) for start, stop in loops if any(start <= i <= stop for i in matrix)]
    inside = {i for start, stop in [*main, (first, last)] for i in local if start <= i <= stop}
    return {
        "registers": registers,
        "shared": result.metadata.shared,
        "spills_before": sum(i < first for i in local if i not in inside),
        "spills_inside": len(inside),
        "spills_after": sum(i > last for i in local if i not in inside),
        "matrix": operations[matrix[0]] if matrix else "",
        "matrix_count": len(matrix),
    }


def _operations(text: str, pattern: re.Pattern[str]) -> tuple[list[str], list[tuple[int, int]]]:
    """Names of the operations in order, and (first, last) of each loop: where a branch goes back to."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := pattern.match(line):
            target = _TARGET.search(found[2]) if _BRANCH.match(found[1]) else None
            if target is not None and target[0] in labels:
                loops.append((labels[target[0]], len(names)))
            names.append(found[1])
    return names, loops


def _disassembled(cubin: bytes, always: bool) -> tuple[str, int]:
    """(SASS, registers) by the tools that come with Triton; "" where nothing spills, unless `always`."""
    import triton.backends.nvidia as nvidia

    tools = Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump: expected a line with REG: and STACK:, got {usage!r}")
        registers, stack = int(found.group(1)), int(found.group(2))
        sass = _output(tools / "nvdisasm", "-c", file.name) if always or stack else ""
    return sass, registers


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def audit_case(arch: str, features: int, name: str) -> list[Finding]:
    """The kernels of one case, each specialisation once; those over rows at D = THOROUGH_FEATURES only."""
    findings: dict[str, Finding] = {}
    for kernel, _, arguments in launches(Case(1024, 100_000, features, **CASES[name]), arch):
        known = kernel.__name__ in findings
        if known or (features != THOROUGH_FEATURES and kernel.__name__ not in MATRIX_KERNELS):
            continue
        details = _inspected(compiled(kernel, arguments, arch), arch)
        findings[kernel.__name__] = Finding(arch, features, name, kernel.__name__, **details)
    return list(findings.values())


def _inspected(result: Any, arch: str) -> dict[str, Any]:
    """`inspect`, from a file beside Triton's own cache: cases share kernels, and disassembly is slow."""
    import triton

    file = Path(triton.knobs.cache.dir) / "expface_audit" / f"{_SOURCE}-{result.hash}.json"
    if file.exists():
        return json.loads(file.read_text())
    found = inspect(result, arch)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found))
    partial.replace(file)
    return found


def tasks(
    architectures: list[str], features: list[int] | None, cases: list[str], everything: bool = False
) -> list[tuple[str, int, str]]:
    """Every case at THOROUGH_FEATURES and D that were measured; at others the plain one, unless `everything`.

    features: None for FEATURES and all that were measured on the architecture.
    """
    wanted = []
    for arch in architectures:
        measured = {int(key.split()[0]) for key in tuning.table().get(arch, {"tiles": {}})["tiles"]}
        for d in sorted({*FEATURES, *measured} if features is None else features):
            thorough = everything or d in measured or d == THOROUGH_FEATURES or len(cases) == 1
            wanted += [(arch, d, name) for name in cases if thorough or name == "bf16"]
    return wanted


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m expface_kernels.backends.triton.audit")
    parser.add_argument("--json", action="store_true", help="findings as JSON")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--features", nargs="+", type=int, help=f"default: {FEATURES} and those measured")
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--all", action="store_true", help="every case at every D, which takes long")
    options = parser.parse_args(argv)
    if interpreted():
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        wanted = tasks(options.arch, options.features, options.case, options.all)
        found = pool.map(audit_case, *zip(*wanted, strict=True))
        findings = [finding for several in found for finding in several]
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print(table(findings))
    complaints = [text for finding in findings for text in finding.complaints()]
    print("\n".join(complaints), file=sys.stderr)
    return 1 if complaints else 0


def table(findings: list[Finding]) -> str:
    head = f"{'arch':7} {'D':>4} {'case':23} {'kernel':21} {'regs':>4} {'shared':>7} {'spills':>9}  matrix"
    lines = [head]
    for f in findings:
        spills = f"{f.spills_before}/{f.spills_inside}/{f.spills_after}"
        matrix = f"{f.matrix_count}× {f.matrix}" if f.matrix else ""
        lines.append(
            f"{f.arch:7} {f.features:4} {f.case:23} {f.kernel:21} {f.registers:4} {f.shared // 1024:6}K "
            f"{spills:>9}  {matrix}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
