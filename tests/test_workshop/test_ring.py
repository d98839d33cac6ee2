"""The check of compiled loops for races: seeded races are red, right loops green, doubts never silent."""

from __future__ import annotations

import re

import pytest
import triton
import triton.language as tl

from expface_kernels.workshop import ring
from tests.cases import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
D = 512


@triton.jit
def product_only(
    p_x, p_w, p_out, p_sum, tiles, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    i_m, i_n, i_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    b_acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        b_x = tl.load(p_x + i_m[:, None] * D + (k + i_k)[None, :])
        b_w = tl.load(p_w + i_n[:, None] * D + (k + i_k)[None, :])
        b_acc = tl.dot(b_x, tl.trans(b_w), b_acc)
    tl.store(p_out + i_m[:, None] * BN + i_n[None, :], b_acc)


@triton.jit
def sum_and_multiply(
    p_x, p_w, p_out, p_sum, tiles, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Uses the tile of w twice, which is what Triton's pipeliner counts a buffer too few for."""
    i_m, i_n, i_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    b_acc, b_squares = tl.zeros((BM, BN), tl.float32), tl.zeros((BN, BK), tl.float32)
    for k in range(0, D, BK):
        b_x = tl.load(p_x + i_m[:, None] * D + (k + i_k)[None, :])
        b_w = tl.load(p_w + i_n[:, None] * D + (k + i_k)[None, :])
        b_acc = tl.dot(b_x, tl.trans(b_w), b_acc)
        b_squares += b_w.to(tl.float32) * b_w.to(tl.float32)
    tl.store(p_out + i_m[:, None] * BN + i_n[None, :], b_acc)
    tl.store(p_sum + i_n, tl.sum(b_squares, 1))


@triton.jit
def sum_and_multiply_by_descriptor(
    p_x, p_w, p_out, p_sum, tiles, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    i_m, i_n = tl.arange(0, BM), tl.arange(0, BN)
    x = tl.make_tensor_descriptor(p_x, [BM, D], [D, 1], [BM, BK])
    w = tl.make_tensor_descriptor(p_w, [BN, D], [D, 1], [BN, BK])
    b_acc, b_squares = tl.zeros((BM, BN), tl.float32), tl.zeros((BN, BK), tl.float32)
    for k in range(0, D, BK):
        b_x, b_w = x.load([0, k]), w.load([0, k])
        b_acc = tl.dot(b_x, tl.trans(b_w), b_acc)
        b_squares += b_w.to(tl.float32) * b_w.to(tl.float32)
    tl.store(p_out + i_m[:, None] * BN + i_n[None, :], b_acc)
    tl.store(p_sum + i_n, tl.sum(b_squares, 1))


@triton.jit
def persistent(
    p_x, p_w, p_out, p_sum, tiles, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    i_m, i_k = tl.arange(0, BM), tl.arange(0, BK)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        i_n = t * BN + tl.arange(0, BN)
        b_acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, D, BK):
            b_x = tl.load(p_x + i_m[:, None] * D + (k + i_k)[None, :])
            b_w = tl.load(p_w + i_n[:, None] * D + (k + i_k)[None, :])
            b_acc = tl.dot(b_x, tl.trans(b_w), b_acc)
        tl.store(p_out + i_m[:, None] * BN + i_n[None, :], b_acc)


@triton.jit
def warp_specialized(
    p_x, p_w, p_out, p_sum, tiles, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    i_m, i_n = tl.arange(0, BM), tl.arange(0, BN)
    x = tl.make_tensor_descriptor(p_x, [BM, D], [D, 1], [BM, BK])
    w = tl.make_tensor_descriptor(p_w, [BN, D], [D, 1], [BN, BK])
    b_acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, D, BK, warp_specialize=True):
        b_acc = tl.dot(x.load([0, k]), tl.trans(w.load([0, k])), b_acc)
    tl.store(p_out + i_m[:, None] * BN + i_n[None, :], b_acc)


def ttgir(kernel: triton.JITFunction, capability: int, block: int = 32, stages: int = 4) -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"D": D, "BM": 128, "BN": 128, "BK": block}
    signature = {name: "constexpr" if name in constants else "*bf16" for name in kernel.arg_names}
    signature |= {"p_out": "*fp32", "p_sum": "*fp32", "tiles": "i32"}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n.startswith("p_")
    }
    result = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 8, "num_stages": stages, "enable_fp_fusion": True},
    )
    return result.asm["ttgir"]


@pytest.mark.parametrize(("block", "stages"), [(32, 4), (64, 3)])
@pytest.mark.parametrize("kernel", [sum_and_multiply, sum_and_multiply_by_descriptor])
def test_a_tile_that_is_summed_and_multiplied_is_a_race_on_hopper(
    kernel: triton.JITFunction, block: int, stages: int
) -> None:
    report = ring.check(ttgir(kernel, 90, block, stages))
    assert [loop.in_flight for loop in report.loops] == [1]
    assert report.problems
    assert all(text.startswith("race: ") for text in report.problems)


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("kernel", [product_only, persistent])
def test_right_loops_are_green(kernel: triton.JITFunction, capability: int) -> None:
    report = ring.check(ttgir(kernel, capability))
    assert report.problems == []
    assert [loop.in_flight for loop in report.loops] == [1]


def test_the_spare_buffer_of_blackwell_is_seen() -> None:
    """There the tile that is used twice has one buffer more."""
    assert ring.check(ttgir(sum_and_multiply, 100)).problems == []


