"""The gradients as formulas: dL/dS = G of each loss (dense), dQ = t G K, dK = t G^T Q.

Every G is of one pattern, a softmax over what a row may meet less its targets, times the weight of
the row. What normalises inside has the Jacobian `dx = (dz - z <z, dz>) / |x|` behind it.
"""

import pytest
import torch
import torch.nn.functional as F

from clae_fast.compat import info_nce, lightly, open_clip, solo, supcontrast
from clae_fast.compat import pytorch_metric_learning as pml

B, D, T = 7, 5, 0.3
EYE = torch.eye(B, dtype=torch.float64)
TWINS = torch.eye(2 * B, dtype=torch.float64).roll(B, 0)
SELF = torch.eye(2 * B, dtype=torch.bool)
LABELS = torch.tensor([0, 0, 1, 1, 1, 2, 3])


@pytest.fixture
def views():
    return [torch.randn(B, D, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def softmax(s, left_out):
    return s.masked_fill(left_out, -torch.inf).softmax(1)


def jacobian(x, dz):
    norm = x.norm(dim=1, keepdim=True)
    z = x / norm
    return (dz - z * (z * dz).sum(1, keepdim=True)) / norm


def same(labels):
    return (labels[:, None] == labels).double().fill_diagonal_(0)


def stacked(z_i, z_j, formula):
    """(dz_i, dz_j) of `z = [z_i; z_j]` as rows and columns, from G as a function of S."""
    x = torch.cat((z_i, z_j)).detach()
    z = F.normalize(x, dim=1)
    G = formula(z @ z.T / T) / (2 * B)
    return jacobian(x, (G + G.T) @ z / T).split(B)


def check(loss, views, *expected):
    loss.backward()
    for x, grad in zip(views, expected, strict=True):
        torch.testing.assert_close(x.grad, grad, rtol=1e-9, atol=1e-12)


def test_nt_xent(views):
    """P - Pi."""
    expected = stacked(*views, lambda s: softmax(s, SELF) - TWINS)
    check(lightly.NTXentLoss(T)(*views), views, *expected)


def test_nt_xent_of_pairs_with_one_positive_each(views):
    """P - Pi once more: with one positive a row, the two denominators are one."""
    labels = torch.arange(B).repeat(2)
    expected = stacked(*views, lambda s: softmax(s, SELF) - TWINS)
    for name in ("NTXentLoss", "SupConLoss"):
        for x in views:
            x.grad = None
        check(getattr(pml, name)(T)(torch.cat(views), labels), views, *expected)


def test_dcl(views):
    """P over the negatives alone, less Pi: the positive is not in the denominator."""
    expected = stacked(*views, lambda s: softmax(s, SELF | TWINS.bool()) - TWINS)
    check(lightly.DCLLoss(T)(*views), views, *expected)


def test_dclw(views):
    """The targets of a pair weigh `2 - B softmax(s / sigma)`, constants."""
    z = [F.normalize(x.detach(), dim=1) for x in views]
    w = 2 - B * ((z[0] * z[1]).sum(1) / 0.4).softmax(0)
    weights = w.repeat(2)[:, None]
    expected = stacked(*views, lambda s: softmax(s, SELF | TWINS.bool()) - weights * TWINS)
    check(lightly.DCLWLoss(T, sigma=0.4)(*views), views, *expected)


def test_sup_con(views):
    """P - Y, Y even over the class; rows without a positive have none of it."""
    labels = LABELS.repeat(2)
    positives = same(labels)
    expected = stacked(
        *views, lambda s: softmax(s, SELF) - positives / positives.sum(1, keepdim=True)
    )
    check(pml.SupConLoss(T)(torch.cat(views), labels), views, *expected)


def test_sup_con_of_rows_without_positives(views):
    """One view: a class of one has weight 0."""
    x = views[0]
    z = x.detach()
    y = same(LABELS)
    there = y.sum(1, keepdim=True) > 0
    s = z @ z.T / T
    P = softmax(s, EYE.bool())
    G = torch.where(there, P - y / y.sum(1, keepdim=True).clamp(min=1), 0.0) / B
    loss = supcontrast.SupConLoss(T, base_temperature=T)(x[:, None], LABELS)
    check(loss, [x], (G + G.T) @ z / T)


def test_nt_xent_of_pytorch_metric_learning(views):
    """Each positive pair on its own: `1 - p` of its own denominator on the negatives."""
    x = views[0]
    z = F.normalize(x.detach(), dim=1)
    s = z @ z.T / T
    negative = LABELS[:, None] != LABELS
    pairs = same(LABELS).nonzero().tolist()
    G = torch.zeros_like(s)
    for a, p in pairs:
        columns = negative[a].clone()
        columns[p] = True
        share = torch.where(columns, s[a], -torch.inf).softmax(0)
        share[p] -= 1
        G[a] += share / len(pairs)
    expected = jacobian(x.detach(), (G + G.T) @ z / T)
    check(pml.NTXentLoss(T)(x, LABELS), [x], expected)


def test_simclr_of_solo_learn(views):
    """P over all but the row itself, less P over its positives: these are summed, not averaged."""
    labels = LABELS.repeat(2)
    expected = stacked(*views, lambda s: softmax(s, SELF) - softmax(s, same(labels) == 0))
    check(solo.simclr_loss_func(torch.cat(views), labels, T), views, *expected)


def test_info_nce(views):
    """Plain: P - I."""
    q, k = (F.normalize(x.detach(), dim=1) for x in views)
    G = ((q @ k.T / T).softmax(1) - EYE) / B
    expected = jacobian(views[0].detach(), G @ k / T), jacobian(views[1].detach(), G.T @ q / T)
    check(info_nce.InfoNCE(T)(*views), views, *expected)


def test_queue(views):
    """P - delta over [own | queue]; the queue is a constant."""
    q, k = (x.detach() for x in views)
    queue = torch.randn(D, 11, dtype=torch.float64)
    s = torch.cat(((q * k).sum(1, keepdim=True), q @ queue), 1) / T
    G = s.softmax(1) / B
    G[:, 0] -= 1 / B
    expected = (G[:, :1] * k + G[:, 1:] @ queue.T) / T, G[:, :1] * q / T
    check(solo.mocov2plus_loss_func(*views, queue, T), views, *expected)


def test_clip(views):
    """(P of rows + P of columns - 2 I) / 2B; dt = sum of G times the products."""
    x, y = (v.detach() for v in views)
    t = torch.tensor(1 / T, dtype=torch.float64, requires_grad=True)
    s = x @ y.T / T
    G = (s.softmax(1) + s.softmax(0) - 2 * EYE) / (2 * B)
    loss = open_clip.ClipLoss()(*views, t)
    check(loss, [*views, t], G @ y / T, G.T @ x / T, (G * (x @ y.T)).sum())


def test_siglip(views):
    """-y sigmoid(-y s) / B, pair by pair; db = its sum."""
    x, y = (v.detach() for v in views)
    t, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1 / T, -1.0))
    sign = 2 * EYE - 1
    G = -sign * torch.sigmoid(-sign * (x @ y.T / T - 1)) / B
    loss = open_clip.SigLipLoss()(*views, t, b)
    expected = G @ y / T, G.T @ x / T, (G * (x @ y.T)).sum(), G.sum()
    check(loss, [*views, t, b], *expected)


def test_targets_handed_in(views):
    """T_i P - Y for any weights Y, here over their sum: a mask that is no mask of classes."""
    x = torch.stack(views, 1)
    mask = torch.rand(B, B, dtype=torch.float64)
    y = mask.repeat(2, 2).masked_fill(SELF, 0.0)
    z = torch.cat([v.detach() for v in views])
    G = (softmax(z @ z.T / T, SELF) - y / y.sum(1, keepdim=True)) / (2 * B)
    expected = ((G + G.T) @ z / T).split(B)
    check(supcontrast.SupConLoss(T, base_temperature=T)(x, mask=mask), views, *expected)
