"""SigLIP, SupCon, DCL and hard negatives against their dense float64 formulas."""

import dense_family as dense
import pytest
import torch
from dense import backends_with, error
from test_losses import TOLERANCE, upstream_for

import clae_fast as cf
from clae_fast.compat.solo import simclr_loss_func

BACKENDS = backends_with("pair_lse")
SIZES = [(1, 3), (2, 5), (3, 1), (7, 40), (127, 17)]
BIAS = -1.5
KINDS = [
    (torch.float64, "mean"), (torch.float64, "none"), (torch.float32, "sum"),
    (torch.bfloat16, "none"),
]  # fmt: skip


def classes(n):
    """Labels with classes of one, of two and of many, of both signs, in no order."""
    return (torch.arange(n) * 7919 % max(n // 3, 1)).pow(2) % 11 - 4


def weights_of(z_i, z_j):
    """A weight_fn with a gradient of its own."""
    return 1 + 0.5 * (z_i * z_j.roll(1, 0)).sum(-1)


def dense_weighted(z_i, z_j, t, normalize=True):
    a, b = dense.unit(z_i, normalize), dense.unit(z_j, normalize)
    s, negative, positive = dense.stack(z_i, z_j, t, normalize)
    w = torch.cat((weights_of(a, b), weights_of(b, a)))
    rows = -w * positive + s.masked_fill(~negative, -torch.inf).logsumexp(1)
    return rows if len(z_i) > 1 else 0 * positive


# name -> (loss of the embeddings, t = 1 / temperature and keywords; its dense rows)
CASES = {
    "sup_con": (
        lambda x, y, tau, **o: cf.sup_con_loss(
            torch.cat((x, y)), classes(2 * len(x)), temperature=tau, **o
        ),
        lambda x, y, t, **o: dense.sup_con(torch.cat((x, y)), classes(2 * len(x)), t, **o),
    ),
    "sup_con-views": (
        lambda x, y, tau, **o: cf.sup_con_loss(
            torch.stack((x, y, y.detach().roll(1, 0)), 1), classes(len(x)), temperature=tau, **o
        ),
        lambda x, y, t, **o: dense.sup_con(
            torch.stack((x, y, y.detach().roll(1, 0)), 1), classes(len(x)), t, **o
        ),
    ),
    "dcl": (lambda x, y, tau, **o: cf.dcl_loss(x, y, temperature=tau, **o), dense.dcl),
    "dclw": (
        lambda x, y, tau, **o: cf.dcl_loss(
            x, y, temperature=tau, weight_fn=cf.negative_mises_fisher_weights(0.3), **o
        ),
        lambda x, y, t, **o: dense.dcl(x, y, t, sigma=0.3, **o),
    ),
    "dcl-own-weights": (
        lambda x, y, tau, **o: cf.dcl_loss(x, y, temperature=tau, weight_fn=weights_of, **o),
        dense_weighted,
    ),
    "hard": (
        lambda x, y, tau, **o: cf.hard_negative_loss(x, y, temperature=tau, **o),
        dense.hard_negative,
    ),
    "hard-clamped": (  # so many false negatives that little is left of any sum
        lambda x, y, tau, **o: cf.hard_negative_loss(
            x, y, temperature=tau, beta=0.5, tau_plus=0.6, **o
        ),
        lambda x, y, t, **o: dense.hard_negative(x, y, t, 0.5, 0.6, **o),
    ),
    "debiased": (
        lambda x, y, tau, **o: cf.hard_negative_loss(x, y, temperature=tau, beta=0.0, **o),
        lambda x, y, t, **o: dense.hard_negative(x, y, t, 0.0, **o),
    ),
    "siglip": (
        lambda x, y, tau, normalize=True, **o: cf.siglip_loss(
            x, y, 1 / tau, BIAS, normalize=normalize, **o
        ),
        lambda x, y, t, normalize=True: dense.siglip(x, y, t, BIAS, None, normalize),
    ),
    "siglip-ids": (
        lambda x, y, tau, normalize=True, **o: cf.siglip_loss(
            x, y, 1 / tau, BIAS, positive_ids=classes(len(x)), normalize=normalize, **o
        ),
        lambda x, y, t, normalize=True: dense.siglip(x, y, t, BIAS, classes(len(x)), normalize),
    ),
}


def inputs(B, D, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, D, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)]


def truth(name, xs, tau, reduction="mean", upstream=None, **options):
    leaves = [x.detach().double().requires_grad_() for x in xs]
    tau = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    rows = CASES[name][1](*leaves, 1 / tau, **options)
    loss = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    weight = torch.ones_like(loss) if upstream is None else upstream.double()
    if not loss.requires_grad:
        return loss, [torch.zeros_like(x) for x in leaves], torch.zeros_like(tau)
    grads = torch.autograd.grad(loss, [*leaves, tau], weight, materialize_grads=True)
    return loss.detach(), grads[:-1], grads[-1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "reduction"), KINDS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name, reduction, dtype, backend):
    loss_tol, grad_tol = TOLERANCE[dtype]
    for B, D in SIZES:
        xs = inputs(B, D, dtype)
        leaves = [x.clone().requires_grad_() for x in xs]
        loss = CASES[name][0](*leaves, 0.4, reduction=reduction, backend=backend)
        weight = upstream_for(loss)
        ref, grads, _ = truth(name, xs, 0.4, reduction, weight)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert error(loss, ref, 1e-2) < loss_tol, (B, D)
        got = torch.autograd.grad(loss, leaves, weight.to(loss.dtype), materialize_grads=True)
        for x, out, g in zip(xs, got, grads, strict=True):
            assert out.dtype == x.dtype
            floor = float(weight.norm() / 0.4 / min(v.abs().min() for v in xs)) if D == 1 else 1e-3
            assert error(out, g, floor) < grad_tol, (B, D)