def test_synchronous_products_have_nothing_to_check() -> None:
    assert ring.check(ttgir(product_only, 80)) == ring.Report([], [])


@pytest.mark.parametrize("capability", [90, 100])
def test_without_its_wait_a_right_loop_is_a_race(capability: int) -> None:
    text = ttgir(product_only, capability)
    if capability == 90:
        broken = text.replace("{pendings = 1 : i32}", "{pendings = 2 : i32}")
    else:
        broken = "\n".join(line for line in text.splitlines() if "ttng.wait_barrier" not in line)
    assert broken != text
    assert any(problem.startswith("race: ") for problem in ring.check(broken).problems)


def test_with_a_buffer_less_a_right_loop_is_a_race() -> None:
    """The ring's length stands in the comparisons that turn its positions back to 0."""
    text = ttgir(product_only, 90)
    broken = re.sub(r"(cmpi sge, %\S+) %c4_i32", r"\1 %c3_i32", text)
    assert broken != text
    broken = broken.replace("%c4_i32 = arith.constant 4", "%c3_i32 = arith.constant 3")
    assert any(problem.startswith("race: ") for problem in ring.check(broken).problems)


def test_warp_specialized_loops_are_not_understood() -> None:
    text = ttgir(warp_specialized, 100)
    assert "ttg.warp_specialize" in text
    assert [problem.split(":")[0] for problem in ring.check(text).problems] == ["not understood"]


@pytest.mark.parametrize(
    ("capability", "pattern", "replacement", "word"),
    [
        # A position that is loaded, an operation that nobody has heard of, a phase out of nowhere.
        (90, r"arith\.select (%\S+), %c0_i32, (%\S+) : i32", r"test.loaded \1, \2 : i32", "worked out"),
        (
            90,
            r"ttg\.async_copy_global_to_local (%\S+), (%\S+)",
            r"ttg.new_copy \1, \2",
            "operation on a buffer",
        ),
        (100, r"arith\.xori (%\S+), (%\S+) : i32", r"test.loaded \1, \2 : i32", "phase"),
    ],
)
def test_what_cannot_be_followed_is_said(capability: int, pattern: str, replacement: str, word: str) -> None:
    text, count = re.subn(pattern, replacement, ttgir(product_only, capability))
    assert count
    problems = ring.check(text).problems
    assert any(problem.startswith("not understood: ") and word in problem for problem in problems)


def _loop_in(text: str, opening: str) -> str:
    """Return the text with its first loop inside another operation's braces."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if "scf.for" in line)
    indent = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
    stop = next(i for i in range(start + 1, len(lines)) if lines[i].startswith(indent + "}"))
    wrapped = [indent + opening, *lines[start : stop + 1], indent + "}"]
    return "\n".join([*lines[:start], *wrapped, *lines[stop + 1 :]])


@pytest.mark.parametrize("opening", ["scf.execute_region {", "ttg.mask %m {", "scf.index_switch %x case 1 {"])
def test_a_loop_inside_an_unknown_operation_is_not_passed_over(opening: str) -> None:
    assert ring.check(_loop_in(ttgir(sum_and_multiply, 90), opening)).problems


@pytest.mark.parametrize(
    ("kernel", "capability", "pattern", "replacement"),
    [
        # A wait that may not happen; a buffer chosen by nobody knows what; an arrival; a branch.
        (product_only, 100, r"(ttng\.wait_barrier %\S+, %[^,\s]+)( deps)", r"\1, %mystery\2"),
        (
            sum_and_multiply, 90, r"(%\S+) = ttg\.memdesc_trans (%\S+) (\{.*?\}) : (.*?) ->",
            r"%chosen = arith.select %mystery, \2, %nothing : \4\n \1 = ttg.memdesc_trans %chosen \3 : \4 ->",
        ),
        (product_only, 90, r"(scf\.yield .*)", r"ttng.arrive_barrier %b_w, 1\n \1"),
        (product_only, 90, r"(scf\.yield .*)", r"cf.cond_br %mystery, ^bb1, ^bb2\n \1"),
    ],
)  # fmt: skip
def test_a_doubt_in_a_loop_is_said(
    kernel: triton.JITFunction, capability: int, pattern: str, replacement: str
) -> None:
    text, count = re.subn(pattern, replacement, ttgir(kernel, capability))
    assert count
    assert any(problem.startswith("not understood: ") for problem in ring.check(text).problems)


def test_a_loop_without_products_inside_does_not_hide_the_outer_one() -> None:
    inner = "scf.for %j = %c0_i32 to %c1_i32 step %c1_i32 : i32 {\n }\n"
    text = re.sub(r"(scf\.yield .*)", lambda found: inner + found[1], ttgir(product_only, 90))
    report = ring.check(text)
    assert report.problems == []
    assert [loop.in_flight for loop in report.loops] == [1]


def test_memory_of_a_freed_buffer_is_not_taken_while_a_product_reads_it() -> None:
    text = ttgir(product_only, 90)
    last_wait = re.search(r"^.*warp_group_dot_wait %\S+#0 \{pendings = 0 : i32\}.*$", text, re.MULTILINE)
    freed = re.search(r"ttg\.local_dealloc (%\S+)", text)
    assert last_wait
    assert freed
    made = "%new = ttg.local_alloc %c0_i32 : (i32) -> !ttg.memdesc<4xi32, #shared, #smem>"
    broken = text.replace(last_wait[0], f"ttg.local_dealloc {freed[1]} : x\n {made}")
    assert any("freed buffer" in problem for problem in ring.check(broken).problems)
