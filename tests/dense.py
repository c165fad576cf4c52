"""The losses written out densely, straight from their papers: the truth, in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clae_fast import available_backends


def unit(x: Tensor, normalize: bool) -> Tensor:
    return F.normalize(x, dim=-1) if normalize else x


def nt_xent(z_i: Tensor, z_j: Tensor, t, normalize: bool = True) -> Tensor:
    z = unit(torch.cat((z_i, z_j)), normalize)
    n = len(z)
    s = (z @ z.T * t).masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(s, torch.arange(n).roll(n // 2), reduction="none")


def info_nce(q: Tensor, k: Tensor, negatives: Tensor | None, t, normalize: bool = True) -> Tensor:
    q, k = unit(q, normalize), unit(k, normalize)
    if negatives is None:
        return F.cross_entropy(q @ k.T * t, torch.arange(len(q)), reduction="none")
    n = unit(negatives, normalize)
    s_neg = (n @ q[:, :, None]).squeeze(-1) if n.dim() == 3 else q @ n.T
    s = torch.cat(((q * k).sum(1, keepdim=True), s_neg), 1) * t
    return F.cross_entropy(s, torch.zeros(len(q), dtype=torch.long), reduction="none")


def clip(x: Tensor, y: Tensor, t, normalize: bool = False) -> Tensor:
    s = unit(x, normalize) @ unit(y, normalize).T * t
    target = torch.arange(len(x))
    rows = (F.cross_entropy(a, target, reduction="none") for a in (s, s.T))
    return torch.stack(tuple(rows), 1)


def uel(z_i, z_j, t, m: float = 1.0, normalize: bool = True, ids=None) -> Tensor:
    z = unit(torch.cat((z_i, z_j)), normalize)
    n = len(z)
    twin = torch.arange(n).roll(n // 2)
    e = (z @ z.detach().T * t).exp()
    negative = ~torch.eye(n, dtype=torch.bool)
    negative[torch.arange(n), twin] = False
    if ids is not None:
        negative &= ids.repeat(2)[:, None] != ids.repeat(2)
    positive = e[torch.arange(n), twin]
    total = positive + m * (e * negative).sum(1)
    p = e / total[:, None]
    log_rest = torch.where(negative, torch.log1p(-torch.where(negative, p, 0.0)), 0.0)
    return -(positive / total).log() - m * log_rest.sum(1)


def backends_with(op: str) -> list[str]:
    """The backends that run this operator on the CPU in any dtype: a row of the table adds one."""
    states = available_backends()[op].items()
    return [name for name, state in states if state == "ok" and name not in ("triton", "cuda")]


def error(out: Tensor, ref: Tensor, floor: float = 0.0) -> float:
    """||out - ref|| / max(||ref||, floor); absolute where both are 0."""
    out, ref = out.detach().double(), ref.detach().double()
    assert out.shape == ref.shape, f"{tuple(out.shape)} != {tuple(ref.shape)}"
    norm = max(float(ref.norm()), floor)
    return float((out - ref).norm() / (norm if norm > 0 else 1))