def test_the_clamp_is_on_and_off():
    """The cases above reach both sides of it."""
    x, y = inputs(127, 17)
    for tau_plus, some, every in ((0.1, False, False), (0.6, True, False)):
        s, negative, positive = dense.stack(x, y, 2.5)
        M = negative.sum(1).double()
        neg = torch.where(negative, s.exp(), 0.0)
        imp = torch.where(negative, (0.5 * s).exp(), 0.0)
        left = (imp * neg).sum(1) / (imp.sum(1) / M) - tau_plus * M * positive.exp()
        active = left / (1 - tau_plus) < M * torch.exp(torch.tensor(-2.5))
        assert (active.any().item(), active.all().item()) == (some, every)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CASES)
def test_learnable_temperature(name, reduction, backend):
    """Alone and in company, in its own shape and dtype."""
    xs = inputs(9, 6)
    for shape, dtype in (((), torch.float64), ((1, 1), torch.float32)):
        for leaves in (xs, [x.clone().requires_grad_() for x in xs]):
            tau = torch.full(shape, 0.3, dtype=dtype, requires_grad=True)
            loss = CASES[name][0](*leaves, tau, reduction=reduction, backend=backend)
            weight = upstream_for(loss)
            _, _, dtau = truth(name, xs, tau.item(), reduction, weight)
            loss.backward(weight)
            assert tau.grad.shape == tau.shape
            assert error(tau.grad.reshape(()), dtau) < (1e-10 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ids", [None, torch.tensor([3, 1, 3, 1, 3, 0], dtype=torch.uint8)])
def test_siglip_bias(ids, reduction, backend):
    x, y = inputs(6, 4)
    bias = torch.tensor([[-0.7]], requires_grad=True)
    exact = torch.tensor(-0.7, dtype=torch.float32).double().requires_grad_()
    weight = torch.linspace(-1, 2, 6, dtype=torch.float64) if reduction == "none" else None
    loss = cf.siglip_loss(x, y, 3.0, bias, positive_ids=ids, reduction=reduction, backend=backend)
    rows = dense.siglip(x, y, 3.0, exact, ids)
    ref = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    assert error(loss, ref) < 1e-12
    loss.backward(weight)
    ref.backward(weight)
    assert bias.grad.shape == (1, 1)
    assert error(bias.grad.reshape(()), exact.grad) < 1e-6


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CASES)
def test_only_what_is_asked_for(name, reduction):
    xs = inputs(8, 5, torch.float32)

    def run(asked):
        leaves = [x.clone().requires_grad_(i in asked) for i, x in enumerate(xs)]
        loss = CASES[name][0](*leaves, 0.2, reduction=reduction)
        loss.backward(upstream_for(loss).to(loss.dtype))
        return [x.grad for x in leaves]

    together = run((0, 1))
    for i in (0, 1):
        alone = run([i])
        assert error(alone[i], together[i]) < 1e-6
        assert alone[1 - i] is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_rows_as_they_are(name, backend):
    xs = [0.5 * x for x in inputs(6, 4)]
    leaves = [x.clone().requires_grad_() for x in xs]
    loss = CASES[name][0](*leaves, 2.0, normalize=False, backend=backend)
    ref, grads, _ = truth(name, xs, 2.0, normalize=False)
    assert error(loss, ref) < 1e-12
    for out, g in zip(torch.autograd.grad(loss, leaves), grads, strict=True):
        assert error(out, g) < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [n for n in CASES if "siglip" not in n])
