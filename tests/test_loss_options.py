"""Sample weights, label smoothing, soft targets, ids and extra negatives, against float64."""

import dense
import dense_family as family
import pytest
import torch
import torch.nn.functional as F
from dense import backends_with, error
from test_loss_family import KINDS
from test_losses import TOLERANCE, upstream_for

import clae_fast as cf

BACKENDS = backends_with("pair_lse")
B, M, D = 9, 5, 6


def rows(s, allowed, target, smoothing):
    """Cross-entropy of each row over the allowed columns, its target spread by smoothing."""
    s = s.masked_fill(~allowed, -torch.inf)
    evenly = allowed.double() / allowed.sum(1, keepdim=True)
    target = (1 - smoothing) * target + smoothing * evenly
    return -(target * torch.where(allowed, s.log_softmax(1), 0.0)).sum(1)


def one_way(q, k, t, *, negatives=None, query_ids=None, key_ids=None, extra=None, extra_ids=None,
            smoothing=0.0, targets=None):  # fmt: skip
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    n = len(q)
    itself = torch.eye(n, dtype=torch.bool)
    if negatives is None:
        columns, target = [k], itself.double()
        allowed = torch.ones_like(itself)
        if query_ids is not None:
            allowed = (query_ids[:, None] != key_ids) | itself
    else:  # the own key, then the queue
        columns, target = [negatives], torch.zeros(n, len(negatives)).double()
        allowed = torch.ones(n, len(negatives), dtype=torch.bool)
        if query_ids is not None:
            allowed = query_ids[:, None] != key_ids
    if extra is not None:
        columns.append(extra)
        beside = torch.ones(n, len(extra), dtype=torch.bool)
        if extra_ids is not None:
            beside = query_ids[:, None] != extra_ids
        allowed = torch.cat((allowed, beside), 1)
        target = torch.cat((target, torch.zeros_like(beside).double()), 1)
    s = q @ F.normalize(torch.cat(columns), dim=1).T * t
    if negatives is not None:
        s = torch.cat(((q * k).sum(1, keepdim=True) * t, s), 1)
        allowed = torch.cat((torch.ones(n, 1, dtype=torch.bool), allowed), 1)
        target = torch.cat((torch.ones(n, 1), target), 1)
    if targets is not None:
        target = F.pad(targets, (0, s.shape[1] - targets.shape[1]))
        evenly = allowed.double() / allowed.sum(1, keepdim=True)
        target = (1 - smoothing) * target + smoothing * evenly
        return (target * (s.logsumexp(1, keepdim=True) - s)).sum(1)
    return rows(s, allowed, target, smoothing)


def two_way(q, k, t, *, ids=None, extra=None, extra_ids=None, smoothing=0.0, targets=None):
    o = {"smoothing": smoothing, "query_ids": ids, "key_ids": ids}
    a = one_way(q, k, t, extra=extra, extra_ids=extra_ids, targets=targets, **o)
    return torch.stack(
        (a, one_way(k, q, t, targets=None if targets is None else targets.T, **o)), 1
    )


def nt_xent(z_i, z_j, t, *, ids=None, extra=None, extra_ids=None, smoothing=0.0):
    n = len(z_i)
    r = torch.arange(2 * n)
    s, allowed, _ = family.stack(z_i, z_j, t, ids=ids, extra=extra, extra_ids=extra_ids)
    allowed[r, r.roll(n)] = True
    target = torch.zeros_like(s)
    target[r, r.roll(n)] = 1
    return rows(s, allowed, target, smoothing)


