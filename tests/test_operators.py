"""The raw operators: dense float64 truth, both derivatives of the reference, and opcheck."""

import math

import operator_parts
import pytest
import torch
from dense import backends_with, error

from clae_fast import reference
from clae_fast.ops import SCHEMAS, raw

BACKENDS = backends_with("pair_lse")
SKIPS = ["none", "diagonal", "diagonal+2", "twins", "ids", "twins+ids"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def case(skip, N=6, M=8, D=5, dtype=torch.float64):
    """q, k, keyword arguments of the skip rule, and the mask of what is left out."""
    g = torch.Generator().manual_seed(N * 100 + M)
    q = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype)
    k = torch.randn(M, D, generator=g, dtype=torch.float64).to(dtype)
    rule, _, extra = skip.partition("+")
    options, offset = {}, int(extra) if extra.isdigit() else 0
    mask = torch.zeros(N, M, dtype=torch.bool)
    row, col = torch.arange(N)[:, None] + offset, torch.arange(M)
    if rule in ("diagonal", "twins"):
        options = {"skip": rule, "offset": offset}
        mask |= col == row
    if rule == "twins":
        mask |= col == (row + M // 2) % M
    if "ids" in skip:
        ids = torch.arange(N, dtype=torch.int32) % 3, torch.arange(M, dtype=torch.int32) % 4
        options |= {"row_ids": ids[0], "col_ids": ids[1]}
        mask |= ids[0][:, None] == ids[1]
    return q, k, options, mask


def similarities(q, k, t, mask):
    return (q.double() @ k.double().T * t).masked_fill(mask, -math.inf)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("shape", [(1, 10, 5), (9, 10, 5), (127, 256, 33), (300, 386, 129)])
@pytest.mark.parametrize("t", [0.7, 20.0])  # with D > 5 the larger one leaves the known range
def test_pair_lse_and_mean(skip, shape, dtype, t, backend):
    N, M, D = shape
    q, k, options, mask = case(skip, N=N, M=M, D=D, dtype=dtype)
    s = similarities(q, k, t, mask)
    tol = 1e-12 if dtype == torch.float64 else 2e-6
    lse = raw.pair_lse(q, k, t, **options, backend=backend)
    assert error(lse, s.logsumexp(1)) < tol
    again, o = raw.pair_mean(q, k, t, **options, backend=backend)
    assert torch.equal(again, lse)
    assert error(o, s.softmax(1) @ k.double()) < 10 * tol * max(1, t)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("given", ["rows", "columns", "both", "neither"])
@pytest.mark.parametrize("shape", [(6, 8, 5), (300, 386, 129)])
def test_pair_grad(skip, given, shape, backend):
    N, M, D = shape
    q, k, options, mask = case(skip, N, M, D)
    s = similarities(q, k, 0.7, mask)
    lse = s.logsumexp(1), s.logsumexp(0)
    weight = torch.randn(N, dtype=torch.float64), torch.randn(M, dtype=torch.float64)
    g = torch.zeros_like(s)
    if given in ("rows", "both"):
        g += weight[0][:, None] * (s - lse[0][:, None]).exp()
        options |= {"row_lse": lse[0], "row_weight": weight[0]}
    if given in ("columns", "both"):
        g += weight[1] * (s - lse[1]).exp()
        options |= {"col_lse": lse[1], "col_weight": weight[1]}
    assert error(raw.pair_grad(q, k, 0.7, **options, backend=backend), 0.7 * g @ k) < 1e-12


def test_nothing_allowed(backend):
    """-inf, 0 and 0; a column that no row allows adds nothing."""
    q, k = torch.randn(3, 4), torch.randn(2, 4)
    ids = torch.zeros(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    options = {"row_ids": ids[0], "col_ids": ids[1]}
    options["backend"] = backend
    lse, o = raw.pair_mean(q, k, 1.0, **options)
    assert (lse == -math.inf).all()
    assert (o == 0).all()
    empty = torch.full((3,), -math.inf), torch.full((2,), -math.inf)
    dq = raw.pair_grad(
        q, k, 1.0, row_lse=empty[0], row_weight=torch.ones(3), col_lse=empty[1],
        col_weight=torch.ones(2), **options,
    )  # fmt: skip
    assert (dq == 0).all()
    assert (raw.pair_lse(q, k[:0], 1.0, backend=backend) == -math.inf).all()


def test_unknown_words(backend):
    q = torch.randn(4, 3)
    with pytest.raises(ValueError, match="skip must be 'none'.*got 'self'"):
        raw.pair_lse(q, q, 1.0, skip="self", backend=backend)
    with pytest.raises(ValueError, match="form must be 'nt_xent'.*got 'clip'"):
        raw.contrast(q, q, None, 1.0, form="clip", backend=backend)


@pytest.mark.parametrize("reciprocal", [False, True])
def test_scale_by_pointer(reciprocal, backend):
    q, k, _, mask = case("none")
    scale_tensor = torch.tensor([4.0])
    t = 2.0 / 4.0 if reciprocal else 2.0 * 4.0
    lse = raw.pair_lse(q, k, 2.0, scale_tensor, reciprocal, backend=backend)
    assert error(lse, similarities(q, k, t, mask).logsumexp(1)) < 1e-12


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("shape", [(6, 8, 5), (7, 6, 3), (300, 386, 129), (386, 300, 40)])
def test_pair_sigmoid(with_ids, shape, backend):
    N, M, D = shape
    q, k, _, _ = case("none", N, M, D)
    leaves = [x.requires_grad_() for x in (q, k)]
    b = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(N, dtype=torch.float64)
    y = 2 * torch.eye(N, M, dtype=torch.float64) - 1
    pairs = torch.nn.functional.softplus(-y * (q @ k.T * 0.7 + b), threshold=1e4)
    options = {"backend": backend}
    if with_ids:
        options |= {"row_ids": torch.arange(N, dtype=torch.int32) % 3,
                    "col_ids": torch.arange(M, dtype=torch.int32) % 3}  # fmt: skip
        same = options["row_ids"][:, None] == options["col_ids"]
        pairs = pairs.masked_fill(same & (y < 0), 0)
    ref = pairs.sum(1)
    grads = torch.autograd.grad((weight * ref).sum(), [*leaves, b])
    with torch.no_grad():
        for need_dq, need_dk in ((True, True), (True, False), (False, True), (False, False)):
            loss, g, dq, dk = raw.pair_sigmoid(
                q, k, 0.7, -0.3, row_weight=weight, need_dq=need_dq, need_dk=need_dk, **options
            )
            assert error(loss, ref) < 1e-12
            assert error(g.sum(), grads[2]) < 1e-11
            for asked, x, truth in ((need_dq, dq, grads[0]), (need_dk, dk, grads[1])):
                if asked:
                    assert error(x, truth) < 1e-12
                else:
                    assert x.numel() == 0
        split = raw.pair_sigmoid(
            q, k, 0.7, 0.0, bias_tensor=b.detach().float().reshape(1), **options
        )
    assert error(split[0], ref) < 1e-7


@pytest.mark.parametrize("bias", [-10.0, 0.0, 4.0])
def test_small_sigmoid_losses_keep_their_digits(bias, backend):
    """SigLIP starts at bias -10: every pair's loss is about e^-10, far below 1."""
    q, k = (torch.nn.functional.normalize(torch.randn(200, 40), dim=1) for _ in range(2))
    y = 2 * torch.eye(200, dtype=torch.float64) - 1
    x = -y * (q.double() @ k.double().T * 10 + bias)
    ref = torch.nn.functional.softplus(x, threshold=1e4).sum(1)
    loss, g, *_ = raw.pair_sigmoid(q, k, 10.0, bias, backend=backend)
    assert error(loss, ref) < 2e-6
    assert error(g, (-y * torch.sigmoid(x)).sum(1)) < 2e-6


@pytest.mark.parametrize("chunk", [1 << 22, 7])
def test_both_derivatives_of_the_reference(chunk, monkeypatch):
    """gradcheck and gradgradcheck, in one piece and recomputed chunk by chunk."""
    monkeypatch.setattr("clae_fast.reference.sweep.CHUNK_ELEMENTS", chunk)
    t = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    q, k, n = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    lse, weight = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    functions = {
        "pair_lse": (lambda q, k, t: reference.pair_lse(q, k, 1.0, t, True, "twins"), (q, k, t)),
        "pair_mean": (lambda q, k, t: reference.pair_mean(q, k, 1.0, t, True, "twins"), (q, k, t)),
        "pair_grad": (
            lambda q, k, t, a, w: reference.pair_grad(
                q, k, 1.0, t, True, "diagonal", 0, a, w, a, w
            ),
            (q, k, t, lse, weight),
        ),
        "pair_sigmoid": (
            lambda q, k, t: reference.pair_sigmoid(q, k, 1.0, -0.5, t, need_dq=True, need_dk=True),
            (q, k, t),
        ),
        "pair_uel": (lambda q, t: reference.pair_uel(q, k, 1.0, 1.5, t, True)[0], (q, t)),
    }
    for form in ("nt_xent", "one_way", "two_way"):
        functions[form] = (
            lambda q, k, t, form=form: reference.contrast(q, k, None, 1.0, t, True, form).loss,
            (q, k, t),
        )
    functions["queue"] = (
        lambda q, k, n, t: reference.contrast(q, k, n, 1.0, t, False, "one_way").loss,
        (q, k, n, t),
    )
    functions["raw rows"] = (
        lambda q, k, t: reference.contrast(q, k, None, 1.0, t, True, "two_way", False).loss,
        (q, k, t),
    )
    for name, (fn, args) in functions.items():
        assert torch.autograd.gradcheck(fn, args), name
        assert torch.autograd.gradgradcheck(fn, args), name


FORMS = [("nt_xent", False), ("one_way", False), ("one_way", True), ("two_way", False)]


@pytest.mark.parametrize(("form", "queue"), FORMS)
@pytest.mark.parametrize("normalize", [True, False])
def test_contrast_gradients(form, queue, normalize, backend):
    """Every combination of need_*: what is asked for is right, the rest has no elements."""
    torch.manual_seed(1)
    q, k, n = (torch.randn(5, 4, dtype=torch.float64) for _ in range(3))
    negatives = n if queue else None
    scale = torch.tensor([0.8], dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (q, k, n, scale)]
    rows = reference.contrast(
        leaves[0], leaves[1], leaves[2] if queue else None, 1.5, leaves[3], True, form, normalize
    ).loss
    wanted = torch.autograd.grad(rows.sum(), leaves, allow_unused=True)
    t = 1.5 / float(scale)
    wanted = [*wanted[:3], wanted[3] / (-t / scale)]  # d/dt from d/dscale_tensor
    for bits in range(16):
        need = [bool(bits >> i & 1) for i in range(4)]
        out = raw.contrast(
            q, k, negatives, 1.5, scale, True, form, normalize, *need, backend=backend
        )
        assert error(out[0], rows) < 1e-12
        for asked, g, ref in zip(need, out[3:], wanted, strict=True):
            if asked and ref is not None:
                assert error(g, ref) < 1e-11
            else:
                assert g.numel() == 0
    for reduction, factor in (("sum", 1.0), ("mean", 1 / rows.numel())):
        reduced = raw.contrast(
            q, k, negatives, 1.5, scale, True, form, normalize, *need, reduction, backend=backend
        )
        assert error(reduced[0], rows.sum() * factor) < 1e-12
        for a, b in zip(reduced[3:], out[3:], strict=True):
            assert error(a, b * factor) < 1e-12


@pytest.mark.parametrize("N", [5, 150])
@pytest.mark.parametrize("scale", [2.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_uel_with_weights(N, scale, dtype, backend):
    z = torch.randn(2 * N, 9, dtype=torch.float64)
    z = (z / z.norm(dim=1, keepdim=True)).to(dtype)
    weight = torch.randn(2 * N, dtype=torch.float64)
    loss_tol, grad_tol = (1e-10, 1e-9) if dtype == torch.float64 else (1e-5, 1e-4)
    for m in (1.0, 3.0):
        leaf = z.double().requires_grad_()
        rows, _ = reference.pair_uel(leaf, leaf, scale, m)
        (ref,) = torch.autograd.grad((weight * rows).sum(), leaf)
        loss, dq = raw.pair_uel(
            z, z, scale, m, row_weight=weight.to(dtype), need_dq=True, backend=backend
        )
        assert error(loss, rows) < loss_tol
        assert error(dq, ref) < grad_tol
        loss, dq = raw.pair_uel(z, z, scale, m, backend=backend)
        assert error(loss, rows) < loss_tol
        assert dq.numel() == 0


def opcheck_cases():
    q, k, n = torch.randn(4, 3), torch.randn(4, 3), torch.randn(5, 3)
    ids = torch.arange(4, dtype=torch.int32)
    lse, w = torch.randn(4), torch.rand(4)
    t = torch.tensor([2.0])
    x = torch.rand(2, 3, 4, 4)
    yield "pair_lse", (q, n, 2.0), {"skip": "diagonal"}
    yield "pair_lse", (q, k, 1.0, t, True, "twins", 0, ids, ids), {}
    yield "pair_lse", (q.half(), n.half(), 2.0), {"wide": True}
    yield "pair_mean", (q, n, 2.0), {"wide": True}
    yield "pair_grad", (q, k, 2.0, None, False, "twins", 0, lse, w, lse, w), {}
    yield "pair_mean", (q.bfloat16(), n.bfloat16(), 2.0), {}
    yield "pair_sigmoid", (q, n, 2.0, -1.0), {"need_dq": True}
    yield "pair_uel", (q, q, 2.0, 1.0, t), {"need_dq": True, "row_weight": w}
    yield "pair_uel", (q, q, 2.0, 1.0), {}
    for form in ("nt_xent", "one_way", "two_way"):
        yield "contrast", (q, k, None, 2.0, None, False, form, True, True, True, False, False), {}
    yield "contrast", (q.half(), k.half(), n.half(), 1.0, t, True, "one_way", True), {
        "need_dq": True, "need_dk": True, "need_dnegatives": True, "need_dscale": True,
    }  # fmt: skip
    yield "contrast", (q, k, n, 1.0, t, True, "one_way", False), {}
    yield "sign_step", (x, torch.randn_like(x), x, 0.1, 0.1), {}
    yield "sign_step", (x.contiguous(memory_format=torch.channels_last), torch.randn_like(x), x,
                        0.1, 0.1, 0.0), {"high_tensor": torch.rand(3, 1, 1)}  # fmt: skip
    yield "sign_step", (x.transpose(2, 3), x, x, 0.1, 0.1), {"backend": "reference"}


OPCHECK = list(opcheck_cases())


def test_every_operator_is_checked():
    assert {name for name, _, _ in OPCHECK} == set(SCHEMAS)


@pytest.mark.parametrize(
    "index", range(len(OPCHECK)), ids=[f"{i}-{c[0]}" for i, c in enumerate(OPCHECK)]
)
def test_opcheck(index, backend):
    """Schema, fake tensors (shapes, strides, dtypes) and dispatch under ahead-of-time tracing."""
    name, args, kwargs = OPCHECK[index]
    if name != "sign_step":
        kwargs = kwargs | {"backend": backend}
    torch.library.opcheck(getattr(raw, name).default, args, kwargs)


def test_pair_uel_of_a_part_of_the_rows(backend):
    operator_parts.uel(backend, torch.float64, 1e-11)


def test_pair_sigmoid_with_positives_elsewhere(backend):
    operator_parts.sigmoid(backend, torch.float64, 1e-12)