def test_nothing_to_contrast(name, backend):
    """One pair alone; with its sup_con twin of another class. Loss 0, gradient 0, never NaN."""
    leaves = [x.requires_grad_() for x in inputs(1, 4, torch.float32)]
    if "sup_con" in name:
        loss = cf.sup_con_loss(torch.cat(leaves), torch.tensor([1, 2]), backend=backend)
    else:
        loss = CASES[name][0](*leaves, 0.1, backend=backend)
    assert loss == 0
    grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_bad_numbers_stay_visible(name, normalize, bad, backend):
    for which in (0, 1):
        for fill in (None, 1.0):
            xs = inputs(4, 3, torch.float32)
            if fill is not None:
                xs = [torch.full_like(x, fill) for x in xs]
            xs[which].view(-1)[4] = bad
            loss = CASES[name][0](*xs, 0.5, normalize=normalize, backend=backend)
            assert not torch.isfinite(loss), (which, fill)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "clip", "uel", *CASES])
def test_bad_numbers_of_rows_without_negatives(name, normalize, bad, backend):
    """One pair; all ids equal, extra negatives too; each row of its own class."""
    alone = {
        "nt_xent": cf.nt_xent_loss, "info_nce": cf.info_nce_loss, "uel": cf.uel_loss,
        "clip": lambda x, y, **o: cf.clip_loss(x, y, 2.0, **o),
    }  # fmt: skip
    told = {"normalize": normalize, "backend": backend}
    for which in (0, 1):
        x, y = inputs(1, 4, torch.float32)
        (x, y)[which][0, 1] = bad
        if name in alone:
            loss = alone[name](x, y, **told)
        elif "sup_con" in name:
            loss = cf.sup_con_loss(torch.cat((x, y)), torch.arange(2), **told)
        else:
            loss = CASES[name][0](x, y, 0.5, **told)
        assert not loss.isfinite(), which
    ids, zero = torch.zeros(5, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    equal = {
        "nt_xent": cf.nt_xent_loss, "dcl": cf.dcl_loss, "hard": cf.hard_negative_loss,
        "clip": lambda x, y, **o: cf.clip_loss(x, y, 2.0, **o),
    }  # fmt: skip
    if name in equal:
        for which in range(3):
            rows = [*inputs(5, 4, torch.float32), torch.randn(3, 4)]
            rows[which][1, 2] = bad
            beside = {"extra_negatives": rows[2], "ids": ids, "extra_ids": zero}
            assert not equal[name](*rows[:2], **beside, **told).isfinite(), which


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_zero_vector(name, backend):
    xs = inputs(5, 4)
    for x in xs:
        x[1] = 0
    leaves = [x.clone().requires_grad_() for x in xs]
    loss = CASES[name][0](*leaves, 0.3, backend=backend)
    ref, grads, _ = truth(name, xs, 0.3)
    assert error(loss, ref) < 1e-12
    for x, out, g in zip(xs, torch.autograd.grad(loss, leaves), grads, strict=True):
        zero = (x == 0).all(-1)
        assert (out[zero] == 0).all()
        assert error(out[~zero], g[~zero]) < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("labels", ["all", "none", "pairs"])
@pytest.mark.parametrize("name", ["sup_con", "siglip"])
def test_classes_of_every_size(name, labels, backend):
    """One class of all, each row its own, pairs of distant rows; ids of every integer type."""
    x, y = inputs(40, 6)
    ids = {"all": torch.zeros(40), "none": torch.arange(40), "pairs": torch.arange(40) % 20}[labels]
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        leaf, exact = x.clone().requires_grad_(), x.clone().requires_grad_()
        if name == "sup_con":
            loss = cf.sup_con_loss(leaf, ids.to(dtype), temperature=0.2, backend=backend)
            ref = dense.sup_con(exact, ids, 5.0).mean()
        else:
            loss = cf.siglip_loss(leaf, y, 2.0, -1.0, positive_ids=ids.to(dtype), backend=backend)
            ref = dense.siglip(exact, y, 2.0, -1.0, ids).mean()
        assert error(loss, ref) < 1e-12
        (a,) = torch.autograd.grad(loss, leaf)
        (b,) = torch.autograd.grad(ref, exact) if ref.requires_grad else (torch.zeros_like(x),)
        assert error(a, b) < 1e-11


def test_ids_that_int32_would_confuse():
    x, y = inputs(6, 4)
    ids = torch.tensor([0, 2**32, 2**33, 0, -(2**62), 2**62])
    loss = cf.siglip_loss(x, y, 2.0, -1.0, positive_ids=ids)
    assert error(loss, dense.siglip(x, y, 2.0, -1.0, ids).mean()) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["sup_con-pairs", "sup_con-views", "sup_con-classes", "hard"])
