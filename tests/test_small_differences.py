"""Composed losses where a gradient is a small difference of large terms: collapsed batches and
aligned pairs at small temperatures, against plain PyTorch in the same float32."""

import math

import dense
import dense_family as family
import pytest
import test_loss_options
import torch
import torch.nn.functional as F
from dense import backends_with
from test_loss_family import CASES as FAMILY
from test_loss_options import CASES as OPTIONS
from test_loss_options import PAIRS, soft

import clae_fast as cf
from clae_fast.ops import raw

BACKENDS = backends_with("pair_lse")
B, M, D = 64, 24, 32
EPS = torch.finfo(torch.float32).eps
ONE = torch.ones(B)


def as_they_are(loss, rows, queue=False):
    """Rows that are used as they are."""
    told = {"sample_weight": ONE, "normalize": False}
    return (
        lambda x, y, e, tau, **o: loss(x, y, *([e] if queue else []), tau, **told, **o),
        lambda x, y, e, t: rows(x, y, *([e] if queue else []), t),
    )


def family_case(name, rows=None):
    ours, rows = FAMILY[name][0], rows or FAMILY[name][1]
    return (lambda x, y, e, tau, **o: ours(x, y, tau, **o), lambda x, y, e, t: rows(x, y, t))


def nce(q, k, *negatives, **o):
    *negatives, tau = negatives
    return cf.info_nce_loss(q, k, *negatives, temperature=tau, **o)


def log_dcl(z_i, z_j, t, sigma=None, normalize=True, **options):
    """As in `dense_family`, whose exponentials overflow in float32."""
    s, negative, positive = family.stack(z_i, z_j, t, normalize, **options)
    w = 1.0
    if sigma is not None:
        pairs = (dense.unit(z_i, normalize) * dense.unit(z_j, normalize)).sum(1).detach() / sigma
        w = (2 - len(pairs) * pairs.softmax(0)).repeat(2)
    return s.masked_fill(~negative, -torch.inf).logsumexp(1) - w * positive


def log_hard_negative(z_i, z_j, t, beta=1.0, tau_plus=0.1, normalize=True, **options):
    """As in `dense_family`."""
    s, negative, positive = family.stack(z_i, z_j, t, normalize, **options)
    s = s.masked_fill(~negative, -torch.inf)
    log_m = negative.sum(1).to(s.dtype).log()
    harder = ((1 + beta) * s).logsumexp(1) - ((beta * s).logsumexp(1) if beta else log_m)
    left = harder + torch.log1p(-(tau_plus * (positive - harder).exp()).clamp_max(1 - 1e-6))
    log_g = torch.maximum(left - math.log1p(-tau_plus), -torch.as_tensor(t)) + log_m
    return F.softplus(log_g - positive, threshold=1e4)


