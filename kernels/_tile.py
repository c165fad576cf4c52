"""What the pair kernels share: rows in tiles, products, the skip rules, exponents in base 2.

A tile is BM rows times BN columns of `s_ij = t <q_i, k_j>`; q and k are read in chunks of BD of
their width D. Exponents are kept in units of log 2 (`x = s log2 e`), as the hardware raises 2.
Indices are widened before they meet a stride: N x D may pass 2^31.
"""

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NONE, DIAGONAL, TWINS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# How exponents find their maximum: on the way, or known beforehand (`known_maximum`). ASKED: only
# the device has read the scale; both ways are launched, and the one that does not serve returns.
ONLINE, KNOWN = tl.constexpr(0), tl.constexpr(1)
SKIPS = {"none": 0, "diagonal": 1, "twins": 2}


@triton.jit
def scale_of(scale, scale_ptr, RECIPROCAL: tl.constexpr):
    """`t`: the number, times or divided by the tensor, which is read here and not on the host."""
    t = scale
    if scale_ptr is not None:
        value = tl.load(scale_ptr).to(tl.float32)
        t = t / value if RECIPROCAL else t * value
    return t


@triton.jit
def load_rows(ptr, stride, rows, n_rows, at, D: tl.constexpr, BD: tl.constexpr):
    """(rows, BD): columns `at` of those rows, 0 outside."""
    places = ptr + rows.to(tl.int64)[:, None] * stride + at[None, :]
    if D % BD == 0:
        return tl.load(places, mask=rows[:, None] < n_rows, other=0.0)
    return tl.load(places, mask=(rows[:, None] < n_rows) & (at[None, :] < D), other=0.0)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32. The interpreter multiplies bfloat16 wrongly: cast, it is exact."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def weighted_rows(g, k, acc, PRECISION: tl.constexpr):
    """acc + g k, the weights rounded to the type of k. float16 has no range for weights: tf32 does,
    and is as exact."""
    if k.dtype == tl.float16:
        return product(g, k.to(tl.float32), acc, "tf32")
    return product(g.to(k.dtype), k, acc, PRECISION)