def embeddings(dtype=torch.float64, n=B, m=M, d=D, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(n, d), (n, d), (m, d)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def some_ids(n, of=4):
    return torch.arange(n) * 5 % 7 % of - 2


def soft(n, m):
    y = torch.arange(n * m, dtype=torch.float64).reshape(n, m).cos()
    return torch.where(y > 0, y, 0.0)  # rows that do not sum to 1


def clip(x, y, temperature, **o):
    return cf.clip_loss(x, y, 1 / temperature, normalize=True, **o)


def symmetric(q, k, temperature, ids=None, **o):
    o |= {} if ids is None else {"query_ids": ids, "key_ids": ids}
    return cf.info_nce_loss(q, k, temperature=temperature, symmetric=True, **o)


PAIRS = {
    "nt_xent": (cf.nt_xent_loss, nt_xent),
    "clip": (clip, two_way),
    "symmetric": (symmetric, two_way),
    "dcl": (cf.dcl_loss, family.dcl),
    "hard": (cf.hard_negative_loss, family.hard_negative),
}
SMOOTH = ("nt_xent", "clip", "symmetric")


def pair_case(name, smoothing=0.0, with_ids=False, with_extra=False, with_extra_ids=False):
    """(loss, dense) of (x, y, extra)."""

    def options(n, m, extra):
        ours, theirs = {}, {}
        if smoothing:
            ours["label_smoothing"] = theirs["smoothing"] = smoothing
        if with_ids:
            ours["ids"] = theirs["ids"] = some_ids(n)
        if with_extra:
            ours["extra_negatives"] = theirs["extra"] = extra
        if with_extra_ids:
            ours["extra_ids"] = theirs["extra_ids"] = some_ids(m) + 1
        return ours, theirs

    return (
        lambda x, y, e, temperature, **o: PAIRS[name][0](
            x, y, temperature=temperature, **options(len(x), len(e), e)[0], **o
        ),
        lambda x, y, e, t: PAIRS[name][1](x, y, t, **options(len(x), len(e), e)[1]),
    )


def nce_case(queue=False, **o):
    """info_nce in one direction; the third embedding is the queue or the extra negatives."""

    def loss(x, y, e, temperature, **more):
        told = {
            name: value(len(x), len(e)) if callable(value) else value for name, value in o.items()
        }
        extra = told.pop("extra", False)
        more |= {"extra_negatives": e.flip(0) if queue else e} if extra else {}
        sparse = told.pop("layout", None)
        if sparse is not None:
            told["targets"] = getattr(told["targets"], sparse)()
        return cf.info_nce_loss(x, y, e if queue else None, temperature=temperature, **told, **more)

    def dense(x, y, e, t):
        told = {
            name: value(len(x), len(e)) if callable(value) else value for name, value in o.items()
        }
        told.pop("layout", None)
        extra = (e.flip(0) if queue else e) if told.pop("extra", False) else None
        told["smoothing"] = told.pop("label_smoothing", 0.0)
        return one_way(x, y, t, negatives=e if queue else None, extra=extra, **told)

    return loss, dense


def sup_con_case(smoothing=0.0, extra=False):
    return (
        lambda x, y, e, temperature, **o: cf.sup_con_loss(
            torch.cat((x, y)), some_ids(2 * len(x)), temperature=temperature,
            label_smoothing=smoothing, extra_negatives=e if extra else None, **o,
        ),
        lambda x, y, e, t: family.sup_con(
            torch.cat((x, y)), some_ids(2 * len(x)), t, smoothing=smoothing,
            extra=e if extra else None,
        ),
    )  # fmt: skip


CASES = {
    **{f"{n}-ids": pair_case(n, with_ids=True) for n in PAIRS},
    **{f"{n}-extra": pair_case(n, with_extra=True) for n in PAIRS},
    **{f"{n}-extra-ids": pair_case(n, 0.0, True, True, True) for n in PAIRS},
    **{f"{n}-smooth": pair_case(n, 0.2) for n in SMOOTH},
    **{f"{n}-all": pair_case(n, 0.2, True, True, True) for n in SMOOTH},
    "sup_con-smooth": sup_con_case(0.2),
    "sup_con-extra": sup_con_case(0.0, True),
    "sup_con-all": sup_con_case(0.2, True),
    # the ids of a query and of its own key may differ
    "nce-ids": nce_case(query_ids=lambda n, m: some_ids(n), key_ids=lambda n, m: some_ids(n, 3)),
    "nce-ids-smooth": nce_case(
        query_ids=lambda n, m: some_ids(n), key_ids=lambda n, m: some_ids(n, 3), extra=True,
        label_smoothing=0.3, extra_ids=lambda n, m: some_ids(m),
    ),
    "queue-ids": nce_case(
        True, query_ids=lambda n, m: some_ids(n), key_ids=lambda n, m: some_ids(m)
    ),
    "queue-ids-smooth": nce_case(
        True, query_ids=lambda n, m: some_ids(n), key_ids=lambda n, m: some_ids(m), extra=True,
        label_smoothing=0.3,
    ),
    "nce-targets": nce_case(targets=lambda n, m: soft(n, n)),
    "nce-targets-all": nce_case(targets=lambda n, m: soft(n, n), label_smoothing=0.2, extra=True),
    "nce-targets-coo": nce_case(targets=lambda n, m: soft(n, n), layout="to_sparse"),
    "nce-targets-csr": nce_case(targets=lambda n, m: soft(n, n), layout="to_sparse_csr"),
    "queue-targets": nce_case(True, targets=lambda n, m: soft(n, 1 + m)),
    "queue-targets-coo": nce_case(True, targets=lambda n, m: soft(n, 1 + m), layout="to_sparse"),
}  # fmt: skip


def two_way_targets(layout, smoothing, extra):
    def loss(x, y, e, temperature, **o):
        y_ = soft(len(x), len(x))
        y_ = y_ if layout is None else getattr(y_, layout)()
        o |= {"extra_negatives": e} if extra else {}
        return clip(x, y, temperature, targets=y_, label_smoothing=smoothing, **o)

    def dense(x, y, e, t):
        targets = soft(len(x), len(x))
        return two_way(x, y, t, targets=targets, smoothing=smoothing, extra=e if extra else None)

    return loss, dense


CASES |= {
    "clip-targets": two_way_targets(None, 0.0, False),
    "clip-targets-all": two_way_targets(None, 0.2, True),
    "clip-targets-csr": two_way_targets("to_sparse_csr", 0.2, False),
}


def truth(name, xs, tau, reduction, upstream):
    leaves = [x.detach().double().requires_grad_() for x in xs]
    tau = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    out = CASES[name][1](*leaves, 1 / tau)
    loss = {"mean": out.mean(), "sum": out.sum(), "none": out}[reduction]
    grads = torch.autograd.grad(loss, [*leaves, tau], upstream.double(), materialize_grads=True)
    return loss.detach(), grads


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "reduction"), KINDS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, reduction, dtype, backend):
    """Value and every gradient: embeddings, extra negatives or queue, temperature."""
    loss_tol, grad_tol = TOLERANCE[dtype]
    for n, m, d in ((1, 2, 3), (2, 1, 5), (B, M, D), (37, 20, 17)):
        xs = embeddings(dtype, n, m, d)
        leaves = [x.clone().requires_grad_() for x in xs]
        tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        loss = CASES[name][0](*leaves, tau, reduction=reduction, backend=backend)
        weight = upstream_for(loss)
        ref, grads = truth(name, xs, 0.5, reduction, weight)
        assert error(loss, ref, 1e-2) < loss_tol, (n, m, d)
        got = torch.autograd.grad(
            loss, [*leaves, tau], weight.to(loss.dtype), materialize_grads=True
        )
        for x, out, g in zip([*xs, tau], got, grads, strict=True):
            assert out.dtype == x.dtype
            # of the temperature, the difference of terms of about 10
            floor, tol = (1e-2, grad_tol) if x.dim() else (1e-1, max(loss_tol, 1e-5))
            assert error(out, g, floor) < tol, (n, m, d)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["nt_xent", "dcl", "hard"])
