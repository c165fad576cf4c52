"""What `contrast` does to rows, O(N D): onto the sphere, positives, losses, and back through the
Jacobian.

    unit       z = x / max(|x|, 1e-12); of 16-bit rows x itself and 1 / max(|x|, 1e-12), as z would
               be rounded
    pairs      the same for q_i and k_i, and their cosine
    turn       loss = log(1 + e^(lse - t cos)), r = sigmoid(lse - t cos), r e^(zero - lse)
    back       dq = factor J_q (t u_q - t share (z_k - z_q)), dk likewise; u comes from the sweeps,
               in parts

A program owns whole rows: no atomics, the same bits every run. The cosine on the sphere is
`1 - |z_q - z_k|^2 / 2`, whose slope z_k - z_q keeps its digits where the pair is aligned.
"""

import triton
import triton.language as tl

from ._tile import known_maximum, load_rows, scale_of, softplus_and_sigmoid, store_rows


@triton.jit
def _norm(x, NORMALIZE: tl.constexpr):
    """1 / |x| of each row (0 for a zero row, 1 where nothing is normalised), and whether z is on
    the sphere. Comparisons keep NaN, which maximum would drop."""
    squares = tl.sum(x * x, 1)
    if NORMALIZE:
        norm = tl.sqrt(squares)
        inverse = 1.0 / tl.where(norm < 1e-12, 1e-12, norm)
        inverse = tl.where(squares == 0.0, 0.0, inverse)
        on_sphere = (norm > 1e-12) & (norm < float("inf"))
    else:
        inverse = tl.full(squares.shape, 1.0, tl.float32)
        on_sphere = squares < 0.0
    return inverse, on_sphere


@triton.jit
def _store_unit(z_ptr, stride, inverse_ptr, rows, N, at, x, inverse, D: tl.constexpr):
    """x and its inverse length, or their product where there is no place for the length."""
    if inverse_ptr is not None:
        tl.store(inverse_ptr + rows, inverse, mask=rows < N)
    else:
        x = x * inverse[:, None]
    store_rows(z_ptr, stride, rows, N, at, x.to(z_ptr.dtype.element_ty), D)


