"""Compile the kernels for GPUs that need not be there, and look at what came out.

    python -m expface_kernels.workshop.audit [--json] [--all] [--golden] [--arch …] [--features …] [--case …]

Exit status 1 where a kernel overwrites a buffer that a product still reads (`ring`), spills in its main loop,
exceeds its architecture's shared memory, should use tensor cores and does not, or has become worse than the
golden file says: fewer products in flight, more narrow loads in the loop, fewer blocks per multiprocessor,
more registers (up to 8 more are free). Every kernel's TTGIR stays in `expface_audit` in Triton's cache
folder (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from expface_kernels.backends.triton import interpreted, tuning
from expface_kernels.workshop import machine_code, ring, ttgir
from expface_kernels.workshop.machine_code import LIMITS
from expface_kernels.workshop.recording import Case, launches

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
"""What is compiled by default; --all has the rest of `machine_code.LIMITS` too."""
UNREADABLE = {"3.6": ("sm_103",)}
"""Architectures that a Triton version compiles for but whose code its disassembler does not know."""
FEATURES = (128, 256, 500, 512, 1024)
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
GOLDEN = Path(__file__).with_name("golden.jsonl")
"""A line per architecture, Triton version, kernel and case: the figures below as they were last accepted."""
KEY = ("arch", "triton", "features", "case", "kernel")
HIGHER_IS_WORSE = {"spills_inside": 0, "narrow_loads": 0, "registers": 8}
"""Figures and how much more of each is free."""
LOWER_IS_WORSE = ("pendings", "blocks")
_TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What one kernel of one case compiled to."""

    arch: str
    triton: str
    """The version, as in "3.9"."""
    features: int
    case: str
    kernel: str
    """Its name, and a number from its second specialization in a case on."""
    registers: int
    shared: int
    """bytes"""
    blocks: int
    """Blocks that run on a multiprocessor at a time."""
    pendings: int
    """Asynchronous products that may still run while the loop goes on; 0 where there are none, or no loop."""
    narrow_loads: int
    spills_before: int
    spills_inside: int
    spills_after: int
    matrix: str
    matrix_count: int
    problems: tuple[str, ...] = ()
    """Races, and what the ring check did not understand."""

    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in KEY)

    def complaints(self) -> list[str]:
        limits = LIMITS[self.arch]
        found = list(self.problems)
        if self.spills_inside:
            found.append(f"{self.spills_inside} spills among its matrix instructions")
        if self.shared > limits.block_shared:
            found.append(f"{self.shared} bytes of shared memory, at most {limits.block_shared}")
        product = self.kernel.split()[0] in MATRIX_KERNELS and not _in_float32(self.case)
        if product and not self.matrix.startswith(limits.matrix):
            found.append(f"{self.matrix or 'no matrix instruction'}, not {limits.matrix}")
        return [f"{self.where}: {text}" for text in found]

    def worse_than(self, golden: dict[str, Any]) -> list[str]:
        """Return what got worse since the golden file was written."""
        names = [n for n, free in HIGHER_IS_WORSE.items() if getattr(self, n) > golden[n] + free]
        names += [n for n in LOWER_IS_WORSE if getattr(self, n) < golden[n]]
        return [f"{self.where}: {n} was {golden[n]}, is {getattr(self, n)}" for n in names]

    @property
    def where(self) -> str:
        return f"{self.kernel} ({self.case}, D={self.features}, {self.arch}, Triton {self.triton})"


def _in_float32(case: str) -> bool:
    """Tell whether the case multiplies float32, for which some architectures have no matrix instruction."""
    return CASES[case].get("w_dtype") == F32 and "product_dtype" not in CASES[case]


Specialization = tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]


def specialized(kernel: Any, arguments: dict[str, Any]) -> Specialization:
    """Return types, constants and attributes of a kernel as a launch with these arguments would have them."""
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
    return signature, constants, attributes