@triton.jit
def dots(
    q_ptr, q_stride, rows, N, k_ptr, k_stride, cols, M,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """<q_i, k_j>, (BM, BN), over the whole width."""
    s = tl.zeros((BM, BN), tl.float32)
    for d in range(0, D, BD):
        at = d + tl.arange(0, BD)
        q = load_rows(q_ptr, q_stride, rows, N, at, D, BD)
        k = load_rows(k_ptr, k_stride, cols, M, at, D, BD)
        s = product(q, tl.trans(k), s, PRECISION)
    return s


@triton.jit
def similarities(
    q, k, q_ptr, q_stride, rows, N, k_ptr, k_stride, cols, M,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """<q_i, k_j> from the tiles q and k where they hold the whole width, else chunk by chunk."""
    if D <= BD:
        return product(q, tl.trans(k), tl.zeros((BM, BN), tl.float32), PRECISION)
    return dots(q_ptr, q_stride, rows, N, k_ptr, k_stride, cols, M, D, BM, BN, BD, PRECISION)


@triton.jit
def known_maximum(t, n):
    """Of unit rows |s| <= |t|: whether e^(s - c) serves all n of them without a maximum of their
    own, and that c. Single terms stay above e^-80, sums of n and their inverses within float32.
    Rounded to bfloat16, a unit row may be longer by 2^-8."""
    bound = tl.abs(t) * 1.008
    known = (2.0 * bound + tl.log(n * 1.0) <= 140.0) & (t > 0)
    return known, bound - tl.maximum(2.0 * bound - 80.0, 0.0)


@triton.jit
def start(scale, scale_ptr, n, RECIPROCAL: tl.constexpr, MAXIMUM: tl.constexpr):
    """What sweeps with sums of n exponentials start from: t, the maximum in base 2 if it is known,
    and whether MAXIMUM is the way that serves this t."""
    t = scale_of(scale, scale_ptr, RECIPROCAL)
    known, zero = known_maximum(t, n)
    return t, zero * LOG2E, known == (MAXIMUM == KNOWN)


@triton.jit
def inverses(ptr, at, n):
    """What rows `at` are multiplied by, 0 outside; 1 where `ptr` is None, which nothing reads."""
    if ptr is not None:
        return tl.load(ptr + at, mask=at < n, other=0.0)
    return tl.full(at.shape, 1.0, tl.float32)


@triton.jit
def exponents(s, t, ptr, row_inverse, col_inverse):
    """s t in units of log 2; with `ptr` of rows that are to have length 1."""
    if ptr is not None:
        return s * (row_inverse * (t * LOG2E))[:, None] * col_inverse[None, :]
    return s * (t * LOG2E)


@triton.jit
def weighted_units(g, k, ptr, col_inverse, acc, PRECISION: tl.constexpr):
    """acc + g k; with `ptr` of rows k that are to have length 1."""
    if ptr is not None:
        g = g * col_inverse[None, :]
    return weighted_rows(g, k, acc, PRECISION)


@triton.jit
def leave_out(
    x, rows, cols, N, M, offset, row_ids_ptr, col_ids_ptr, SKIP: tl.constexpr,
):  # fmt: skip
    """-inf past the last column and where the skip rule says so: before the exponential."""
    out = cols[None, :] >= M
    own = rows[:, None] + offset
    if SKIP == DIAGONAL:
        out |= cols[None, :] == own
    if SKIP == TWINS:
        twin = tl.where(own < M // 2, own + M // 2, own - M // 2)
        out |= (cols[None, :] == own) | (cols[None, :] == twin)
    if row_ids_ptr is not None:
        row_ids = tl.load(row_ids_ptr + rows, mask=rows < N, other=0)
        col_ids = tl.load(col_ids_ptr + cols, mask=cols < M, other=0)
        out |= row_ids[:, None] == col_ids[None, :]
    return tl.where(out, -float("inf"), x)


@triton.jit
def finite_or_zero(x):
    """A reference point for exponents whose maximum is x: any number will do where all are -inf."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def add_exponents(x, top, total):
    """Running maximum and sum of 2^(x - maximum) of each row. NaN arrives through the sum."""
    now = tl.maximum(top, tl.max(x, 1))
    zero = finite_or_zero(now)
    e = tl.exp2(x - zero[:, None])
    keep = tl.exp2(finite_or_zero(top) - zero)
    keep = tl.where(top == -float("inf"), 0.0, keep)
    return e, now, total * keep + tl.sum(e, 1), keep


@triton.jit
def add_part(top_ptr, total_ptr, place, mask, top, total):
    """Maximum and sum of 2^(x - maximum) of each row so far, and of a part more; the maximum of
    that part too. A part whose sum is 0 has seen no column; its maximum may be anything."""
    sums = tl.load(total_ptr + place, mask=mask, other=0.0)
    here = tl.load(top_ptr + place, mask=mask, other=-float("inf"))
    here = tl.where(sums == 0.0, -float("inf"), here)
    now = tl.maximum(top, here)
    zero = finite_or_zero(now)
    before = tl.where(total == 0.0, 0.0, total * tl.exp2(finite_or_zero(top) - zero))
    more = tl.where(sums == 0.0, 0.0, sums * tl.exp2(finite_or_zero(here) - zero))
    return now, before + more, here


@triton.jit
def first_top(zero, BM: tl.constexpr, MAXIMUM: tl.constexpr):
    """What the running maximum of BM rows starts from."""
    if MAXIMUM == KNOWN:
        return tl.zeros((BM,), tl.float32) + zero
    return tl.full((BM,), -float("inf"), tl.float32)


@triton.jit
def accumulate(x, top, total, zero, MAXIMUM: tl.constexpr):
    """2^(x - maximum), the maximum and the sum of each row, and what earlier sums were multiplied
    by; `zero` is the maximum where it is known."""
    if MAXIMUM == KNOWN:
        e = tl.exp2(x - zero)
        return e, top, total + tl.sum(e, 1), tl.full(total.shape, 1.0, tl.float32)
    return add_exponents(x, top, total)


@triton.jit
def log1p(e):
    """log(1 + e) for 0 <= e <= 1 with all its digits: what 1 + e rounds away is put back."""
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def softplus_and_sigmoid(x):
    """log(1 + e^x) and its slope; NaN stays."""
    e = tl.exp(-tl.abs(x))
    sigmoid = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    return tl.where(x > 0, x, 0.0) + log1p(e), sigmoid


@triton.jit
def log_of(top, total):
    """The log-sum-exp, in natural units: -inf where nothing was added."""
    return tl.where(total == 0.0, -float("inf"), (finite_or_zero(top) + tl.log2(total)) * LN2)


@triton.jit
def store_rows(ptr, stride, rows, n_rows, at, values, D: tl.constexpr):
    """(rows, BD) to columns `at` of those rows."""
    places = ptr + rows.to(tl.int64)[:, None] * stride + at[None, :]
    tl.store(places, values, mask=(rows[:, None] < n_rows) & (at[None, :] < D))