@triton.jit
def unit(
    x_ptr, z_ptr, inverse_ptr, alarm_ptr, N, x_stride, z_stride,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    at = tl.arange(0, BD)
    x = load_rows(x_ptr, x_stride, rows, N, at, D, BD).to(tl.float32)
    inverse, on_sphere = _norm(x, NORMALIZE)
    _store_unit(z_ptr, z_stride, inverse_ptr, rows, N, at, x, inverse, D)
    tl.store(alarm_ptr + rows, tl.sum(x * 0.0, 1), mask=rows < N)


@triton.jit
def pairs(
    q_ptr, k_ptr, zq_ptr, zk_ptr, q_inverse_ptr, k_inverse_ptr, cosine_ptr, alarm_ptr, N, q_stride,
    k_stride, z_stride,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    at = tl.arange(0, BD)
    q = load_rows(q_ptr, q_stride, rows, N, at, D, BD).to(tl.float32)
    k = load_rows(k_ptr, k_stride, rows, N, at, D, BD).to(tl.float32)
    q_inverse, q_on_sphere = _norm(q, NORMALIZE)
    k_inverse, k_on_sphere = _norm(k, NORMALIZE)
    tl.store(alarm_ptr + rows, tl.sum(q * 0.0, 1) + tl.sum(k * 0.0, 1), mask=rows < N)
    _store_unit(zq_ptr, z_stride, q_inverse_ptr, rows, N, at, q, q_inverse, D)
    _store_unit(zk_ptr, z_stride, k_inverse_ptr, rows, N, at, k, k_inverse, D)
    q, k = q * q_inverse[:, None], k * k_inverse[:, None]
    apart = q - k
    cosine = tl.where(
        q_on_sphere & k_on_sphere, 1.0 - 0.5 * tl.sum(apart * apart, 1), tl.sum(q * k, 1)
    )
    tl.store(cosine_ptr + rows, cosine, mask=rows < N)


@triton.jit
def turn(
    lse_ptr, cosine_ptr, alarm_ptr, loss_ptr, r_ptr, at_zero_ptr, scale, scale_ptr, N, B, apart,
    RECIPROCAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row i of N meets the cosine of pair i mod B; losses are `apart` elements apart. Beside r also
    r e^(zero - lse), which means something where `zero` is a known maximum."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = scale_of(scale, scale_ptr, RECIPROCAL)
    pair = tl.where(rows < B, rows, rows - B)
    lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)
    cosine = tl.load(cosine_ptr + pair, mask=rows < N, other=0.0)
    loss, r = softplus_and_sigmoid(lse - t * cosine)
    if alarm_ptr is not None:
        loss += tl.load(alarm_ptr)
    tl.store(loss_ptr + rows * apart, loss, mask=rows < N)
    tl.store(r_ptr + rows, r, mask=rows < N)
    known, zero = known_maximum(t, N)
    at_zero = tl.where(lse == -float("inf"), 0.0, r * tl.exp(zero - lse))
    tl.store(at_zero_ptr + rows, at_zero, mask=rows < N)


@triton.jit
def _sum_of_parts(
    ptr, stride, part_stride, parts, rows, N, at,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Those rows of (parts, N, ...), summed over the parts in their order."""
    total = tl.zeros((BM, BD), tl.float32)
    for part in range(parts):
        total += load_rows(ptr + tl.cast(part, tl.int64) * part_stride, stride, rows, N, at, D, BD)
    return total


@triton.jit
def _jacobian(g, z, inverse, on_sphere, factor):
    radial = tl.where(on_sphere, tl.sum(z * g, 1), 0.0)
    return (g - radial[:, None] * z) * (inverse * factor)[:, None]


@triton.jit
def back(
    q_ptr, k_ptr, cosine_ptr, u_q_ptr, u_k_ptr, o_r_ptr, r_ptr, r_other_ptr, dq_ptr,
    dk_ptr, dscale_ptr, factor, scale, scale_ptr, N, q_stride, k_stride, u_stride, q_parts,
    q_part_stride, k_parts, k_part_stride,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, NORMALIZE: tl.constexpr,
    STACKED: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    at = tl.arange(0, BD)
    t = scale_of(scale, scale_ptr, RECIPROCAL)
    q = load_rows(q_ptr, q_stride, rows, N, at, D, BD).to(tl.float32)
    k = load_rows(k_ptr, k_stride, rows, N, at, D, BD).to(tl.float32)
    q_inverse, q_on_sphere = _norm(q, NORMALIZE)
    k_inverse, k_on_sphere = _norm(k, NORMALIZE)
    q, k = q * q_inverse[:, None], k * k_inverse[:, None]
    share = tl.load(r_ptr + rows, mask=rows < N, other=0.0)
    if r_other_ptr is not None:
        share += tl.load(r_other_ptr + rows, mask=rows < N, other=0.0)
    euler = tl.zeros((BM,), tl.float32)
    u = tl.zeros((BM, BD), tl.float32)
    if u_q_ptr is not None:
        u = _sum_of_parts(
            u_q_ptr, u_stride, q_part_stride, q_parts, rows, N, at, D, BM, BD
        )  # fmt: skip
        if o_r_ptr is not None:  # the softmax-weighted mean of the keys, times 1 - p
            u = u * tl.load(o_r_ptr + rows, mask=rows < N, other=0.0)[:, None]
        euler += tl.sum(q * u, 1)
    if dq_ptr is not None:
        own = tl.where(q_on_sphere[:, None], q, 0.0)
        g = t * (u - share[:, None] * (k - own))
        dq = _jacobian(g, q, q_inverse, q_on_sphere, factor)
        store_rows(dq_ptr, D, rows, N, at, dq, D)
    u = tl.zeros((BM, BD), tl.float32)
    if u_k_ptr is not None:
        u = _sum_of_parts(
            u_k_ptr, u_stride, k_part_stride, k_parts, rows, N, at, D, BM, BD
        )  # fmt: skip
        if STACKED:
            euler = 0.5 * (euler + tl.sum(k * u, 1))
    if dk_ptr is not None:
        own = tl.where(k_on_sphere[:, None], k, 0.0)
        g = t * (u - share[:, None] * (q - own))
        dk = _jacobian(g, k, k_inverse, k_on_sphere, factor)
        store_rows(dk_ptr, D, rows, N, at, dk, D)
    if dscale_ptr is not None:
        cosine = tl.load(cosine_ptr + rows, mask=rows < N, other=0.0)
        tl.store(dscale_ptr + rows, (euler - share * cosine) * factor, mask=rows < N)


@triton.jit
def back_negatives(
    x_ptr, u_ptr, dx_ptr, factor, scale, scale_ptr, N, x_stride, u_stride, parts, part_stride,
    D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, NORMALIZE: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """Rows that are nobody's positive: dx = factor J t u."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    at = tl.arange(0, BD)
    t = scale_of(scale, scale_ptr, RECIPROCAL)
    x = load_rows(x_ptr, x_stride, rows, N, at, D, BD).to(tl.float32)
    inverse, on_sphere = _norm(x, NORMALIZE)
    u = _sum_of_parts(u_ptr, u_stride, part_stride, parts, rows, N, at, D, BM, BD)
    dx = _jacobian(t * u, x * inverse[:, None], inverse, on_sphere, factor)
    store_rows(dx_ptr, D, rows, N, at, dx, D)
