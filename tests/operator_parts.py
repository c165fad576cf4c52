"""Operators on a part of the rows, for any backend: what `offset` means."""

import torch
from dense import error

from clae_fast import reference
from clae_fast.ops import raw


def uel(backend, dtype, tolerance):
    """Rows of a stack are what they are in the whole, wherever the part begins."""
    z = torch.nn.functional.normalize(torch.randn(26, 20, dtype=torch.float64), dim=1)
    ids = torch.arange(26, dtype=torch.int32) % 9
    weight = torch.rand(26, dtype=torch.float64)
    for with_ids in (False, True):
        told = {"row_weight": weight, "need_dq": True}
        both = {"row_ids": ids, "col_ids": ids} if with_ids else {}
        loss, dq = reference.pair_uel(z, z, 6.0, 1.5, **told, **both)
        for a, b in ((0, 13), (13, 26), (5, 21), (25, 26), (3, 3)):
            part = {"row_weight": weight[a:b].to(dtype), "need_dq": True, "offset": a}
            if with_ids:
                part |= {"row_ids": ids[a:b], "col_ids": ids}
            x = z.to(dtype)
            got, d = raw.pair_uel(x[a:b], x, 6.0, 1.5, backend=backend, **part)
            assert error(got, loss[a:b], 1e-30) < tolerance
            assert error(d, dq[a:b], 1e-30) < tolerance


def sigmoid(backend, dtype, tolerance):
    """Positives are the columns i + offset; there may be none."""
    N, M = 13, 21
    q, k = (torch.randn(n, 12, dtype=torch.float64).requires_grad_() for n in (N, M))
    weight = torch.rand(N, dtype=torch.float64)
    for offset in (0, 1, 8, 20, 21, -5, -13):
        y = -torch.ones(N, M, dtype=torch.float64)
        for i in range(max(0, -offset), min(N, M - offset)):
            y[i, i + offset] = 1
        pairs = torch.nn.functional.softplus(-y * (q @ k.T * 0.7 - 1), threshold=1e4)
        truth = pairs.sum(1)
        dq, dk = torch.autograd.grad((weight * truth).sum(), (q, k))
        told = {"row_weight": weight.to(dtype), "need_dq": True, "need_dk": True}
        rows = [x.detach().to(dtype) for x in (q, k)]
        got = raw.pair_sigmoid(*rows, 0.7, -1.0, offset=offset, backend=backend, **told)
        for a, b in zip((got[0], got[2], got[3]), (truth, dq, dk), strict=True):
            assert error(a, b) < tolerance
