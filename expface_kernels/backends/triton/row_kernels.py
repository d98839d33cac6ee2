"""Kernels over rows: operands, norms, the target path in float64. O(B·D) work. Only @triton.jit code.

B rows · C classes that take part · D features · BR rows of a block · BD ≥ D its features, a power of two
x (B, D) and w (C_all, D) as stored, any strides · y (B,) int64, < 0: no target · eqs.: docs/math.md
Prefixes: i_ index, o_ offsets, m_ mask, p_ pointer, b_ block of values.
"""

import triton
import triton.language as tl

from expface_kernels.backends.triton.kernels import EPS, rounded

PAIR_EPS = tl.constexpr(1e-14)  # shorter differences of unit vectors are rounding noise without a direction


@triton.jit
def _norm(b_v):
    if b_v.dtype == tl.float32:
        # Squares above 1.8e19 overflow: a power of two near the largest value goes out of the sum, at no cost
        # in digits. The plain root is an approximation on NVIDIA; float64 has no other.
        b_unit = _power_of_two(tl.max(tl.abs(b_v), 1))
        b_v = b_v * b_unit[:, None]
        return tl.div_rn(tl.sqrt_rn(tl.sum(b_v * b_v, 1)), b_unit)
    return tl.sqrt(tl.sum(b_v * b_v, 1))


@triton.jit
def _inverse(b_v):
    if b_v.dtype == tl.float32:  # rounded to nearest, as float64's division is
        return tl.div_rn(tl.full(b_v.shape, 1.0, tl.float32), b_v)
    return 1.0 / b_v


@triton.jit
def _at_least_eps(b_norm):
    # Not tl.maximum: it may drop a NaN.
    return tl.where(b_norm < EPS, EPS, b_norm)