@pytest.mark.parametrize("noise", [1e-3, 0.1])
def test_aligned_pairs(name, noise, backend):
    """The positive stands apart: a pair in its class, and two rows of a larger one."""
    tau = 0.02
    z = torch.randn(64, 32, dtype=torch.float64)
    near = [z + noise * torch.randn_like(z) for _ in range(4)]
    xs = [x.float() for x in (z, *near)]
    run = {
        "sup_con-pairs": (
            lambda a, b, *_, **o: cf.sup_con_loss(
                torch.cat((a, b)), torch.arange(64).repeat(2), temperature=tau, **o
            ),
            lambda a, b, *_: dense.sup_con(torch.cat((a, b)), torch.arange(64).repeat(2), 1 / tau),
        ),
        "sup_con-views": (
            lambda a, b, *_, **o: cf.sup_con_loss(
                torch.stack((a, b), 1), torch.arange(64), temperature=tau, **o
            ),
            lambda a, b, *_: dense.sup_con(torch.stack((a, b), 1), torch.arange(64), 1 / tau),
        ),
        "sup_con-classes": (
            lambda *v, **o: cf.sup_con_loss(
                torch.stack(v, 1), torch.arange(64), temperature=tau, **o
            ),
            lambda *v: dense.sup_con(torch.stack(v, 1), torch.arange(64), 1 / tau),
        ),
        "hard": (
            lambda a, b, *_, **o: cf.hard_negative_loss(a, b, temperature=tau, tau_plus=0.0, **o),
            lambda a, b, *_: dense.hard_negative(a, b, 1 / tau, tau_plus=0.0),
        ),
    }[name]
    exact = [x.double().requires_grad_() for x in xs]
    ref = run[1](*exact).mean()
    leaves = [x.clone().requires_grad_() for x in xs]
    loss = run[0](*leaves, backend=backend)
    assert error(loss, ref) < 1e-5
    grads = torch.autograd.grad(ref, exact, materialize_grads=True)
    got = torch.autograd.grad(loss, leaves, materialize_grads=True)
    plain = torch.autograd.grad(run[1](*leaves).mean(), leaves, materialize_grads=True)
    for out, g in zip(got, grads, strict=True):
        # Of a larger class the sweep sums unit keys, whose differences alone count.
        floor = 1e-2 / tau / 64**0.5 / 4 if name == "sup_con-classes" else 1e-12
        assert error(out, g, floor) < 1e-4
    if name != "sup_con-classes":
        assert max(error(p, g) for p, g in zip(plain[:2], grads[:2], strict=True)) > 0.5 * noise


