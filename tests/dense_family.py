"""SigLIP, SupCon, DCL and hard negatives written out densely from their papers, in float64."""

import torch
import torch.nn.functional as F
from dense import unit
from torch import Tensor


def sup_con(features: Tensor, labels: Tensor, t, normalize=True, smoothing=0.0, extra=None):
    """Khosla et al., equation 2, its target spread over the allowed columns by smoothing."""
    views = features.shape[1] if features.dim() == 3 else 1
    z = unit(features.flatten(0, -2), normalize)
    y = labels.repeat_interleave(views)
    itself = torch.eye(len(z), dtype=torch.bool)
    columns = z if extra is None else torch.cat((z, unit(extra, normalize)))
    beside = torch.zeros(len(z), len(columns) - len(z), dtype=torch.bool)
    allowed = ~torch.cat((itself, beside), 1)
    positive = torch.cat(((y[:, None] == y) & ~itself, beside), 1)
    s = (z @ columns.T * t).masked_fill(~allowed, -torch.inf)
    log_p = s.log_softmax(1) if s.shape[1] > 1 else torch.zeros_like(s)
    target = positive.double() / positive.sum(1, keepdim=True).clamp(min=1)
    evenly = allowed.double() / allowed.sum(1, keepdim=True).clamp(min=1)
    target = (1 - smoothing) * target + smoothing * evenly
    rows = -torch.where(allowed, log_p, 0.0).mul(target).sum(1)
    return torch.where(positive.any(1), rows, 0.0)


def stack(z_i: Tensor, z_j: Tensor, t, normalize=True, ids=None, extra=None, extra_ids=None):
    """Similarities to all columns, which of them are negatives, and the positive's."""
    B = len(z_i)
    z = unit(torch.cat((z_i, z_j)), normalize)
    same = torch.arange(B) if ids is None else ids
    negative = same.repeat(2)[:, None] != same.repeat(2)
    columns = z
    if extra is not None:
        columns = torch.cat((z, unit(extra, normalize)))
        beside = torch.ones(2 * B, len(extra), dtype=torch.bool)
        if extra_ids is not None:
            beside = ids.repeat(2)[:, None] != extra_ids
        negative = torch.cat((negative, beside), 1)
    s = z @ columns.T * t
    r = torch.arange(2 * B)
    return s, negative, s[r, r.roll(B)]


def dcl(z_i: Tensor, z_j: Tensor, t, sigma=None, normalize=True, **options):
    """Yeh et al., equation 6: no positive in the denominator."""
    s, negative, positive = stack(z_i, z_j, t, normalize, **options)
    w = 1.0
    if sigma is not None:
        pairs = (unit(z_i, normalize) * unit(z_j, normalize)).sum(1).detach() / sigma
        w = (2 - len(pairs) * pairs.softmax(0)).repeat(2)
    some = negative.any(1)
    total = torch.where(negative, s.exp(), 0.0).sum(1)
    rows = -w * positive + torch.where(some, total, 1.0).log()
    return torch.where(some, rows, 0.0)


def hard_negative(z_i, z_j, t, beta=1.0, tau_plus=0.1, normalize=True, **options):
    """Robinson et al., as in their section 4: exponentials, importance weights, clamp."""
    s, negative, positive = stack(z_i, z_j, t, normalize, **options)
    M = negative.sum(1).to(s.dtype)
    neg = torch.where(negative, s.exp(), 0.0)
    imp = torch.where(negative, (beta * s).exp(), 0.0)
    pos = positive.exp()
    some = M > 0
    reweighted = (imp * neg).sum(1) / torch.where(some, imp.sum(1) / M.clamp(min=1), 1.0)
    floor = M * torch.exp(-torch.as_tensor(t, dtype=s.dtype))
    Ng = torch.maximum((reweighted - tau_plus * M * pos) / (1 - tau_plus), floor)
    return torch.where(some, -(pos / (pos + Ng)).log(), 0.0)


def siglip(x: Tensor, y: Tensor, t, bias, ids=None, normalize=False) -> Tensor:
    s = unit(x, normalize) @ unit(y, normalize).T * t + bias
    ids = torch.arange(len(x)) if ids is None else ids
    sign = torch.where(ids[:, None] == ids, 1.0, -1.0).to(s.dtype)
    return -F.logsigmoid(sign * s).sum(1)