def test_all_ids_equal(name, backend):
    """Nothing to contrast is left: loss 0, gradient 0, also under smoothing."""
    x, y, _ = embeddings(torch.float32)
    leaf = x.clone().requires_grad_()
    more = {"label_smoothing": 0.1} if name == "nt_xent" else {}
    loss = PAIRS[name][0](
        leaf,
        y,
        temperature=0.1,
        ids=torch.full((B,), 7, dtype=torch.int16),
        backend=backend,
        **more,
    )
    loss.backward()
    assert loss == 0
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extra_negatives_of_length_0_and_no_others(backend):
    x, y, e = embeddings(torch.float32, 1, 0)
    leaves = [v.requires_grad_() for v in (x, y, e)]
    loss = cf.nt_xent_loss(*leaves[:2], extra_negatives=e, backend=backend)
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    assert loss == 0
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["nt_xent", "clip", "symmetric", "dcl", "hard", "sup_con"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sample_weight(name, reduction, backend):
    """`sum(w l) / sum(w)`, with the gradient of the weights; 0/1 weights choose samples."""
    x, y, _ = embeddings()
    w = torch.linspace(0, 3, B).requires_grad_()
    exact = w.detach().double().requires_grad_()
    if name == "sup_con":
        labels = some_ids(B)
        z, e = (torch.stack((x, y), 1).clone().requires_grad_() for _ in range(2))
        loss = cf.sup_con_loss(z, labels, sample_weight=w, reduction=reduction, backend=backend)
        out, each = family.sup_con(e, labels, 1 / 0.07), exact.repeat_interleave(2)
    else:
        z, e = (x.clone().requires_grad_() for _ in range(2))
        loss = PAIRS[name][0](
            z, y, temperature=0.3, sample_weight=w, reduction=reduction, backend=backend
        )
        out = PAIRS[name][1](e, y, 1 / 0.3)
        each = exact[:, None].expand_as(out) if out.dim() == 2 else exact.repeat(len(out) // B)
    total = (each * out).sum()
    ref = {"mean": total / each.sum(), "sum": total, "none": each * out}[reduction]
    weight = upstream_for(ref)
    assert error(loss, ref) < 1e-12
    loss.backward(weight)
    ref.backward(weight)
    assert error(z.grad, e.grad) < 1e-11
    assert error(w.grad, exact.grad) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sample_weight_of_siglip_and_queue(reduction, backend):
    x, y, queue = embeddings()
    keep = torch.tensor([True, False] * 5)[:B]  # a mask is a weight
    o = {"sample_weight": keep, "reduction": reduction, "backend": backend}
    for loss, out in (
        (cf.siglip_loss(x, y, 2.0, -1.0, **o), family.siglip(x, y, 2.0, -1.0)),
        (cf.info_nce_loss(x, y, queue, **o), one_way(x, y, 10.0, negatives=queue)),
    ):
        ref = {"mean": out[keep].mean(), "sum": out[keep].sum(), "none": out * keep}[reduction]
        assert error(loss, ref) < 1e-12


def test_weights_that_are_all_zero():
    x, y, _ = embeddings(torch.float32)
    assert cf.nt_xent_loss(x, y, sample_weight=torch.zeros(B)) == 0
    assert cf.siglip_loss(x, y, 1.0, 0.0, sample_weight=torch.zeros(B)) == 0


def test_one_hot_targets_change_nothing():
    """Not a digit: the second term is exactly 0 for the targets that are there by default."""
    x, y, _ = embeddings(torch.float32)
    eye = torch.eye(B)
    for targets in (eye, eye.to_sparse(), eye.to_sparse_csr()):
        loss = cf.info_nce_loss(x, y, targets=targets, reduction="none")
        assert error(loss, cf.info_nce_loss(x, y, reduction="none")) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["nt_xent-ids", "clip-extra", "queue-ids", "nce-targets"])
def test_aligned_pairs_keep_their_digits(name, backend):
    z = torch.randn(48, 32, dtype=torch.float64)
    xs = [v.float() for v in (z, z + 1e-3 * torch.randn_like(z), torch.randn(20, 32))]
    if name == "nce-targets":
        loss, dense = nce_case(targets=lambda n, m: torch.eye(n, dtype=torch.float64))
    elif "ids" in name:
        ids = torch.arange(48) // 2
        loss, dense = {
            "nt_xent-ids": (
                lambda x, y, e, tau, **o: cf.nt_xent_loss(x, y, temperature=tau, ids=ids, **o),
                lambda x, y, e, t: nt_xent(x, y, t, ids=ids),
            ),
            "queue-ids": nce_case(
                True, query_ids=lambda n, m: ids, key_ids=lambda n, m: torch.arange(m)
            ),
        }[name]
    else:
        loss, dense = CASES[name]
    exact = [v.double().requires_grad_() for v in xs]
    ref = dense(*exact, 50.0).mean()
    leaves = [v.clone().requires_grad_() for v in xs]
    out = loss(*leaves, 0.02, backend=backend)
    assert error(out, ref) < 3e-5
    grads = torch.autograd.grad(ref, exact, materialize_grads=True)
    got = torch.autograd.grad(out, leaves, materialize_grads=True)
    for a, g in zip(got, grads, strict=True):
        assert error(a, g, 1e-12) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["nt_xent-all", "clip-targets-all", "queue-ids-smooth"])
