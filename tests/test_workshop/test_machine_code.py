"""What is read off machine code: spills by where they stand, widths of loads, blocks per multiprocessor."""

from __future__ import annotations

from typing import Any

import pytest

from expface_kernels.workshop import machine_code
from expface_kernels.workshop.machine_code import blocks_per_multiprocessor

LOOPS = """
.L_x_0:
        /*0000*/                   STL [R1], R2 ;
        /*0010*/              @P1  BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   LDL R3, [R1] ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0040*/                   STL [R1+0x4], R4 ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
        /*0060*/                   LDL R4, [R1+0x4] ;
        /*0070*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*0080*/                   EXIT ;
"""
UNROLLED = """
        /*0000*/                   STL [R1], R2 ;
        /*0010*/              @P0  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0020*/                   LDL R3, [R1] ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0040*/                   LDL R3, [R1+0x4] ;
        /*0050*/                   LDL R4, [R1+0x8] ;
"""
PTX = """
	ld.global.b32 	%r1, [%rd1];
$L__BB0_1:
	@%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r2;
	@%p1 cp.async.ca.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x4, %r2;
	ld.global.v4.b32 	{ %r1, %r2, %r3, %r4 }, [%rd1];
	ld.global.b16 	%rs1, [%rd1];
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 1;
	@%p2 bra 	$L__BB0_1;
	ld.global.b16 	%rs2, [%rd1];
"""
GCN = """
.LBB0_1:
	scratch_load_b32 v1, off
	global_load_dwordx4 v[0:3], v[4:5], off
	buffer_load_ushort v1, v2, s[0:3], 0 offen
	v_mfma_f32_32x32x8_bf16 v[0:3]
	s_cbranch_scc1 .LBB0_1
	.vgpr_count:     77
"""


class Compiled:
    """Of a compiled kernel, what `inspect` looks at."""

    def __init__(self, **asm: Any) -> None:
        self.asm = asm


@pytest.mark.parametrize(("sass", "spills"), [(LOOPS, (1, 2, 1)), (UNROLLED, (1, 1, 2))])
def test_spills_are_placed_by_the_loop_or_by_the_matrix_instructions(
    sass: str, spills: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_code, "_disassembled", lambda cubin, always: (sass, 99))
    code = machine_code.inspect(Compiled(cubin=b"", ptx=PTX), "sm_90", thorough=True)
    assert (code.spills_before, code.spills_inside, code.spills_after) == spills
    assert (code.registers, code.matrix) == (99, "HGMMA.64x128x16.F32.BF16")
    assert code.narrow_loads == 2


def test_amd_code_is_read_the_same_way() -> None:
    code = machine_code.inspect(Compiled(amdgcn=GCN), "gfx942", thorough=True)
    assert code == machine_code.Code(77, 0, 1, 0, 1, "v_mfma_f32_32x32x8_bf16", 1)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        ("sm_90", 128, 98_304, 8, 2),
        ("sm_90", 129, 98_304, 8, 1),
        ("sm_90", 128, 120_000, 8, 1),
        ("sm_90", 32, 0, 8, 8),
        ("sm_80", 255, 65_536, 4, 2),
        ("sm_120", 40, 1024, 8, 6),
        ("gfx942", 128, 32_768, 4, 2),
        ("gfx942", 129, 1024, 4, 3),
        ("gfx950", 128, 32_768, 8, 2),
    ],
)
def test_blocks_per_multiprocessor(arch: str, registers: int, shared: int, warps: int, blocks: int) -> None:
    """NVIDIA: 65,536 registers by 8 a thread, 1 KB of each block's memory reserved; AMD: 512 by 8 a lane."""
    assert blocks_per_multiprocessor(arch, registers, shared, warps) == blocks
