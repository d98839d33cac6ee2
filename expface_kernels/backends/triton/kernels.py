"""Kernels over tiles of classes: everything that touches all of w. Only @triton.jit code.

B rows, padded to B_pad · C classes that take part · D features, padded to D_PAD · T rows of T_j (tangents)
x (B_pad, D_PAD) row operand · w (C_all, D) stored centres, any strides · index (C,) their rows, if a list
p (chunk, B_pad) P' of eq. 9, class-major · e (kept, B_pad) kept exponentials · eqs.: docs/math.md
Prefixes: i_ index, o_ offsets, m_ mask, p_ pointer, b_ block of values. Exponents are in units of log 2.

Centres are cast to the dtype of x in the tile. `inv` is 1/max(|w_j|, eps) of the values so cast, negative
where |w_j| < eps. SHIFTED: centres are first multiplied by `shift`, a power of two, and `inv` belongs to what
comes out.
Rows of x that are padding are 0; a row with NaN is 0 too, and has a row_scale of NaN.
"""

import triton
import triton.language as tl

# The interpreter truncates when it casts to bfloat16 and multiplies its bit patterns: both by hand there.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
EPS = tl.constexpr(1e-12)
LARGEST = tl.constexpr(3.3e38)  # below bfloat16's largest number, so that rounding makes no infinity


@triton.jit
def rounded(b_v, DTYPE: tl.constexpr):
    """float32 values in DTYPE, to nearest, ties to even."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        b_bits = b_v.to(tl.int32, bitcast=True)
        b_bits = b_bits + 0x7FFF + ((b_bits >> 16) & 1)
        b_v = tl.where(b_v == b_v, (b_bits & -65536).to(tl.float32, bitcast=True), b_v)
    return b_v.to(DTYPE)


@triton.jit
def _operand(b_w, b_shift, DTYPE: tl.constexpr, SHIFTED: tl.constexpr):
    """Stored centres (N, K) as the product sees them."""
    if SHIFTED:
        b_w = b_w.to(tl.float32) * b_shift[:, None]
    if b_w.dtype == DTYPE:
        return b_w
    return rounded(b_w.to(tl.float32), DTYPE)


@triton.jit
def _dot(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    if INTERPRET:
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)


@triton.jit
def _columns(o_d, stride_d):
    """Offsets of features o_d, 64 bit: D strides of 4.2 million elements, as in a transposed w, pass 2^31."""
    return o_d.to(tl.int64) * stride_d


@triton.jit
def _load_centres(p_rows, o_d, stride_d, D: tl.constexpr, BK: tl.constexpr):
    """(N, BK) columns o_d of the centres that p_rows (N,) points to; 0 past D."""
    p_tile = p_rows[:, None] + _columns(o_d, stride_d)[None, :]
    # A mask along the contiguous dimension costs vector loads: only where D needs it.
    if D % BK == 0:
        return tl.load(p_tile)
    return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def _centre_rows(p_w, p_index, i_classes, stride_w, INDEXED: tl.constexpr):
    """Pointers (N,) to the centres of classes i_classes, 64 bit: C·D passes 2^31 at 4.2 million classes."""
    i_rows = i_classes.to(tl.int64)
    if INDEXED:
        i_rows = tl.load(p_index + i_rows)
    return p_w + i_rows * stride_w


@triton.jit
def _products(
    p_x_rows, p_w_rows, b_shift, stride_wd,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Return x·wᵀ (BM, BN).

    The one place: other factors round otherwise, and the backward's p would not sum to 1. Blocks may differ.
    Nothing but the product may use its tiles: a tile with a second use in the loop gets a buffer too few from
    Triton's pipeliner where the product is asynchronous (wgmma), and is overwritten while it is read.
    """
    b_acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        o_d = k + tl.arange(0, BK)
        b_x = tl.load(p_x_rows[:, None] + o_d[None, :])
        b_w = _load_centres(p_w_rows, o_d, stride_wd, D, BK)
        b_w = _operand(b_w, b_shift, b_x.dtype, SHIFTED)
        b_acc = _dot(b_x, tl.trans(b_w), b_acc, PRECISION)
    return b_acc