def test_bad_numbers_stay_visible(name, backend):
    for which in range(3):
        for bad in (torch.nan, -torch.inf):
            xs = embeddings(torch.float32)
            xs[which].view(-1)[4] = bad
            assert not CASES[name][0](*xs, 0.5, backend=backend).isfinite(), (which, bad)


@pytest.mark.parametrize(
    "name", ["nt_xent-all", "clip-all", "sup_con-all", "nce-targets-all", "queue-targets-coo"]
)
def test_differentiable_twice_by_the_reference_alone(name):
    xs = [x.requires_grad_() for x in embeddings(n=4, m=3, d=3)]
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def loss(*inputs):
        return CASES[name][0](*inputs, backend="reference")

    assert torch.autograd.gradcheck(loss, (*xs, tau))
    assert torch.autograd.gradgradcheck(loss, (*xs, tau), atol=1e-5)


@pytest.mark.parametrize("name", ["nt_xent-all", "clip-targets-all", "queue-ids-smooth"])
def test_compiled_in_one_graph(name):
    xs = embeddings(torch.float32)

    def both(fn):
        leaves = [x.clone().requires_grad_() for x in xs]
        loss = fn(*leaves, 0.3)
        return [loss, *torch.autograd.grad(loss, leaves)]

    run = CASES[name][0]
    for a, b in zip(both(torch.compile(run, fullgraph=True)), both(run), strict=True):
        assert error(a, b) < 1e-5