# name -> (ours, of x, y, negatives and temperature; dense rows, of t = 1 / temperature)
CASES = {
    **{name: family_case(name) for name in FAMILY if "siglip" not in name},
    **OPTIONS,
    "nt_xent-weighted": (
        lambda x, y, e, tau, **o: cf.nt_xent_loss(x, y, temperature=tau, sample_weight=ONE, **o),
        lambda x, y, e, t: dense.nt_xent(x, y, t),
    ),
    "clip-raw": as_they_are(lambda x, y, tau, **o: cf.clip_loss(x, y, 1 / tau, **o), dense.clip),
    "symmetric-raw": as_they_are(lambda *a, **o: nce(*a, symmetric=True, **o), dense.clip),
    "nce-raw": as_they_are(nce, lambda x, y, t: dense.info_nce(x, y, None, t, False)),
    "queue-raw": as_they_are(nce, lambda x, y, e, t: dense.info_nce(x, y, e, t, False), queue=True),
    "constant-queue-raw": as_they_are(
        lambda x, y, e, tau, **o: nce(x, y, e.detach(), tau, **o),
        lambda x, y, e, t: dense.info_nce(x, y, e.detach(), t, False),
        queue=True,
    ),
    "dcl": family_case("dcl", log_dcl),
    "hard": family_case("hard", log_hard_negative),
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_logs(monkeypatch):
    for name, rows in (("dcl", log_dcl), ("hard_negative", log_hard_negative)):
        monkeypatch.setattr(family, name, rows)
    # Targets in float64 would lift plain PyTorch's arithmetic.
    monkeypatch.setattr(test_loss_options, "soft", lambda *shape: soft(*shape).float())
    monkeypatch.setitem(PAIRS, "dcl", (cf.dcl_loss, log_dcl))
    monkeypatch.setitem(PAIRS, "hard", (cf.hard_negative_loss, log_hard_negative))


def test_formulas_in_logs(monkeypatch):
    """They are those of the papers."""
    monkeypatch.undo()
    for x, y, e in (batch("aligned", 1.0, 0), batch("collapsed", 0.3, 1)):
        x, y, e = (v.double() for v in (x, y, e))
        for told in ({}, {"extra": e, "ids": torch.arange(B) // 3}):
            for log, paper, more in (
                (log_dcl, family.dcl, {}),
                (log_dcl, family.dcl, {"sigma": 0.3}),
                (log_hard_negative, family.hard_negative, {}),
                (log_hard_negative, family.hard_negative, {"beta": 0.0}),
                (log_hard_negative, family.hard_negative, {"beta": 0.5, "tau_plus": 0.6}),
            ):
                out, ref = (f(x, y, 6.0, **told, **more) for f in (log, paper))
                assert dense.error(out, ref) < 1e-12


def batch(kind, noise, seed):
    """One direction for all, or a direction for each pair, and noise on it."""
    g = torch.Generator().manual_seed(seed)
    center = torch.randn(1 if kind == "collapsed" else B, D, generator=g, dtype=torch.float64)
    far = center[:1] if kind == "collapsed" else torch.randn(M, D, generator=g).double()
    x, y = (center + noise * torch.randn(B, D, generator=g).double() for _ in range(2))
    e = far + noise * torch.randn(M, D, generator=g).double()
    return [F.normalize(v, dim=1).float() for v in (x, y, e)]


def outcome(loss, xs, tau, dtype):
    """The value, the gradients of the embeddings, and the temperature's."""
    leaves = [x.to(dtype).requires_grad_() for x in xs]
    tau = tau.to(dtype).requires_grad_()
    value = loss(*leaves, tau)
    grads = torch.autograd.grad(value, [*leaves, tau], allow_unused=True)
    return [x.double() for x in (value.detach(), *grads) if x is not None]


def floors(like, name, t):
    """What rounding the terms decides: similarities of t; rows that are float32 sums of unit rows,
    t / B times each; cosines, t^2 times as in the temperature's gradient. A row of soft targets has
    as many terms as their sum."""
    terms = EPS * (float(soft(B, B).sum(1).max()) if "targets" in name else 1.0)
    floor = torch.full_like(like, 3 * t * terms / math.sqrt(B))
    floor[0], floor[-1] = t * terms, t * t * terms
    return floor


def errors(name, kind, noise, t, backend, seeds=4, **more):
    """The largest errors of ours and of plain PyTorch's, result by result."""
    ours, rows = CASES[name]
    tau, worst = torch.tensor(1 / t), []

    def plain(*v):
        return rows(*v[:-1], 1 / v[-1]).mean()

    for seed in range(seeds):
        xs = batch(kind, noise, seed)
        truth = outcome(plain, xs, tau, torch.float64)
        theirs = outcome(plain, xs, tau, torch.float32)
        found = outcome(lambda *v: ours(*v, backend=backend, **more), xs, tau, torch.float32)
        pairs = [
            [float((a - c).norm()), float((b - c).norm())]
            for a, b, c in zip(found, theirs, truth, strict=True)
        ]
        worst.append(torch.tensor(pairs))
    return torch.stack(worst).amax(0).unbind(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("t", [14.3, 90.0])  # with a known maximum and without
@pytest.mark.parametrize("op", ["pair_lse", "pair_mean"])
def test_wide_log_sum_exps(op, t, backend):
    """The weights that `pair_grad` makes of one sum to 1."""
    x, y, _ = batch("collapsed", 1e-2, 0)
    x, y = F.pad(x, (0, 1)), F.pad(y, (0, 1), value=1.0)  # the last element sums the weights
    out = getattr(raw, op)(x, y, t, wide=True, backend=backend)
    lse = out if op == "pair_lse" else out[0]
    assert lse.dtype == torch.float64
    # In exact arithmetic, of the scale that a float32 kernel has.
    exact = float(torch.tensor(t)) * x.double() @ y.double().T
    assert (lse - exact.logsumexp(1)).abs().max() < 2 * t * EPS
    near = lse.float()
    weight = (near - lse).exp().float()
    dq = raw.pair_grad(x, y, t, row_lse=near, row_weight=weight, backend=backend)
    off = (dq[:, -1].double() / t - 1).abs()
    assert off.max() < 6 * EPS
    empty = getattr(raw, op)(x, y[:0], t, wide=True, backend=backend)
    assert ((empty if op == "pair_lse" else empty[0]) == -torch.inf).all()


@pytest.fixture(scope="module")
def one_rank():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield "world"
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["nt_xent-ids", "clip-raw", "dcl", "hard", "sup_con", "queue-raw"])
def test_digits_are_kept_over_a_group(name, backend, one_rank):
    """The sweeps of a group give and take the same."""
    found, theirs = errors(name, "collapsed", 1e-2, 100.0, backend, seeds=2, group=one_rank)
    assert (found <= 5 * theirs + floors(found, name, 100.0)).all(), (found, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("t", [20.0, 100.0])
@pytest.mark.parametrize("noise", [1e-2, 1e-3])
@pytest.mark.parametrize("kind", ["aligned", "collapsed"])
@pytest.mark.parametrize("name", CASES)
def test_digits_are_kept(name, kind, noise, t, backend):
    """Five times the error of plain PyTorch, or what rounding decides."""
    found, theirs = errors(name, kind, noise, t, backend)
    floor = floors(found, name, t)
    assert (found <= 5 * theirs + floor).all(), (found.tolist(), theirs.tolist(), floor.tolist())
