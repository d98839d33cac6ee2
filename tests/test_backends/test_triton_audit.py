"""What the kernels compile to for GPUs that are not here: no spill in a loop, tensor cores, shared memory."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from expface_kernels.backends.triton import audit, autotune
from expface_kernels.backends.triton.candidates import Setting, shared_bytes
from tests.cases import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@pytest.mark.parametrize("arch", audit.ARCHITECTURES)
def test_16_bit_kernels_are_clean_on_every_architecture(arch: str) -> None:
    findings = audit.audit_case(arch, 512, "bf16")
    assert {f.kernel for f in findings} >= set(audit.STEP_KERNELS)
    assert [text for f in findings for text in f.complaints()] == []
    # What the tuning tool leaves out for want of shared memory really has too little; sm_100 adds barriers.
    setting = Setting(arch, 512, torch.bfloat16, torch.bfloat16, "ieee")
    for role, kernel in autotune.KERNELS.items():
        estimate = shared_bytes(role, getattr(setting.ruled(), role), setting)
        assert all(0.8 * estimate <= f.shared <= estimate + 64 for f in findings if f.kernel == kernel)


# What differs from the plain case: another operand, lists, an epilogue that stores E, maxima and the hardest
# negative, the cast in the tile with features that no block divides, the search for the nearest centres.
@pytest.mark.parametrize(
    ("features", "case", "kernels"),
    [
        (512, "fp16", audit.STEP_KERNELS),
        (512, "bf16, class list", audit.STEP_KERNELS),
        (512, "bf16, E kept", ("forward_tile", "weight_gradient_tile")),
        (512, "bf16, s=128, hardest", audit.STEP_KERNELS),
        (500, "float32 master as bf16", audit.STEP_KERNELS),
        (512, "bf16, topk", ("cosine_tile",)),
    ],
)
def test_other_16_bit_kernels_are_clean_on_hopper(features: int, case: str, kernels: tuple[str, ...]) -> None:
    findings = audit.audit_case("sm_90", features, case)
    assert {f.kernel for f in findings} >= set(kernels)
    assert [text for f in findings for text in f.complaints()] == []


def test_measured_features_are_audited_in_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"sm_90": {"measured_on": "a card", "tiles": {"384 bfloat16 bfloat16 ieee": {}}}}
    monkeypatch.setattr(audit.tuning, "table", lambda: table)
    wanted = audit.tasks(["sm_80", "sm_90"], None, list(audit.CASES))
    assert [name for arch, d, name in wanted if (arch, d) == ("sm_90", 384)] == list(audit.CASES)
    assert [name for arch, d, name in wanted if d == 128] == ["bf16"] * 2
    assert not [d for arch, d, _ in wanted if arch == "sm_80" and d == 384]
    assert audit.tasks(["sm_90"], [128], ["bf16", "fp16"]) == [("sm_90", 128, "bf16")]


def test_float32_kernels_do_not_spill_in_their_loops_on_hopper() -> None:
    findings = audit.audit_case("sm_90", 512, "float32")
    assert [text for f in findings for text in f.complaints()] == []
    assert all(f.matrix.startswith("HGMMA") for f in findings if f.kernel in audit.MATRIX_KERNELS)


@pytest.mark.parametrize("features", [128, 256, 1024])
def test_no_forward_tile_of_the_rules_spills_on_hopper(features: int) -> None:
    """Its blocks depend on D, and the compiler unrolls what is short."""
    findings = audit.audit_case("sm_90", features, "bf16")
    assert "forward_tile" in {finding.kernel for finding in findings}
    assert [text for finding in findings for text in finding.complaints()] == []


def test_what_is_wrong_is_said() -> None:
    good = audit.Finding(
        "sm_90", 512, "bf16", "forward_tile", 128, 98_304, 2, 0, 3, "HGMMA.64x128x16.F32.BF16", 32
    )
    assert good.complaints() == []
    for bad, word in (
        (replace(good, spills_inside=1), "spills among"),
        (replace(good, shared=300_000), "shared memory"),
        (replace(good, matrix="HMMA.16816.F32.BF16"), "not HGMMA"),
        (replace(good, matrix=""), "no matrix instruction"),
    ):
        assert len(bad.complaints()) == 1
        assert word in bad.complaints()[0]


def test_spills_are_placed_by_the_matrix_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    sass = """
        /*0000*/                   STL [R1], R2 ;
        /*0010*/              @P0  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0020*/                   LDL R3, [R1] ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0040*/                   LDL R3, [R1+0x4] ;
        /*0050*/                   LDL R4, [R1+0x8] ;
"""
    monkeypatch.setattr(audit, "_disassembled", lambda cubin, always: (sass, 99))

    class Result:
        asm = {"cubin": b""}  # noqa: RUF012

        class metadata:
            shared, name = 7, "forward_tile"

    found = audit.inspect(Result, "sm_90")
    assert [found[f"spills_{where}"] for where in ("before", "inside", "after")] == [1, 1, 2]
    assert (found["registers"], found["shared"], found["matrix_count"]) == (99, 7, 2)


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--arch", "sm_90", "--features", "512", "--case", "bf16"]
    assert audit.main(sizes) == 0
    assert "HGMMA" in capsys.readouterr().out
    assert audit.main([*sizes, "--json"]) == 0
    assert {entry["kernel"] for entry in json.loads(capsys.readouterr().out)} >= set(audit.STEP_KERNELS)