def test_constant_queue_takes_one_sweep(monkeypatch):
    """The gradient of a query comes with its loss where the keys need none."""
    from clae_fast.sweeps import Local

    x, y, queue = embeddings()
    monkeypatch.setattr(Local, "grad", None)
    leaf = x.clone().requires_grad_()
    cf.info_nce_loss(leaf, y, queue, sample_weight=torch.ones(B)).backward()
    exact = x.clone().requires_grad_()
    one_way(exact, y, 10.0, negatives=queue).mean().backward()
    assert error(leaf.grad, exact.grad) < 1e-11


def test_value_and_grad_and_modules():
    x, y, e = embeddings()
    ids = some_ids(B)
    options = {"ids": ids, "extra_negatives": e}
    loss, (dx, dy) = cf.value_and_grad(cf.NTXentLoss(0.3, label_smoothing=0.1))(x, y, **options)
    leaves = [v.clone().requires_grad_() for v in (x, y)]
    ref = nt_xent(*leaves, 1 / 0.3, ids=ids, extra=e, smoothing=0.1).mean()
    grads = torch.autograd.grad(ref, leaves)
    assert error(loss, ref) < 1e-12
    assert error(dx, grads[0]) < 1e-11
    assert error(dy, grads[1]) < 1e-11
    bias = torch.tensor([0.5])
    loss, (*_, dbias) = cf.value_and_grad(cf.ClipLoss(label_smoothing=0.1))(
        x, y, torch.tensor(2.0), bias, targets=soft(B, B)
    )
    assert dbias.shape == (1,)
    assert dbias == 0
    direct = cf.clip_loss(x, y, 2.0, label_smoothing=0.1, targets=soft(B, B))
    assert error(loss, direct) < 1e-7
    got = cf.InfoNCELoss(0.3, label_smoothing=0.1)(x, y, e, query_ids=ids, key_ids=some_ids(M))
    dense = one_way(
        x, y, 1 / 0.3, negatives=e, query_ids=ids, key_ids=some_ids(M), smoothing=0.1
    ).mean()
    assert error(got, dense) < 1e-12


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"sample_weight": torch.ones(3)}, ValueError, r"sample_weight must be \(9,\), got \(3,\)"),
        ({"sample_weight": [1.0] * 9}, TypeError, "sample_weight must be a torch.Tensor"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"label_smoothing": "a"}, TypeError, "label_smoothing must be a number"),
        ({"query_ids": torch.zeros(9).long()}, ValueError, "key_ids must be given where query_ids"),
        ({"query_ids": torch.zeros(9), "key_ids": torch.zeros(9)}, TypeError, "integer type"),
        ({"extra_negatives": torch.zeros(2, 5).double()}, ValueError, r"extra_negatives must be"),
        ({"extra_negatives": torch.zeros(2, 6).int()}, TypeError, "extra_negatives must be fl"),
        ({"extra_ids": torch.zeros(2).long()}, ValueError, "extra_ids needs extra_negatives"),
        ({"targets": torch.zeros(9, 8)}, ValueError, r"targets must be \(9, 9\), got \(9, 8\)"),
        ({"targets": torch.zeros(9, 9).long()}, TypeError, "targets must be a float tensor"),
        ({"targets": torch.zeros(9, 9, requires_grad=True)}, ValueError, "detach them"),
        ({"targets": torch.eye(9), "query_ids": torch.zeros(9).int(),
          "key_ids": torch.zeros(9).int()}, ValueError, "exclude each other"),
        ({"negative_keys": torch.zeros(9, 2, 6).double(), "negative_mode": "paired",
          "label_smoothing": 0.1}, ValueError, "paired.*takes none of"),
    ],
)  # fmt: skip
def test_wrong_options(options, kind, words):
    x, y, _ = embeddings()
    with pytest.raises(kind, match=words):
        cf.info_nce_loss(x, y, **options)
    if "ids" not in str(options) and "negative_keys" not in options and "targets" not in options:
        with pytest.raises(kind, match=words):
            cf.nt_xent_loss(x, y, **options)