@triton.jit
def _power_of_two(b_norm):
    """1/2^e with 2^e ≤ |v| < 2^(e+1), float32; 1 where the norm is no normal number."""
    b_bits = b_norm.to(tl.float32).to(tl.int32, bitcast=True) & 0x7F800000
    m_normal = (b_bits > 0) & (b_bits < 0x7E800000)
    # 2^(−e) by its exponent bits.
    return tl.where(m_normal, 0x7F000000 - b_bits, 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def row_operands(
    p_v,  # (rows, D) stored
    p_index,  # (rows,) which rows of v, if INDEXED
    p_out,  # (rows_pad, D_PAD) what the product multiplies, if STORE; rows with NaN or Inf are 0
    p_inv,  # (rows_pad,) float64 (float32 with SIGNED): 1/max(|v|, eps) of what is multiplied
    p_shift,  # (rows_pad,) float32: the factor that came before the cast
    rows,
    rows_pad,
    stride,
    stride_d,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    DTYPE: tl.constexpr,
    UNIT: tl.constexpr,
    SHIFT: tl.constexpr,
    INDEXED: tl.constexpr,
    STORE: tl.constexpr,
    SIGNED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Cast rows to DTYPE, dividing them first by their norm (UNIT) or by a power of two near it (SHIFT).

    The norm is that of the cast values, summed in float64 if WIDE, else in float32. It is NaN where the row
    is not finite. SIGNED: 1/|v| is negative where |v| < eps.
    """
    COMPUTE: tl.constexpr = tl.float64 if WIDE else tl.float32
    i_rows = tl.program_id(0) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_row = i_rows < rows
    i_stored = i_rows.to(tl.int64)
    if INDEXED:
        i_stored = tl.load(p_index + i_rows, mask=m_row, other=0)
    m_tile = m_row[:, None] & (o_d < D)[None, :]
    p_tile = p_v + i_stored[:, None] * stride + o_d.to(tl.int64)[None, :] * stride_d
    b_v = tl.load(p_tile, mask=m_tile, other=0.0).to(COMPUTE)
    b_norm = _norm(b_v)
    m_finite = b_norm - b_norm == 0
    b_factor = tl.full((BR,), 1.0, COMPUTE)
    if UNIT:
        b_factor = 1.0 / _at_least_eps(b_norm)
    if SHIFT:
        b_factor = _power_of_two(b_norm).to(COMPUTE)
    b_v = tl.where(m_finite[:, None], b_v * b_factor[:, None], 0.0)
    b_cast = rounded(b_v.to(tl.float32), DTYPE)
    b_norm = _norm(b_cast.to(COMPUTE)) / b_factor
    b_inv = tl.where(m_finite, _inverse(_at_least_eps(b_norm) * b_factor), float("nan"))
    if SIGNED:
        b_inv = tl.where(b_norm < EPS, -b_inv, b_inv)
    # Padding weighs nothing.
    b_inv = tl.where(m_row, b_inv, 0.0)
    m_pad = i_rows < rows_pad
    tl.store(p_inv + i_rows, b_inv.to(p_inv.dtype.element_ty), mask=m_pad)
    if SHIFT:
        tl.store(p_shift + i_rows, b_factor.to(tl.float32), mask=m_pad)
    if STORE:
        p_row = p_out + i_rows.to(tl.int64)[:, None] * D_PAD + o_d[None, :]
        tl.store(p_row, b_cast, mask=m_pad[:, None] & (o_d < D_PAD)[None, :])


@triton.jit
def copy_centres(
    p_w,
    p_index,
    p_inv,
    p_shift,
    p_out,  # (classes, D) in the product's dtype
    class_begin,
    classes,
    stride_w,
    stride_wd,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    INDEXED: tl.constexpr,
    SHIFTED: tl.constexpr,
    UNIT: tl.constexpr,
):
    """A chunk of centres as the library's product takes it: gathered, cast, and (UNIT) over its norm."""
    i_local = tl.program_id(0) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_row = i_local < classes
    i_rows = class_begin + i_local.to(tl.int64)
    b_factor = tl.full((BR,), 1.0, tl.float32)
    if UNIT:
        b_factor = tl.abs(tl.load(p_inv + i_rows, mask=m_row, other=0.0))
    if SHIFTED:
        b_factor *= tl.load(p_shift + i_rows, mask=m_row, other=0.0)
    if INDEXED:
        i_rows = tl.load(p_index + i_rows, mask=m_row, other=0)
    m_tile = m_row[:, None] & (o_d < D)[None, :]
    p_tile = p_w + i_rows[:, None] * stride_w + o_d.to(tl.int64)[None, :] * stride_wd
    b_w = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32) * b_factor[:, None]
    p_row = p_out + i_local.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_row, rounded(b_w, p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def _load_pair(p_x, p_w, p_index, i_rows, i_target, m_row, o_d, stride_x, stride_xd, stride_w, stride_wd,
               D: tl.constexpr, INDEXED: tl.constexpr):  # fmt: skip
    """(x, w of the target), (BR, BD) float64; a row without a target meets class 0."""
    i_class = tl.where(i_target < 0, 0, i_target)
    if INDEXED:
        i_class = tl.load(p_index + i_class, mask=m_row, other=0)
    m_tile = m_row[:, None] & (o_d < D)[None, :]
    o_d = o_d.to(tl.int64)
    p_x_tile = p_x + i_rows.to(tl.int64)[:, None] * stride_x + o_d[None, :] * stride_xd
    p_w_tile = p_w + i_class[:, None] * stride_w + o_d[None, :] * stride_wd
    b_x = tl.load(p_x_tile, mask=m_tile, other=0.0).to(tl.float64)
    return b_x, tl.load(p_w_tile, mask=m_tile, other=0.0).to(tl.float64)


@triton.jit
def _unit_tangent(b_d, b_at, m_alive):
    """b_d without its part along b_at, of length 1; 0 where not alive (eq. 5)."""
    b_t = b_d - tl.sum(b_d * b_at, 1)[:, None] * b_at
    b_length = _norm(b_t)
    m_alive = m_alive & (b_length > 0)
    return tl.where(m_alive[:, None], b_t / tl.where(m_alive, b_length, 1.0)[:, None], 0.0)


@triton.jit
def _difference(b_xn, b_wn, b_x_norm, b_w_norm):
    """(d of eq. 5, whether the two face each other, where there is a direction)."""
    m_facing = tl.sum(b_xn * b_wn, 1) >= 0
    b_d = tl.where(m_facing[:, None], b_wn - b_xn, b_wn + b_xn)
    return b_d, m_facing, (b_x_norm >= EPS) & (b_w_norm >= EPS) & (_norm(b_d) > PAIR_EPS)


@triton.jit
def pair_lengths(
    p_x, p_w, p_index, p_y,
    p_apart,  # (B,) float64 |xn − wn|
    p_together,  # (B,) float64 |xn + wn|
    B, stride_x, stride_xd, stride_w, stride_wd,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """What the target angle is made of (eq. 4); atan2 itself, which the interpreter lacks, is torch's."""
    i_rows = tl.program_id(0) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_row = i_rows < B
    i_target = tl.load(p_y + i_rows, mask=m_row, other=-1)
    b_x, b_w = _load_pair(p_x, p_w, p_index, i_rows, i_target, m_row, o_d,
                          stride_x, stride_xd, stride_w, stride_wd, D, INDEXED)  # fmt: skip
    b_xn = b_x / _at_least_eps(_norm(b_x))[:, None]
    b_wn = b_w / _at_least_eps(_norm(b_w))[:, None]
    tl.store(p_apart + i_rows, _norm(b_xn - b_wn), mask=m_row)
    tl.store(p_together + i_rows, _norm(b_xn + b_wn), mask=m_row)


@triton.jit
def target_pulls(
    p_x, p_w, p_index, p_y, p_h, p_order,
    p_out,  # (B, D) float32, in sorted order
    B, stride_x, stride_xd, stride_w, stride_wd,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """H_b·v_b/|w_y| of each row (eq. 11), rows sorted by label; 0 without a target."""
    i_sorted = tl.program_id(0) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_row = i_sorted < B
    i_rows = tl.load(p_order + i_sorted, mask=m_row, other=0)
    i_target = tl.load(p_y + i_rows, mask=m_row, other=-1)
    b_h = tl.load(p_h + i_rows, mask=m_row, other=0.0)
    b_x, b_w = _load_pair(p_x, p_w, p_index, i_rows, i_target, m_row, o_d,
                          stride_x, stride_xd, stride_w, stride_wd, D, INDEXED)  # fmt: skip
    b_x_norm, b_w_norm = _norm(b_x), _norm(b_w)
    b_xn, b_wn = b_x / _at_least_eps(b_x_norm)[:, None], b_w / _at_least_eps(b_w_norm)[:, None]
    b_d, m_facing, m_alive = _difference(b_xn, b_wn, b_x_norm, b_w_norm)
    b_v = _unit_tangent(tl.where(m_facing[:, None], -b_d, b_d), b_wn, m_alive)
    b_pull = b_v * (b_h / _at_least_eps(b_w_norm))[:, None]
    b_pull = tl.where(((b_h == 0) | (i_target < 0))[:, None], 0.0, b_pull)
    p_row = p_out + i_sorted.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_row, b_pull.to(tl.float32), mask=m_row[:, None] & (o_d < D)[None, :])


@triton.jit
def segment_sums(
    p_in, p_out,  # (B, D) float32, rows sorted by label
    p_start, p_stop,  # (B,) int64: the rows that share row i's label
    B, step,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """out_i = Σ_t in_(i + t·step), t < COUNT, inside i's segment; only where i starts such a group.

    Called with step 1, COUNT, COUNT², … it leaves a segment's sum at its first row, in a fixed order.
    """
    i_rows = tl.program_id(0) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_row = i_rows < B
    b_start = tl.load(p_start + i_rows, mask=m_row, other=0)
    b_stop = tl.load(p_stop + i_rows, mask=m_row, other=0)
    m_leads = m_row & ((i_rows - b_start) % (step * COUNT) == 0)
    b_sum = tl.zeros((BR, BD), tl.float64)
    for t in range(0, COUNT):
        i_next = i_rows.to(tl.int64) + t * step
        m_tile = (m_leads & (i_next < b_stop))[:, None] & (o_d < D)[None, :]
        b_sum += tl.load(p_in + i_next[:, None] * D + o_d[None, :], mask=m_tile, other=0.0).to(tl.float64)
    p_row = p_out + i_rows.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_row, b_sum.to(tl.float32), mask=m_leads[:, None] & (o_d < D)[None, :])


@triton.jit
def input_gradient(
    p_x, p_w, p_index, p_y, p_h,
    p_coef,  # (B,) float64: what turns a into a_b of eq. 10
    p_a,  # (B, D) float64
    p_dx,  # (B, D) in x's dtype
    B, stride_x, stride_xd, stride_w, stride_wd,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """dx (eq. 10): project, add the target's tangent, divide by |x|; 0 for rows shorter than eps."""
    i_rows = tl.program_id(0) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    m_row = i_rows < B
    i_target = tl.load(p_y + i_rows, mask=m_row, other=-1)
    b_x, b_w = _load_pair(p_x, p_w, p_index, i_rows, i_target, m_row, o_d,
                          stride_x, stride_xd, stride_w, stride_wd, D, INDEXED)  # fmt: skip
    b_x_norm, b_w_norm = _norm(b_x), _norm(b_w)
    b_xn, b_wn = b_x / _at_least_eps(b_x_norm)[:, None], b_w / _at_least_eps(b_w_norm)[:, None]
    b_d, _, m_alive = _difference(b_xn, b_wn, b_x_norm, b_w_norm)
    b_u = _unit_tangent(b_d, b_xn, m_alive)

    m_tile = m_row[:, None] & (o_d < D)[None, :]
    o_tile = i_rows.to(tl.int64)[:, None] * D + o_d[None, :]
    b_a = tl.load(p_a + o_tile, mask=m_tile, other=0.0)
    b_coef = tl.load(p_coef + i_rows, mask=m_row, other=0.0)
    b_h = tl.load(p_h + i_rows, mask=m_row, other=0.0)
    b_tangent = b_coef[:, None] * (b_a - tl.sum(b_a * b_xn, 1)[:, None] * b_xn)
    # By selection: an ignored row may hold NaN, and 0·NaN is NaN.
    b_pull = tl.where((b_coef == 0)[:, None], 0.0, b_tangent)
    b_pull -= tl.where(((b_h == 0) | (i_target < 0))[:, None], 0.0, b_h[:, None] * b_u)
    b_dx = b_pull / _at_least_eps(b_x_norm)[:, None]
    b_dx = tl.where((b_x_norm < EPS)[:, None] | (b_pull == 0), 0.0, b_dx)
    tl.store(p_dx + o_tile, rounded(b_dx.to(tl.float32), p_dx.dtype.element_ty), mask=m_tile)
