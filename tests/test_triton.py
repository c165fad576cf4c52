"""The Triton kernels against the float64 specification: on a GPU, or by Triton's interpreter.

The interpreter's float32-to-bfloat16 store truncates, where a GPU rounds: bfloat16 limits are twice
those of the design there.
"""

import functools
import importlib
import math
import os
import subprocess
import sys

import operator_parts
import pytest
import torch
import triton
import triton.language as tl
from dense import error
from torch._subclasses import FakeTensorMode

from clae_fast import (
    clip_loss,
    dcl_loss,
    hard_negative_loss,
    info_nce_loss,
    nt_xent_loss,
    reference,
    siglip_loss,
    sup_con_loss,
    triton_backend,
    uel_loss,
    use_backend,
    value_and_grad,
)
from clae_fast.kernels import _launch, two_sided, wide
from clae_fast.ops import raw

pytestmark = pytest.mark.gpu
GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One row; odd; several tiles of 32, several chunks of the width, and the columns split.
SHAPES = [(1, 2, 3), (9, 10, 5), (33, 140, 70)]
SKIPS = ["none", "diagonal", "diagonal+2", "twins", "ids", "twins+ids"]
GRADIENT = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3 if GPU else 1e-2}


@pytest.fixture(autouse=True)
def _device():
    """On the GPU where there is one."""
    if GPU:
        torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _nothing_is_left_unwritten():
    """Memory that is not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def operands(N, M, D, dtype, skip="none"):
    q, k = torch.randn(N, D).to(dtype), torch.randn(M, D).to(dtype)
    rule, _, extra = skip.partition("+")
    options = {}
    if rule in ("diagonal", "twins"):
        options = {"skip": rule, "offset": int(extra) if extra.isdigit() else 0}
    if "ids" in skip:
        options |= {
            "row_ids": apart(torch.arange(N, dtype=torch.int32) % 3),
            "col_ids": apart(torch.arange(M, dtype=torch.int32) % 4),
        }
    return q, k, options


def apart(x):
    """The same numbers, not side by side: a column of a matrix, as the upstream gradients of a loss
    with two directions are."""
    return torch.stack((x, torch.full_like(x, 77)), 1)[:, 0]


def truth(op, *args, **kwargs):
    """The specification in float64, on what the kernel was given."""

    def wide(x):
        floating = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.double() if floating else x

    named = {name: wide(x) for name, x in kwargs.items()}
    return getattr(reference, op)(*(wide(x) for x in args), **named)


def both(op, *args, **kwargs):
    out = getattr(raw, op)(*args, **kwargs, backend="triton")
    expected = truth(op, *args, **kwargs)
    return (out, expected) if isinstance(out, tuple) else ((out,), (expected,))


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_lse_and_mean(skip, shape, dtype):
    q, k, options = operands(*shape, dtype, skip)
    (lse,), (expected,) = both("pair_lse", q, k, 0.7, **options)
    assert torch.equal(lse == -math.inf, expected == -math.inf)
    assert error(lse[lse.isfinite()], expected[lse.isfinite()]) < 2e-6
    (again, o), (_, mean) = both("pair_mean", q, k, 0.7, **options)
    assert error(again[lse.isfinite()], expected[lse.isfinite()]) < 2e-6
    assert error(o, mean) < GRADIENT[dtype]


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("given", ["rows", "columns", "both", "neither"])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_grad(skip, given, shape, dtype):
    q, k, options = operands(*shape, dtype, skip)
    if given in ("rows", "both"):
        lse = reference.pair_lse(q.float(), k.float(), 0.7, **options)
        options = options | {"row_lse": apart(lse), "row_weight": apart(torch.randn(len(q)))}
    if given in ("columns", "both"):
        numbers = {"col_lse": torch.randn(len(k)) + 5, "col_weight": torch.rand(len(k))}
        options = options | {name: apart(x) for name, x in numbers.items()}
    (dq,), (expected,) = both("pair_grad", q, k, 0.7, **options)
    assert error(dq, expected) < GRADIENT[dtype]


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 9, 5), (70, 140, 40)])  # two parts
def test_sigmoid(with_ids, need, shape, dtype):
    q, k, options = operands(*shape, dtype, "ids" if with_ids else "none")
    out, expected = both(
        "pair_sigmoid", q, k, 0.7, -1.5, **options, row_weight=apart(torch.rand(len(q))),
        bias_tensor=torch.tensor(0.25), need_dq=need[0], need_dk=need[1],
    )  # fmt: skip
    for got, ref, limit in zip(
        out, expected, (2e-6, 2e-5, GRADIENT[dtype], GRADIENT[dtype]), strict=True
    ):
        assert error(got, ref) < limit


@pytest.mark.parametrize("m", [1.0, 2.5])
@pytest.mark.parametrize("t", [2.0, 15.0, 80.0])
@pytest.mark.parametrize("shape", [(2, 4), (10, 5), (126, 40)])  # two parts
def test_uel(m, t, shape, dtype):
    q = torch.nn.functional.normalize(torch.randn(shape), dim=1).to(dtype)
    weight = apart(torch.rand(len(q)))
    (loss, dq), (expected, dq_ref) = both(
        "pair_uel", q, q, t, m, row_weight=weight, need_dq=True
    )  # fmt: skip
    plain = reference.pair_uel(q.float(), q.float(), t, m, row_weight=weight, need_dq=True)
    assert error(loss, expected) < max(2e-6, 1e-7 * t, 3 * error(plain[0], expected))
    assert error(dq, dq_ref) < max(GRADIENT[dtype], 3 * error(plain[1], dq_ref))


ROWS = {
    "clip": functools.partial(clip_loss, logit_scale=15.0, normalize=True, reduction="none"),
    "symmetric": functools.partial(info_nce_loss, symmetric=True, reduction="none"),
    "nt_xent": functools.partial(nt_xent_loss, reduction="none"),
    "uel": functools.partial(uel_loss, reduction="none"),
}


@pytest.mark.parametrize("loss", ROWS)
def test_losses_of_rows_under_any_upstream_gradient(loss):
    q = torch.randn(40, 33)
    k = q + torch.randn(40, 33)
    upstream, found = None, []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        xs = [x.clone().to(dtype).requires_grad_() for x in (q, k)]
        rows = ROWS[loss](*xs, backend=backend)
        upstream = torch.randn(rows.shape) if upstream is None else upstream
        rows.backward(upstream.to(dtype))
        found.append((rows.detach(), *(x.grad for x in xs)))
    for got, expected in zip(*found, strict=True):
        assert error(got, expected) < 2e-5


def _ids(x):
    return torch.arange(len(x)) % 7


COMPOSED = {
    "siglip": lambda x, y, e, o: siglip_loss(x, y, 5.0, -2.0, positive_ids=_ids(x), **o),
    "sup_con": lambda x, y, e, o: sup_con_loss(torch.cat((x, y)), _ids(torch.cat((x, y))), **o),
    "dcl": lambda x, y, e, o: dcl_loss(x, y, extra_negatives=e, **o),
    "hard_negative": lambda x, y, e, o: hard_negative_loss(x, y, ids=_ids(x), **o),
    "nt_xent": lambda x, y, e, o: nt_xent_loss(
        x, y, ids=_ids(x), extra_negatives=e, label_smoothing=0.1, **o
    ),
    "symmetric": lambda x, y, e, o: info_nce_loss(
        x, y, symmetric=True, query_ids=_ids(x), key_ids=_ids(x), **o
    ),
    "queue": lambda x, y, e, o: info_nce_loss(
        x, y, e, query_ids=_ids(x), key_ids=_ids(e), sample_weight=_ids(x), **o
    ),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("loss", COMPOSED)
def test_losses_composed_of_sweeps(loss, reduction):
    """Their glue hands the kernels ids, scales by pointer, rows and columns of other lengths."""
    q = torch.randn(40, 33)
    inputs = (q, q + torch.randn(40, 33), torch.randn(70, 33))
    upstream, found = None, []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        xs = [x.clone().to(dtype).requires_grad_() for x in inputs]
        out = COMPOSED[loss](*xs, {"reduction": reduction, "backend": backend})
        upstream = torch.randn(out.shape) if upstream is None else upstream
        grads = torch.autograd.grad(out, xs, upstream.to(dtype), materialize_grads=True)
        found.append((out.detach(), *grads))
    for got, expected in zip(*found, strict=True):
        assert error(got, expected) < 2e-5


@pytest.mark.parametrize("loss", ["nt_xent", "clip", "queue"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_16_bits_are_not_rounded_again(loss, dtype):
    """Of aligned pairs at a small temperature the loss is that of the very rows."""
    q = torch.randn(37, 100)
    noise = 0.02 if dtype == torch.bfloat16 else 2.0  # gradients in float16 have a range
    k = (q + noise * torch.randn(37, 100)).to(dtype)
    q, more = q.to(dtype), torch.randn(50, 100).to(dtype)
    call = {
        "nt_xent": functools.partial(nt_xent_loss, temperature=0.05),
        "clip": functools.partial(clip_loss, logit_scale=20.0, normalize=True),
        "queue": functools.partial(info_nce_loss, negative_keys=more, temperature=0.05),
    }[loss]
    value, grads = value_and_grad(functools.partial(call, backend="triton"))(q, k)
    if loss == "queue":
        call = functools.partial(call, negative_keys=more.double())
    expected, refs = value_and_grad(functools.partial(call, backend="reference"))(
        q.double(), k.double()
    )
    assert error(value, expected) < 1e-5
    for got, ref in zip(grads, refs, strict=True):
        assert error(got, ref) < GRADIENT[dtype]


FORMS = ["nt_xent", "one_way", "queue", "two_way"]
NEEDS = [
    (False, False, False, False),
    (True, False, False, False),
    (False, True, False, False),
    (False, False, True, False),
    (False, False, False, True),
    (True, True, True, True),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("need", NEEDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", [(1, 4, 3), (40, 33, 70)])
def test_contrast(form, need, normalize, shape, dtype):
    B, D, M = shape
    q, k, n = (torch.randn(rows, D).to(dtype) for rows in (B, B, M))
    negatives, form = (n, "one_way") if form == "queue" else (None, form)
    t = 3.0 if normalize else 0.5
    for reduction in ("none", "mean", "sum"):
        out, expected = both(
            "contrast", q, k, negatives, t, None, False, form, normalize, *need, reduction
        )
        # unit rows are rounded to the type of the input
        rounded = 2e-6 if dtype == torch.float32 or not normalize else GRADIENT[dtype]
        for got, ref, limit in zip(
            out, expected, [rounded] * 3 + [GRADIENT[dtype]] * 4, strict=True
        ):
            if got.numel() and ref.isfinite().all():
                # dscale is a sum that nearly cancels: against its largest terms
                assert error(got, ref, floor=1.0 if got.numel() == 1 else 1e-6) < limit
            assert got.shape == ref.shape


@pytest.mark.parametrize("form", ["nt_xent", "two_way", "queue"])
@pytest.mark.parametrize("t", [3.0, 60.0, 75.0, 300.0, -3.0])
@pytest.mark.parametrize("by_pointer", [False, True])
@pytest.mark.parametrize("B", [1, 5, 64, 70])  # of 64 also the columns are split
def test_known_maximum(form, t, by_pointer, B, monkeypatch):
    """Sums on the upper triangle, exponentials that serve rows and columns; the device decides
    where it alone knows the scale. Past 2 t + ln n = 140 every row has its own maximum."""
    monkeypatch.setattr(_launch, "MANY", 0)
    q = torch.randn(B, 20)
    k = q + 0.3 * torch.randn(B, 20) if B > 5 else torch.randn(B, 20)
    negatives, form = (torch.randn(70, 20), "one_way") if form == "queue" else (None, form)
    scale = (1.0, torch.tensor(t), False) if by_pointer else (t, None, False)
    out, expected = both("contrast", q, k, negatives, *scale, form, True, *(True,) * 4)
    plain = reference.contrast(q, k, negatives, *scale, form, True, *(True,) * 4)
    limits = [max(2e-6, 1e-7 * abs(t))] * 3 + [2e-5] * 4
    for got, ref, least, limit in zip(out, expected, plain, limits, strict=True):
        if got.numel() and ref.isfinite().all():
            floor = 1.0 if got.numel() == 1 else 1e-6
            bound = max(limit, 3 * error(least, ref, floor=floor))
            assert error(got, ref, floor=floor) < bound
        assert torch.equal(got.isfinite(), ref.isfinite())


@pytest.mark.parametrize("shape", [(64, 20), (300, 128), (70, 300)])
def test_either_half_has_the_same_bits_alone(shape, dtype):
    """Of stacked views, whose gradients come from one sweep where both are wanted."""
    q, k = (torch.randn(shape).to(dtype) for _ in range(2))
    *_, dq, dk, _, _ = raw.contrast(q, k, None, 5.0, need_dq=True, need_dk=True, backend="triton")
    assert torch.equal(raw.contrast(q, k, None, 5.0, need_dq=True, backend="triton")[3], dq)
    assert torch.equal(raw.contrast(q, k, None, 5.0, need_dk=True, backend="triton")[4], dk)


def test_which_maximum_is_known():
    """What the host says of a number, the device says of a tensor; both leave room to the limit."""
    online, known, n = ((0, False),), ((1, False),), 8192
    for scale, expected in (
        (10.0, known), (64.0, known), (66.0, online), (-1.0, online), (0.0, online),
        (math.nan, online),
    ):  # fmt: skip
        assert _launch.ways(scale, None, n, n, True) == expected
        assert _launch.ways(scale, None, n, n, False) == online
    t = torch.tensor(1.0)
    assert _launch.ways(1.0, t, n, n, True) == ((1, True), (0, True))
    assert _launch.ways(1.0, t, n, n, False) == online
    assert _launch.ways(1.0, t, 100, n, True) == online  # a launch costs more
    limit = (140 - math.log(n)) / 2.016
    assert _launch.ways(limit * 0.99, None, n, n, True) == known
    assert _launch.ways(limit * 1.001, None, n, n, True) == online


def test_strips_of_the_triangle():
    """Tile `index` of T (T + 1) / 2, row by row, up to the largest number of tiles."""

    @triton.jit
    def strips(out, tiles, first, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(out + at, two_sided._strip_of(first + at, tiles, True))

    for tiles in (1, 2, 3, 7, 1024, 4096):
        count, out = tiles * (tiles + 1) // 2, torch.empty(1024, dtype=torch.int32)
        rows = torch.repeat_interleave(torch.arange(tiles), torch.arange(tiles, 0, -1))
        for first in {0, max(0, count // 2 - 500), max(0, count - 1024)}:
            strips[(1,)](out, tiles, first, 1024)
            expected = rows[first : first + 1024]
            assert torch.equal(out[: len(expected)].long(), expected), tiles


WIDE_NEEDS = [(False, False, False, False), (True, True, True, True)]


@pytest.mark.parametrize("form", ["nt_xent", "one_way", "queue", "two_way"])
@pytest.mark.parametrize("need", WIDE_NEEDS)
@pytest.mark.parametrize("rows", [7, 2048])
def test_wide_rows(form, need, dtype, rows, monkeypatch):
    """Similarities in memory, block by block: of one block, and of many."""
    monkeypatch.setattr(_launch, "FUSED_WIDTH", dict.fromkeys(DTYPES, 16))
    monkeypatch.setattr(wide, "ROWS", rows)
    if rows == 7:
        monkeypatch.setattr(wide, "BLOCK_BYTES", 4 * 7 * 11)
    q, k, n = (torch.randn(rows, 20).to(dtype) for rows in (20, 20, 33))
    negatives, form = (n, "one_way") if form == "queue" else (None, form)
    out, expected = both("contrast", q, k, negatives, 3.0, None, False, form, True, *need)
    rounded = 2e-6 if dtype == torch.float32 else GRADIENT[dtype]
    limits = [rounded] * 3 + [GRADIENT[dtype]] * 3 + [2 * GRADIENT[dtype]]  # dscale cancels
    for got, ref, limit in zip(out, expected, limits, strict=True):
        if got.numel():
            assert error(got, ref) < limit
        assert got.shape == ref.shape


@pytest.mark.parametrize("skip", SKIPS)
def test_wide_sweeps(skip, monkeypatch):
    monkeypatch.setattr(_launch, "FUSED_WIDTH", dict.fromkeys(DTYPES, 16))
    monkeypatch.setattr(wide, "ROWS", 7)
    monkeypatch.setattr(wide, "BLOCK_BYTES", 4 * 7 * 11)
    q, k, options = operands(9, 24, 20, torch.float32, skip)
    t = torch.tensor(0.5)
    (lse, o), expected = both("pair_mean", q, k, 2.0, t, **options)
    assert torch.equal(lse.isfinite(), expected[0].isfinite())
    assert error(lse[lse.isfinite()], expected[0][lse.isfinite()]) < 2e-6
    assert error(o, expected[1]) < 2e-5
    given = {"row_lse": lse, "row_weight": torch.randn(9), "col_lse": torch.randn(24) + 5,
             "col_weight": torch.rand(24)}  # fmt: skip
    (dq,), (ref,) = both("pair_grad", q, k, 2.0, t, **options, **given)
    assert error(dq, ref) < 2e-5
    assert (raw.pair_lse(q, k[:0], 1.0, backend="triton") == -math.inf).all()


@pytest.mark.parametrize("reciprocal", [False, True])
def test_scale_by_pointer(reciprocal):
    q, k, _ = operands(9, 10, 5, torch.float32)
    for value in (torch.tensor([4.0]), torch.tensor(4.0, dtype=torch.float64)):
        (lse,), (expected,) = both("pair_lse", q, k, 2.0, value, reciprocal)
        assert error(lse, expected) < 2e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", ["nt_xent", "one_way", "two_way"])
@pytest.mark.parametrize("normalize", [True, False])
def test_nan_and_inf_are_seen(bad, form, normalize):
    q, k = torch.randn(6, 5), torch.randn(6, 5)
    k[2, 3] = bad
    loss = raw.contrast(q, k, None, 2.0, form=form, normalize=normalize, reduction="mean",
                        backend="triton")[0]  # fmt: skip
    assert not loss.isfinite()


def test_zero_rows_and_strides():
    """A zero vector normalises to zero and has gradient 0; rows may lie apart, or be transposed."""
    q, k = torch.randn(12, 10)[::2, :5], torch.randn(5, 6).T
    q[1] = 0
    out, expected = both("contrast", q, k, None, 3.0, None, False, "nt_xent", True, True, True)
    assert error(out[0], expected[0]) < 2e-6
    assert error(out[3], expected[3]) < 2e-5
    assert (out[3][1] == 0).all()


def test_nothing_allowed():
    q, k = torch.randn(3, 4), torch.randn(2, 4)
    ids = {"row_ids": torch.zeros(3, dtype=torch.int32), "col_ids": torch.zeros(2).int()}
    lse, o = raw.pair_mean(q, k, 1.0, **ids, backend="triton")
    assert (lse == -math.inf).all()
    assert (o == 0).all()
    assert (raw.pair_lse(q, k[:0], 1.0, backend="triton") == -math.inf).all()


def test_losses_and_gradients_through_it():
    z_i, z_j = torch.randn(12, 8), torch.randn(12, 8)
    for loss in (nt_xent_loss, uel_loss, functools.partial(nt_xent_loss, reduction="sum")):
        with use_backend("triton"):
            value, grads = value_and_grad(loss)(z_i, z_j)
        with use_backend("reference"):
            expected, refs = value_and_grad(loss)(z_i.double(), z_j.double())
        assert error(value, expected) < 2e-6
        for got, ref in zip(grads, refs, strict=True):
            assert error(got, ref) < 2e-5


def test_the_same_bits_twice():
    q, k, _ = operands(33, 300, 70, torch.float32)
    first = raw.contrast(q, q + 1, k, 3.0, form="one_way", need_dq=True, need_dnegatives=True,
                         backend="triton")  # fmt: skip
    again = raw.contrast(q, q + 1, k, 3.0, form="one_way", need_dq=True, need_dnegatives=True,
                         backend="triton")  # fmt: skip
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------------- host side


CALLS = {
    "pair_lse": lambda f, q, k: f(q, k, 0.7, skip="twins"),
    "pair_mean": lambda f, q, k: f(q, k, 0.7),
    "pair_grad": lambda f, q, k: f(q, k, 0.7, row_lse=q[:, 0], row_weight=q[:, 0]),
    "pair_sigmoid": lambda f, q, k: f(q, k, 0.7, -1.0, need_dq=True, need_dk=True),
    "pair_uel": lambda f, q, k: f(q, q, 0.7, 1.0, need_dq=True),
    "contrast": lambda f, q, k: f(q, q, k, 0.7, form="one_way", need_dq=True, need_dk=True,
                                  need_dnegatives=True, need_dscale=True, reduction="mean"),
}  # fmt: skip


@pytest.mark.parametrize("op", triton_backend.OPERATORS)
def test_launches_with_fake_tensors(op, dtype):
    """Every launch binds its kernel's arguments; shapes and dtypes are the operator's own."""
    host = getattr(importlib.import_module(f"clae_fast.kernels.{op}"), op)
    with FakeTensorMode():
        q, k = (torch.empty(n, 40, dtype=dtype) for n in (50, 600))
        got = CALLS[op](host, q, k)
        expected = CALLS[op](getattr(raw, op), q, k)
    got, expected = (x if isinstance(x, tuple) else (x,) for x in (got, expected))
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_refusals():
    q = torch.randn(4, 3)
    for x, why in (
        (q.double(), "it knows float32, bfloat16 and float16, the embeddings are torch.float64"),
        (torch.randn(2, 2049), "at most 2048 elements a row, the embeddings have 2049"),
    ):
        with pytest.raises(RuntimeError, match=why):
            raw.pair_lse(x, x, 1.0, backend="triton")
    with pytest.raises(ValueError, match="skip must be 'none'.*got 'self'"):
        raw.pair_lse(q, q, 1.0, skip="self", backend="triton")
    with pytest.raises(ValueError, match="form must be 'nt_xent'.*got 'clip'"):
        raw.contrast(q, q, None, 1.0, form="clip", backend="triton")


@pytest.mark.skipif(GPU, reason="a GPU is here")
def test_without_a_gpu_triton_is_not_imported():
    code = (
        "import sys, torch, clae_fast; z = torch.randn(4, 3); clae_fast.nt_xent_loss(z, z); "
        "print(clae_fast.available_backends()['contrast']['triton'], 'triton' in sys.modules)"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert out.startswith("no GPU here")
    assert out.strip().endswith("False")


def test_parts_of_the_rows():
    operator_parts.uel("triton", torch.float32, 3e-5)
    operator_parts.sigmoid("triton", torch.float32, 3e-5)