def compiled(kernel: Any, arguments: dict[str, Any], arch: str) -> Any:
    """Compile the kernel for `arch` as a launch with these arguments would specialize it."""
    from triton import compile as compile_source
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    options = {name: arguments[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    return compile_source(ASTSource(kernel, *specialized(kernel, arguments)), target=target, options=options)


def audit_case(arch: str, features: int, name: str) -> list[Finding]:
    """Audit the kernels of one case, each specialization once; those over rows at THOROUGH_FEATURES only."""
    findings: list[Finding] = []
    forms: dict[str, list[str]] = {}
    for kernel, _, arguments in launches(Case(1024, 100_000, features, **CASES[name]), arch):
        form, known = repr(specialized(kernel, arguments)), forms.setdefault(kernel.__name__, [])
        if form in known or (features != THOROUGH_FEATURES and kernel.__name__ not in MATRIX_KERNELS):
            continue
        known.append(form)
        label = kernel.__name__ if len(known) == 1 else f"{kernel.__name__} {len(known)}"
        result = compiled(kernel, arguments, arch)
        identity = (arch, triton_version(), features, name, label)
        findings.append(Finding(*identity, **_inspected(result, arch, arguments["num_warps"])))
        file = "-".join(str(part).replace(", ", "_").replace(" ", "_") for part in identity)
        _write(_folder() / f"{file}.ttgir", result.asm["ttgir"])
    return findings


def _inspected(result: Any, arch: str, warps: int) -> dict[str, Any]:
    """Return a finding's figures, from a file if there is one: cases share kernels, disassembly is slow."""
    file = _folder() / f"{_source()}-{result.hash}.json"
    if file.exists():
        return json.loads(file.read_text())
    code = machine_code.inspect(result, arch, result.metadata.name in MATRIX_KERNELS)
    report = ring.check(result.asm["ttgir"])
    shared = result.metadata.shared
    found = asdict(code) | {
        "shared": shared,
        "blocks": machine_code.blocks_per_multiprocessor(arch, code.registers, shared, warps),
        "pendings": min((loop.in_flight for loop in report.loops), default=0),
        "problems": report.problems,
    }
    _write(file, json.dumps(found))
    return found


def _folder() -> Path:
    import triton

    return Path(triton.knobs.cache.dir) / "expface_audit"


def _source() -> str:
    """Return a hash of the code that inspects, which makes older files useless."""
    modules = (Path(m) for m in (__file__, machine_code.__file__, ring.__file__, ttgir.__file__) if m)
    return hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()[:16]


def _write(file: Path, text: str) -> None:
    """Write a file that another process may be writing too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(file)


def triton_version() -> str:
    """Return Triton's version without the last part, as in "3.9"."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def tasks(
    architectures: list[str], features: list[int] | None, cases: list[str], every_case: bool = False
) -> list[tuple[str, int, str]]:
    """List every case at THOROUGH_FEATURES and D that were measured, the plain one at others.

    features: None for FEATURES and all that were measured on the architecture. every_case: at every D.
    """
    wanted = []
    for arch in architectures:
        measured = {int(key.split()[0]) for key in tuning.table().get(arch, {"tiles": {}})["tiles"]}
        for d in sorted({*FEATURES, *measured} if features is None else features):
            thorough = every_case or d in measured or d == THOROUGH_FEATURES or len(cases) == 1
            wanted += [(arch, d, name) for name in cases if thorough or name == "bf16"]
    return wanted


def against_golden(findings: list[Finding], golden: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Compare with the golden lines; return what got worse, and which versions have no lines yet."""
    lines = {tuple(line[name] for name in KEY): line for line in golden}
    known = {line["triton"] for line in golden}
    seen, groups = {finding.key() for finding in findings}, {finding.key()[:-1] for finding in findings}
    gone = [key for key in lines if key[:-1] in groups and key not in seen]
    worse = [f"{key}: the golden file has a line for it, but it was not compiled" for key in gone]
    if not golden:
        worse.append("there are no golden figures: make audit-golden")
    for finding in findings:
        line = lines.get(finding.key())
        if line is not None:
            worse += finding.worse_than(line)
        elif finding.triton in known:
            worse.append(f"{finding.where}: the golden file has no line for it: make audit-golden")
    new = sorted({f.triton for f in findings} - known)
    return worse, [f"Triton {version}: the golden file has no lines for it yet" for version in new]


def read_golden(path: Path = GOLDEN) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_golden(findings: list[Finding], path: Path = GOLDEN) -> None:
    """Replace the lines of what was audited; keep all others."""
    replaced = {finding.key()[:-1] for finding in findings}
    lines = [line for line in read_golden(path) if tuple(line[name] for name in KEY[:-1]) not in replaced]
    names = (*KEY, *LOWER_IS_WORSE, *HIGHER_IS_WORSE)
    lines += [{name: getattr(finding, name) for name in names} for finding in findings]
    lines.sort(key=lambda line: [str(line[name]) for name in KEY])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m expface_kernels.workshop.audit")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--arch", nargs="+", choices=list(LIMITS), help=f"default: {' '.join(ARCHITECTURES)}")
    parser.add_argument("--all", action="store_true", help="all architectures")
    parser.add_argument("--features", nargs="+", type=int, help=f"default: {FEATURES} and those measured")
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--every-case", action="store_true", help="every case at every D, which takes long")
    parser.add_argument("--golden", action="store_true", help="accept what came out as the golden figures")
    options = parser.parse_args(argv)
    if interpreted():
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")
    unreadable = UNREADABLE.get(triton_version(), ())
    for arch in unreadable:
        print(f"{arch} is left out: Triton {triton_version()} cannot disassemble it", file=sys.stderr)
    known = LIMITS if options.all else ARCHITECTURES
    architectures = [arch for arch in options.arch or known if arch not in unreadable]
    wanted = tasks(architectures, options.features, options.case, options.every_case)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        findings = [f for several in pool.map(audit_case, *zip(*wanted, strict=True)) for f in several]
    print(json.dumps([asdict(f) for f in findings], indent=1) if options.json else table(findings))
    complaints = [text for finding in findings for text in finding.complaints()]
    if options.golden:
        write_golden(findings)
    elif not options.every_case:
        worse, new = against_golden(findings, read_golden())
        complaints += worse
        for text in new:
            print(text, file=sys.stderr)
    for text in complaints:
        print(text, file=sys.stderr)
    return 1 if complaints else 0


def table(findings: list[Finding]) -> str:
    head = (
        f"{'arch':7} {'D':>4} {'case':33} {'kernel':21} {'regs':>4} {'shared':>7} {'blocks':>6} "
        f"{'pend.':>5} {'narrow':>6} {'spills':>9}  matrix"
    )
    lines = [head]
    for f in findings:
        spills = f"{f.spills_before}/{f.spills_inside}/{f.spills_after}"
        matrix = f"{f.matrix_count}× {f.matrix}" if f.matrix else ""
        lines.append(
            f"{f.arch:7} {f.features:4} {f.case:33} {f.kernel:21} {f.registers:4} {f.shared // 1024:6}K "
            f"{f.blocks:6} {f.pendings:5} {f.narrow_loads:6} {spills:>9}  {matrix}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