@triton.jit
def forward_tile(
    p_x,
    p_row_scale,  # (B_pad,) s·log2(e)/|x|
    p_y,  # (B_pad,) int32, −1 in padding
    p_w,
    p_index,
    p_inv,  # (C,)
    p_shift,
    p_sum,  # (tiles, B_pad)
    p_max,  # (tiles, B_pad), if MAXIMA or HARDEST
    p_arg,  # (tiles, B_pad) int32, if HARDEST; −1 where a tile has no negative
    p_e,  # (kept, B_pad), if KEEP
    B_pad,
    class_begin,
    class_end,
    tile_begin,
    stride_w,
    stride_wd,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEXED: tl.constexpr,
    SHIFTED: tl.constexpr,
    MAXIMA: tl.constexpr,
    HARDEST: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Σ_j exp2(ζ_bj) over the classes of a tile, without the target (eqs. 2 and 3); row blocks run fastest.

    Without MAXIMA the sums are plain (s ≤ 70), else relative to the tile's maximum. KEEP: exp2(ζ)/|w_j| too.
    """
    i_block = tl.program_id(0) % (B_pad // BM)
    i_tile = tl.program_id(0) // (B_pad // BM)
    i_rows = i_block * BM + tl.arange(0, BM)
    i_classes = class_begin + i_tile * BN + tl.arange(0, BN)
    m_class = i_classes < class_end
    i_safe = tl.minimum(i_classes, class_end - 1)
    p_w_rows = _centre_rows(p_w, p_index, i_safe, stride_w, INDEXED)
    p_x_rows = p_x + i_rows.to(tl.int64) * D_PAD
    b_shift = tl.load(p_shift + i_safe) if SHIFTED else 0.0

    b_acc = _products(p_x_rows, p_w_rows, b_shift, stride_wd, D, BM, BN, BK, PRECISION, SHIFTED)

    b_inv = tl.load(p_inv + i_safe)
    b_y = tl.load(p_y + i_rows)
    b_row_scale = tl.load(p_row_scale + i_rows)
    b_z = b_acc * b_row_scale[:, None] * tl.abs(b_inv)[None, :]
    m_out = (i_classes[None, :] == b_y[:, None]) | (i_classes >= class_end)[None, :]
    b_z = tl.where(m_out, -float("inf"), b_z)
    o_out = (tile_begin + i_tile).to(tl.int64) * B_pad + i_rows
    if MAXIMA or HARDEST:
        b_known = tl.where(b_z == b_z, b_z, -float("inf"))
        b_max = tl.max(b_known, 1)
        tl.store(p_max + o_out, b_max)
    if HARDEST:
        # Of equals the first; a masked class is no candidate even where there is nothing else.
        m_best = (b_known == b_max[:, None]) & (b_known > -float("inf"))
        b_arg = tl.min(tl.where(m_best, i_classes[None, :], 2147483647), 1)
        tl.store(p_arg + o_out, tl.where(b_arg == 2147483647, -1, b_arg))
    if MAXIMA:
        b_z -= tl.where(b_max == -float("inf"), 0.0, b_max)[:, None]
    b_exp = tl.exp2(b_z)
    tl.store(p_sum + o_out, tl.sum(b_exp, 1))
    if KEEP:
        # An ignored row of NaN must not reach dW, where 0·NaN is NaN.
        b_e = tl.where((b_row_scale == b_row_scale)[:, None], b_exp * tl.abs(b_inv)[None, :], 0.0)
        b_e = tl.where(b_e > LARGEST, LARGEST, b_e)
        p_tile = p_e + i_classes.to(tl.int64)[None, :] * B_pad + i_rows[:, None]
        tl.store(p_tile, rounded(b_e, p_e.dtype.element_ty), mask=m_class[None, :])


@triton.jit
def probability_tile(
    p_x,
    p_row_scale,
    p_y,
    p_log2_l,  # (B_pad,) log2 l_b, less what P' is scaled by; +inf where the row takes no part
    p_g,  # (B_pad,) G_b/max|G|, scaled as dW's operand is
    p_w,
    p_index,
    p_inv,
    p_shift,
    p_p,  # (chunk, B_pad)
    p_col,  # (row blocks, chunk)
    B_pad,
    class_begin,
    class_end,
    chunk,  # allocated classes of a chunk
    inv_scale,  # 1/(s·log2(e))
    stride_w,
    stride_wd,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEXED: tl.constexpr,
    SHIFTED: tl.constexpr,
    OVER_NORM: tl.constexpr,
):
    """P' = p/|w_j| (p alone without OVER_NORM) of a chunk (eq. 9), and Σ_b g_b·P'·cos of a block's rows."""
    i_block = tl.program_id(0) % (B_pad // BM)
    i_tile = tl.program_id(0) // (B_pad // BM)
    i_rows = i_block * BM + tl.arange(0, BM)
    i_local = i_tile * BN + tl.arange(0, BN)
    i_classes = class_begin + i_local
    m_class = i_classes < class_end
    i_safe = tl.minimum(i_classes, class_end - 1)
    p_w_rows = _centre_rows(p_w, p_index, i_safe, stride_w, INDEXED)
    p_x_rows = p_x + i_rows.to(tl.int64) * D_PAD
    b_shift = tl.load(p_shift + i_safe) if SHIFTED else 0.0

    b_acc = _products(p_x_rows, p_w_rows, b_shift, stride_wd, D, BM, BN, BK, PRECISION, SHIFTED)

    b_inv = tl.where(m_class, tl.abs(tl.load(p_inv + i_safe)), 0.0)
    b_z = b_acc * tl.load(p_row_scale + i_rows)[:, None] * b_inv[None, :]
    b_log2_l = tl.load(p_log2_l + i_rows)
    m_in = (b_log2_l != float("inf"))[:, None] & (i_classes[None, :] != tl.load(p_y + i_rows)[:, None])
    # Masked before the difference: product and difference in one operation would round otherwise than the
    # forward's product, and a row's p would not sum to 1.
    b_p = tl.exp2(tl.where(m_in & m_class[None, :], b_z, -float("inf")) - b_log2_l[:, None])
    if OVER_NORM:
        b_p *= b_inv[None, :]
    b_p = rounded(b_p, p_p.dtype.element_ty)
    tl.store(p_p + i_local.to(tl.int64)[None, :] * B_pad + i_rows[:, None], b_p)
    # From P' as rounded: dW projects out what it has really summed. A dead row's cosine may be NaN.
    b_share = b_p.to(tl.float32) * (b_z * inv_scale) * tl.load(p_g + i_rows)[:, None]
    b_col = tl.sum(tl.where(m_in, b_share, 0.0), 0)
    tl.store(p_col + i_block * chunk + i_local, b_col)


@triton.jit
def kept_columns(
    p_e,  # (kept, B_pad), from the chunk's first class on
    p_g,  # (B_pad,) G_b/l_b, scaled as dW's operand is
    p_inv,  # (chunk,)
    p_col,  # (chunk,)
    B_pad,
    classes,
    inv_scale,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Σ_b g_b·E·cos of kept exponentials; the cosine is read back from E·|w| = exp2(s·log2(e)·cos)."""
    i_classes = tl.program_id(0) * BM + tl.arange(0, BM)
    m_class = i_classes < classes
    b_log2_norm = -tl.log2(tl.abs(tl.load(p_inv + i_classes, mask=m_class, other=1.0)))
    p_rows = p_e + i_classes.to(tl.int64)[:, None] * B_pad
    b_sum = tl.zeros((BM, BN), tl.float32)
    for o_row in range(0, B_pad, BN):
        i_rows = o_row + tl.arange(0, BN)
        m_tile = m_class[:, None] & (i_rows < B_pad)[None, :]
        b_e = tl.load(p_rows + i_rows[None, :], mask=m_tile, other=0.0).to(tl.float32)
        b_g = tl.load(p_g + i_rows, mask=i_rows < B_pad, other=0.0)
        b_cos = (tl.log2(tl.where(b_e > 0, b_e, 1.0)) + b_log2_norm[:, None]) * inv_scale
        b_sum += tl.where(b_e == 0, 0.0, (b_e * b_g[None, :]) * b_cos)
    tl.store(p_col + i_classes, tl.sum(b_sum, 1), mask=m_class)


@triton.jit
def weight_gradient_tile(
    p_p,  # (chunk, B_pad) P' or kept E of the chunk
    p_op,  # (B_pad, D_PAD) the rows' operand
    p_col,  # (parts, chunk)
    p_coef,  # (2,): their product is what turns the sum into the gradient
    p_w,
    p_index,
    p_inv,
    p_shift,
    p_segment,  # (C,) int32: row of p_tangents, −1 where the class is nobody's target
    p_tangents,  # (T, D) float32
    p_dw,  # (C_all, D), or (C, D) where nothing is scattered
    B_pad,
    class_begin,
    class_end,
    chunk,
    parts,
    stride_w,
    stride_wd,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEXED: tl.constexpr,
    SCATTERS: tl.constexpr,
    SHIFTED: tl.constexpr,
    OVER_NORM: tl.constexpr,
):
    """A finished tile of dw: product, projection, tangents (eq. 11); feature blocks run fastest."""
    i_block = tl.program_id(0) % (D_PAD // BN)
    i_tile = tl.program_id(0) // (D_PAD // BN)
    o_d = i_block * BN + tl.arange(0, BN)
    i_local = i_tile * BM + tl.arange(0, BM)
    p_p_rows = p_p + i_local.to(tl.int64)[:, None] * B_pad
    b_acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, B_pad, BK):
        i_rows = k + tl.arange(0, BK)
        b_p = tl.load(p_p_rows + i_rows[None, :])
        b_op = tl.load(p_op + i_rows.to(tl.int64)[:, None] * D_PAD + o_d[None, :])
        b_acc = _dot(b_p, b_op, b_acc, PRECISION)

    i_classes = class_begin + i_local
    m_class = i_classes < class_end
    i_safe = tl.minimum(i_classes, class_end - 1)
    b_col = tl.zeros((BM,), tl.float32)
    for i_part in range(0, parts):
        b_col += tl.load(p_col + i_part * chunk + i_local)
    b_signed = tl.load(p_inv + i_safe)
    b_inv = tl.abs(b_signed)
    m_tile = m_class[:, None] & (o_d < D)[None, :]
    p_rows = _centre_rows(p_w, p_index, i_safe, stride_w, INDEXED)
    p_tile = p_rows[:, None] + _columns(o_d, stride_wd)[None, :]
    b_shift = tl.load(p_shift + i_safe) if SHIFTED else 1.0
    b_w = _operand(tl.load(p_tile, mask=m_tile, other=0.0), b_shift, p_op.dtype.element_ty, SHIFTED)
    b_dw = b_acc - b_w.to(tl.float32) * (b_inv * b_col)[:, None]
    b_dw = b_dw * tl.load(p_coef) * tl.load(p_coef + 1)
    if not OVER_NORM:
        b_dw *= (b_inv * b_shift)[:, None]
    i_segment = tl.load(p_segment + i_safe)
    p_pull = p_tangents + i_segment.to(tl.int64)[:, None] * D + o_d[None, :]
    b_dw -= tl.load(p_pull, mask=m_tile & (i_segment >= 0)[:, None], other=0.0)
    # The gradient stands complete in registers here: an optimizer's step would follow before the store.
    b_dw = tl.where((b_signed > 0)[:, None], b_dw, tl.where(b_signed < 0, 0.0, b_signed)[:, None])
    p_out = _centre_rows(p_dw, p_index, i_safe, D, SCATTERS)[:, None] + o_d[None, :]
    tl.store(p_out, rounded(b_dw, p_dw.dtype.element_ty), mask=m_tile)


@triton.jit
def cosine_tile(
    p_x,
    p_row_scale,  # (B_pad,) 1/|x|
    p_w,
    p_inv,
    p_shift,
    p_cos,  # (B, chunk)
    B,
    B_pad,
    class_begin,
    class_end,
    chunk,
    stride_w,
    stride_wd,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """Cosines of a chunk of classes, float32, for topk."""
    i_block = tl.program_id(0) % (B_pad // BM)
    i_rows = i_block * BM + tl.arange(0, BM)
    i_local = tl.program_id(0) // (B_pad // BM) * BN + tl.arange(0, BN)
    i_safe = tl.minimum(class_begin + i_local, class_end - 1)
    p_w_rows = _centre_rows(p_w, p_w, i_safe, stride_w, False)
    p_x_rows = p_x + i_rows.to(tl.int64) * D_PAD
    b_shift = tl.load(p_shift + i_safe) if SHIFTED else 0.0
    b_acc = _products(p_x_rows, p_w_rows, b_shift, stride_wd, D, BM, BN, BK, PRECISION, SHIFTED)
    b_inv = tl.load(p_inv + i_safe)
    b_cos = b_acc * tl.load(p_row_scale + i_rows)[:, None] * tl.abs(b_inv)[None, :]
    m_tile = (i_rows < B)[:, None] & (class_begin + i_local < class_end)[None, :]
    tl.store(p_cos + i_rows.to(tl.int64)[:, None] * chunk + i_local[None, :], b_cos, mask=m_tile)