LOSSES = {
    "nt_xent_loss": cf.nt_xent_loss,
    "info_nce_loss": cf.info_nce_loss,
    "paired": lambda x, y, **o: cf.info_nce_loss(
        x, y, torch.randn(B, 2, x.shape[1]).to(x), negative_mode="paired", **o
    ),
    "clip_loss": lambda x, y, **o: cf.clip_loss(x, y, 1.0, **o),
    "sup_con_loss": lambda x, y, **o: cf.sup_con_loss(x, torch.arange(B), **o),
    "NTXentLoss": lambda x, y, **o: cf.NTXentLoss(**o)(x, y),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [False, None, "", (), torch.zeros(())], ids=repr)
def test_smoothing_that_is_false_and_no_number(name, value):
    x, y, _ = embeddings()
    got = type(value).__name__
    with pytest.raises(TypeError, match=f"^label_smoothing must be a number, got {got}$"):
        LOSSES[name](x, y, label_smoothing=value)


@pytest.mark.parametrize("backend", backends_with("pair_uel"))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("given", [("ids",), ("sample_weight",), ("ids", "sample_weight")])
def test_uel(given, reduction, backend):
    """Rows of equal ids are told from each other no more; weights of the pairs."""
    options = {"ids": torch.tensor([3, 3, 1, 4, 4, 4, 0, 1, 9]), "sample_weight": torch.rand(B)}
    options = {name: options[name] for name in given}
    leaves = [torch.randn(B, D).requires_grad_() for _ in range(2)]
    t = torch.tensor(0.3).requires_grad_()
    loss = cf.uel_loss(*leaves, temperature=t, reduction=reduction, backend=backend, **options)
    exact = [x.detach().double().requires_grad_() for x in (*leaves, t)]
    expected = dense.uel(*exact[:2], 1 / exact[2], ids=options.get("ids"))
    w = options.get("sample_weight", torch.ones(B)).double().repeat(2)
    expected = expected * w
    if reduction != "none":
        expected = expected.sum() / (w.sum() if reduction == "mean" else 1)
    up = upstream_for(expected)
    (loss * up).sum().backward()
    (expected * up).sum().backward()
    assert error(loss, expected) < 2e-6
    for leaf, reference in zip((*leaves, t), exact, strict=True):
        assert error(leaf.grad, reference.grad) < 5e-6


@pytest.mark.parametrize("loss", [cf.nt_xent_loss, cf.uel_loss, cf.dcl_loss, cf.info_nce_loss])
def test_weights_that_sum_to_nothing(loss):
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    value = loss(x, y, sample_weight=torch.zeros(4))
    value.backward()
    assert value == 0
    assert (x.grad == 0).all()


@pytest.mark.parametrize("backward_inside", [False, True])
def test_gradients_under_autocast(backward_inside):
    """In float32, also where the backward runs inside autocast."""
    x, y, target = torch.randn(32, 16), torch.randn(32, 16), torch.rand(32, 32)
    ids = torch.arange(32) // 2
    for loss in (
        lambda a, b: cf.clip_loss(a, b, 5.0, normalize=True, targets=target),
        lambda a, b: cf.clip_loss(a, b, 5.0, normalize=True, targets=target.to_sparse()),
        lambda a, b: cf.siglip_loss(a, b, 5.0, -5.0, normalize=True, positive_ids=ids),
        lambda a, b: cf.nt_xent_loss(a, b, ids=ids, label_smoothing=0.1),
    ):
        expected = cf.value_and_grad(loss)(x, y)[1]
        with torch.autocast("cpu", torch.bfloat16):
            if backward_inside:
                got = cf.value_and_grad(loss)(x, y)[1]
            else:
                leaves = [v.clone().requires_grad_() for v in (x, y)]
                value = loss(*leaves)
        if not backward_inside:
            got = torch.autograd.grad(value, leaves)
        for a, b in zip(got, expected, strict=True):
            assert error(a, b) < 1e-6