def test_extremes_of_hard_negatives():
    """In the log domain: scale 300, where exponentials of (1 + beta) s leave every format."""
    x, y = inputs(20, 8, torch.float32)
    got = cf.hard_negative_loss(x, y, temperature=1 / 300, beta=3.0)
    exact = cf.hard_negative_loss(
        x.double(), y.double(), temperature=1 / 300, beta=3.0, backend="reference"
    )
    assert exact.isfinite()
    assert error(got, exact) < 1e-5
    assert (
        error(  # beta = 0, tau_plus = 0
            cf.hard_negative_loss(x, y, beta=0.0, tau_plus=0.0), cf.nt_xent_loss(x, y)
        )
        < 1e-6
    )


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"dclw", "sup_con-views"}))  # constants
def test_differentiable_twice_by_the_reference_alone(name):
    xs = [x.requires_grad_() for x in inputs(4, 3)]
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def loss(x, y, tau):
        return CASES[name][0](x, y, tau, backend="reference")

    assert torch.autograd.gradcheck(loss, (*xs, tau))
    # sup_con sums classes wherever it can; numbers this far apart are no accident
    assert torch.autograd.gradgradcheck(loss, (*xs, tau), atol=1e-5)
    fused = CASES[name][0](*xs, tau, backend=BACKENDS[-1])
    if BACKENDS[-1] == "reference":
        return
    (g,) = torch.autograd.grad(fused, xs[0], create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        g.square().sum().backward()


TWICE = {
    **{name: case[0] for name, case in CASES.items()},
    "nt_xent": lambda x, y, tau: cf.nt_xent_loss(x, y, temperature=tau),
    "info_nce": lambda x, y, tau: cf.info_nce_loss(x, y, temperature=tau),
    "uel": lambda x, y, tau: cf.uel_loss(x, y, temperature=tau),
    "clip": lambda x, y, tau: cf.clip_loss(x, y, tau),
}


@pytest.mark.parametrize("name", TWICE)
def test_backward_twice_over_one_graph(name):
    """Needs `retain_graph=True`, as everywhere, and no other backend."""
    leaves = [x.requires_grad_() for x in inputs(6, 4)]
    leaves.append(torch.tensor(0.5, dtype=torch.float64, requires_grad=True))
    loss = TWICE[name](*leaves)
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in leaves if x.grad is not None]
    loss.backward()
    twice = [x.grad for x in leaves if x.grad is not None]
    assert once
    assert all(torch.equal(b, 2 * a) for a, b in zip(once, twice, strict=True))


