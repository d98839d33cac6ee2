"""A kernel that the sanitizer's tests launch rightly and wrongly. Only @triton.jit code."""

import triton
import triton.language as tl


@triton.jit
def copied(p_from, p_to, n, wrap, AGAIN: tl.constexpr, BLOCK: tl.constexpr):
    """The first n elements, a block a program; element i goes to i mod wrap."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(p_from + i, mask=i < n)
    tl.store(p_to + i % wrap, b, mask=i < n)
    if AGAIN:
        tl.store(p_to + i % wrap, b, mask=i < n)
