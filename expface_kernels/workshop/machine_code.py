"""Read what matters off a kernel's machine code: registers, spills, matrix instructions, widths of loads.

NVIDIA's SASS comes from the disassembler inside Triton, AMD's assembly from the compiler. A loop reaches from
a label to the branch back to it; the main one has matrix instructions, and reaches from the first of them to
the last where the assembler has unrolled it. Loads are counted in PTX, where NVIDIA's loops are still loops:
in SASS those of the epilogue stand between the last products.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_MATRIX = re.compile(r"HGMMA|HMMA|UTC\w*MMA|v_mfma")
_SPILL = re.compile(r"LDL|STL|scratch_(load|store)")
_PTX_MATRIX = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma")
# Loads from global memory, to registers and to shared memory, and those of them that take 16 bytes.
_LOAD = re.compile(r"ld\.global|cp\.async\.c[ag]|(?:global|buffer|flat)_load_")
_WIDE = re.compile(r"\.v4\.(?:b|u|s|f)32|\.v2\.(?:b|u|s|f)64|0x10\b|dwordx4|b128")
_SASS = re.compile(r"[ \t]+(?:/\*\w+\*/[ \t]+)?(?:@!?U?P\w+[ \t]+)?([A-Z][\w.]+)(.*)")
_GCN = re.compile(r"[ \t]+([a-z]\w+)(.*)")
_PTX = re.compile(r"[ \t]+(?:@!?%\w+[ \t]+)?([a-z][\w.:]+)(.*)")
_LABEL = re.compile(r"([.$][\w$]+):")
_BRANCH = re.compile(r"BRA|bra|s_c?branch")
_TARGET = re.compile(r"[.$]L[\w$]+")


@dataclass(frozen=True)
class Code:
    """What one compiled kernel is made of."""

    registers: int
    """Per thread."""
    spills_before: int
    spills_inside: int
    """In the main loop."""
    spills_after: int
    narrow_loads: int
    """Loads from global memory in loops with matrix instructions that take fewer than 16 bytes."""
    matrix: str
    """The matrix instruction; empty where there is none."""
    matrix_count: int


class Limits(NamedTuple):
    """What an architecture gives a block and a multiprocessor."""

    block_shared: int
    """Bytes that one block may have."""
    shared: int
    """Bytes of a multiprocessor."""
    warps: int
    """Warps that a multiprocessor can hold."""
    matrix: str
    """The instruction that a 16-bit product has to use."""


LIMITS = {
    "sm_80": Limits(166_912, 167_936, 64, "HMMA"),
    "sm_89": Limits(101_376, 102_400, 48, "HMMA"),
    "sm_90": Limits(232_448, 233_472, 64, "HGMMA"),
    "sm_100": Limits(232_448, 233_472, 64, "UTC"),
    "sm_103": Limits(232_448, 233_472, 64, "UTC"),
    "sm_120": Limits(101_376, 102_400, 48, "HMMA"),
    "gfx942": Limits(65_536, 65_536, 32, "v_mfma"),
    "gfx950": Limits(163_840, 163_840, 32, "v_mfma"),
}
REGISTERS = 65_536
"""Of an NVIDIA multiprocessor, handed out to warps in pieces of 256."""
RESERVED = 1024
"""Bytes of shared memory that NVIDIA's driver takes of every block."""
VECTOR_REGISTERS, MOST_WAVES, UNITS = 512, 8, 4
"""Of one of an AMD compute unit's SIMD units, per lane; waves that one can hold; their number."""


def blocks_per_multiprocessor(arch: str, registers: int, shared: int, warps: int) -> int:
    """Return how many blocks run at a time, from registers per thread, bytes of shared memory and warps."""
    limits = LIMITS[arch]
    if arch.startswith("gfx"):
        waves = min(MOST_WAVES, VECTOR_REGISTERS // max(-(-registers // 8) * 8, 8))
        by_registers, room = UNITS * waves // warps, limits.shared
    else:
        by_registers = REGISTERS // (-(-max(registers, 1) * 32 // 256) * 256 * warps)
        shared, room = shared + RESERVED, limits.shared
    return min(by_registers, room // max(shared, 1), limits.warps // warps)


def inspect(result: Any, arch: str, thorough: bool) -> Code:
    """Return what a compiled kernel is made of; unless `thorough`, one without spills is not disassembled."""
    if arch.startswith("gfx"):
        text = result.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        operations, loops = _operations(text, _GCN)
        narrow = _narrow_loads(text, _GCN, _MATRIX)
    else:
        narrow = _narrow_loads(result.asm["ptx"], _PTX, _PTX_MATRIX)
        text, registers = _disassembled(result.asm["cubin"], thorough)
        operations, loops = _operations(text, _SASS)
    matrix = [i for i, text in enumerate(operations) if _MATRIX.match(text)]
    spills = [i for i, text in enumerate(operations) if _SPILL.match(text)]
    first, last = (matrix[0], matrix[-1]) if matrix else (len(operations), len(operations))
    main = [(start, stop) for start, stop in loops if any(start <= i <= stop for i in matrix)]
    body = {i for start, stop in [*main, (first, last)] for i in range(start, min(stop + 1, len(operations)))}
    return Code(
        registers,
        spills_before=sum(i < first for i in spills if i not in body),
        spills_inside=sum(i in body for i in spills),
        spills_after=sum(i > last for i in spills if i not in body),
        narrow_loads=narrow,
        matrix=operations[matrix[0]].split()[0] if matrix else "",
        matrix_count=len(matrix),
    )


def _narrow_loads(text: str, pattern: re.Pattern[str], matrix: re.Pattern[str]) -> int:
    operations, loops = _operations(text, pattern)
    inside = {i for a, b in loops if any(map(matrix.match, operations[a:b])) for i in range(a, b)}
    return sum(bool(_LOAD.match(operations[i])) and not _WIDE.search(operations[i]) for i in inside)


def _operations(text: str, pattern: re.Pattern[str]) -> tuple[list[str], list[tuple[int, int]]]:
    """Return the operations in order, and (first, last) of each loop: where a branch goes back to."""
    operations: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(operations)
        elif found := pattern.match(line):
            target = _TARGET.search(found[2]) if _BRANCH.match(found[1]) else None
            if target is not None and target[0] in labels:
                loops.append((labels[target[0]], len(operations)))
            operations.append(found[1] + found[2])
    return operations, loops


def _disassembled(cubin: bytes, always: bool) -> tuple[str, int]:
    """Return (SASS, registers) by Triton's own tools; "" where nothing spills, unless `always`."""
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