@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        ("sup_con", "mean"),
        ("dclw", "none"),
        ("hard", "mean"),
        ("siglip", "mean"),
        ("siglip", "none"),
    ],
)
def test_compiled_in_one_graph(name, reduction):
    xs = inputs(6, 4, torch.float32)

    def run(x, y, tau):
        return CASES[name][0](x, y, tau, reduction=reduction).square().sum()

    def both(fn):
        leaves = [x.clone().requires_grad_() for x in xs]
        tau = torch.tensor(0.3, requires_grad=True)
        loss = fn(*leaves, tau)
        return [loss, *torch.autograd.grad(loss, (*leaves, tau))]

    for a, b in zip(both(torch.compile(run, fullgraph=True)), both(run), strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_value_and_grad(name):
    xs = inputs(8, 5)
    ref, grads, _ = truth(name, xs, 0.2)
    fn = cf.value_and_grad(lambda x, y: CASES[name][0](x, y, 0.2))
    with torch.no_grad():
        loss, got = fn(*xs)
    assert error(loss, ref) < 1e-12
    assert not loss.requires_grad
    assert all(error(a, b) < 1e-11 for a, b in zip(got, grads, strict=True))


def test_value_and_grad_of_what_is_positional():
    x, y = inputs(6, 4)
    labels = torch.tensor([0, 1, 0, 2, 2, 1])
    loss, (dx, none) = cf.value_and_grad(cf.SupConLoss(0.2))(x, labels)
    assert none is None
    leaf = x.clone().requires_grad_()
    ref = dense.sup_con(leaf, labels, 5.0).mean()
    assert error(loss, ref) < 1e-12
    assert error(dx, torch.autograd.grad(ref, leaf)[0]) < 1e-11
    args = (x, y, torch.tensor(3.0), torch.tensor([-1.0]))
    loss, grads = cf.value_and_grad(cf.siglip_loss)(*args)
    leaves = [v.double().requires_grad_() for v in args]
    exact = torch.autograd.grad(dense.siglip(*leaves).mean(), leaves)
    for got, g in zip(grads, exact, strict=True):
        assert error(got, g) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_same_bits_twice(name):
    xs = inputs(33, 24, torch.float32)

    def run():
        leaves = [x.clone().requires_grad_() for x in xs]
        loss = CASES[name][0](*leaves, 0.1)
        return [loss, *torch.autograd.grad(loss, leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_autocast_changes_nothing(name):
    """float32 embeddings are never cast down, on the way there or back."""
    xs = inputs(9, 16, torch.float32)
    for backend in BACKENDS:
        found = []
        for cast in (False, True):
            leaves = [x.clone().requires_grad_() for x in xs]
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                loss = CASES[name][0](*leaves, 0.1, backend=backend)
            found.append((loss, *torch.autograd.grad(loss, leaves)))
        for a, b in zip(*found, strict=True):
            assert error(a, b) < 2e-6


def test_other_layouts():
    """Transposed, sliced and expanded inputs give what their contiguous copies give."""
    x, y = inputs(6, 4)
    for make in (lambda v: v.T.contiguous().T, lambda v: torch.cat((v, v), 1)[:, 2:6]):
        for name, (loss, _) in CASES.items():
            found = []
            for pair in ((make(x), make(y)), (make(x).contiguous(), make(y).contiguous())):
                leaves = [v.detach().requires_grad_() for v in pair]
                value = loss(*leaves, 0.3)
                found.append((value, *torch.autograd.grad(value, leaves)))
            for a, b in zip(*found, strict=True):
                assert error(a, b) < 1e-12, name


def test_chunks_of_other_positives_do_not_matter(monkeypatch):
    x, y = inputs(23, 5)
    ids = torch.arange(23) % 4
    expected = cf.siglip_loss(x, y, 2.0, -1.0, positive_ids=ids, reduction="none")
    for name in ("other_positives", "reference.sweep"):
        monkeypatch.setattr(f"clae_fast.{name}.CHUNK_ELEMENTS", 30)
    for backend in BACKENDS:
        leaves = [v.clone().requires_grad_() for v in (x, y)]
        exact = [v.clone().requires_grad_() for v in (x, y)]
        told = {"positive_ids": ids, "reduction": "none", "backend": backend}
        got = cf.siglip_loss(*leaves, 2.0, -1.0, **told)
        assert error(got, expected) < 1e-13
        grads = torch.autograd.grad(got.square().sum(), leaves)
        ref = torch.autograd.grad(dense.siglip(*exact, 2.0, -1.0, ids).square().sum(), exact)
        assert all(error(a, b) < 1e-12 for a, b in zip(grads, ref, strict=True))


def test_modules_equal_functions():
    x, y, labels = *inputs(6, 4), torch.tensor([0, 1, 0, 2, 2, 1])
    weights = cf.negative_mises_fisher_weights()
    pairs = [
        (cf.SigLipLoss(reduction="none"), (x, y, 3.0, -1.0), {"positive_ids": labels},
         cf.siglip_loss(x, y, 3.0, -1.0, positive_ids=labels, reduction="none")),
        (cf.SupConLoss(0.2, label_smoothing=0.1), (x, labels), {},
         cf.sup_con_loss(x, labels, temperature=0.2, label_smoothing=0.1)),
        (cf.DCLLoss(0.2, weight_fn=weights), (x, y), {"extra_negatives": y},
         cf.dcl_loss(x, y, temperature=0.2, weight_fn=weights, extra_negatives=y)),
        (cf.HardNegativeLoss(0.2, beta=0.5, tau_plus=0.2), (x, y), {"ids": labels},
         cf.hard_negative_loss(x, y, temperature=0.2, beta=0.5, tau_plus=0.2, ids=labels)),
    ]  # fmt: skip
    for module, args, options, expected in pairs:
        assert torch.equal(module(*args, **options), expected), module
    assert "beta=0.5" in repr(pairs[3][0])
    learnt = cf.HardNegativeLoss(torch.nn.Parameter(torch.tensor(0.5)))
    learnt(x, y).backward()
    assert learnt.temperature.grad.abs() > 0


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda x, y: cf.sup_con_loss(x, torch.zeros(3)), TypeError, "labels must be of an int"),
        (lambda x, y: cf.sup_con_loss(x, torch.zeros(3).int()), ValueError, r"labels must be \(4,"),
        (lambda x, y: cf.sup_con_loss(x[0], torch.zeros(3)), ValueError, r"features must be \(N,"),
        (lambda x, y: cf.sup_con_loss(x[:0], torch.zeros(0)), ValueError, "no empty dimension"),
        (lambda x, y: cf.sup_con_loss(x, [1, 2, 3, 4]), TypeError, "labels must be a torch.Tensor"),
        (lambda x, y: cf.dcl_loss(x, y, weight_fn=3), TypeError, "weight_fn must be callable"),
        (lambda x, y: cf.dcl_loss(x, y, weight_fn=lambda a, b: a), ValueError, r"return \(4,\)"),
        (lambda x, y: cf.dcl_loss(x, y, weight_fn=cf.negative_mises_fisher_weights), TypeError,
         r"^weight_fn must map two \(B, D\) to \(B,\), got negative_mises.*\(sigma.*: did you mean "
         r"negative_mises_fisher_weights\(sigma\)\?$"),
        (lambda x, y: cf.DCLLoss(weight_fn=cf.negative_mises_fisher_weights), TypeError, "did you"),
        (lambda x, y: cf.dcl_loss(x, y, weight_fn=lambda p: p), TypeError,
         r"^weight_fn must map two \(B, D\) to \(B,\), got <lambda>\(p\)$"),
        (lambda x, y: cf.dcl_loss(x, y, weight_fn=lambda a, b: len(a, b)), TypeError,
         r"^len\(\) takes exactly one"),  # the function's own
        (lambda x, y: cf.dcl_loss(x, y[:2]), ValueError, r"z_j must be \(4, 3\)"),
        (lambda x, y: cf.negative_mises_fisher_weights(0.0), ValueError, "sigma must be positive"),
        (lambda x, y: cf.hard_negative_loss(x, y, beta=-1.0), ValueError, "beta must be finite"),
        (lambda x, y: cf.hard_negative_loss(x, y, tau_plus=1.0), ValueError, "tau_plus must lie"),
        (lambda x, y: cf.HardNegativeLoss(tau_plus=-0.1), ValueError, "tau_plus must lie in"),
        (lambda x, y: cf.negative_mises_fisher_weights(torch.tensor(0.5)), TypeError,
         "^sigma must be a number, got Tensor$"),
        (lambda x, y: simclr_loss_func(x, torch.arange(4), torch.tensor(0.1)), TypeError,
         "^temperature must be a number, got Tensor$"),
        (lambda x, y: cf.siglip_loss(x, y, 1.0, None), TypeError,
         "^logit_bias must be a number or a one-element tensor, got NoneType$"),
        (lambda x, y: cf.clip_loss(x, y, 1.0, "b"), TypeError,
         "^logit_bias must be None, a number or a one-element tensor, got str$"),
        (lambda x, y: cf.siglip_loss(x, y, 0.0, 1.0), ValueError, "logit_scale must be positive"),
        (lambda x, y: cf.siglip_loss(x, y, 1.0, 0.0, positive_ids=torch.ones(4)), TypeError,
         "positive_ids must be of an integer type, got torch.float32"),
        (lambda x, y: cf.SupConLoss(label_smoothing=1.0), ValueError, "label_smoothing must lie"),
    ],
)  # fmt: skip
def test_wrong_inputs(call, kind, words):
    x, y = inputs(4, 3)
    with pytest.raises(kind, match=words):
        call(x, y)
