"""The losses in plain PyTorch, as one would write them today, with the whole matrix and masks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from shapes import BETA, BIAS, SIGMA, TAU_PLUS, Shape
from torch import Tensor

Loss = Callable[..., Tensor]


def dense(shape: Shape, widen: bool = True, device: str = "cpu") -> Loss:
    """The formula of a shape; half precision in float32, but for the products if they are not to be
    widened."""
    t, half = 1 / shape.temperature, shape.dtype in (torch.float16, torch.bfloat16)
    ids = shape.ids(device) if shape.classes else None

    def products(x: Tensor, y: Tensor) -> Tensor:
        s = x @ y.T
        return s.float() if half else s

    made = {**_of_pairs(t, products), **_of_views(t, products, ids)}
    loss = made[shape.kind]
    return (lambda *xs: loss(*(x.float() for x in xs))) if half and widen else loss


def _of_pairs(t: float, products: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Loss]:
    """Queries and keys, or images and texts."""

    def info_nce(q: Tensor, k: Tensor) -> Tensor:
        s = products(F.normalize(q, dim=1), F.normalize(k, dim=1)) * t
        return F.cross_entropy(s, torch.arange(len(q), device=q.device))

    def queue(q: Tensor, k: Tensor, negatives: Tensor) -> Tensor:
        q, k, n = (F.normalize(x, dim=1) for x in (q, k, negatives))
        s = torch.cat(((q * k).sum(1, keepdim=True), products(q, n)), 1) * t
        return F.cross_entropy(s, torch.zeros(len(q), dtype=torch.long, device=q.device))

    def extra(q: Tensor, k: Tensor, negatives: Tensor) -> Tensor:
        return F.cross_entropy(
            products(F.normalize(q, dim=1), F.normalize(torch.cat((k, negatives)), dim=1)) * t,
            torch.arange(len(q), device=q.device),
        )

    def clip(x: Tensor, y: Tensor) -> Tensor:
        s = products(F.normalize(x, dim=1), F.normalize(y, dim=1)) * t
        target = torch.arange(len(x), device=x.device)
        return (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2

    def siglip(x: Tensor, y: Tensor) -> Tensor:
        s = products(F.normalize(x, dim=1), F.normalize(y, dim=1)) * t + BIAS
        sign = 2 * torch.eye(len(x), dtype=s.dtype, device=s.device) - 1
        return -F.logsigmoid(sign * s).sum() / len(x)

    return {
        "info_nce": info_nce,
        "info_nce, queue": queue,
        "info_nce, extra negatives": extra,
        "clip": clip,
        "siglip": siglip,
    }


def _of_views(
    t: float, products: Callable[[Tensor, Tensor], Tensor], ids: Tensor | None
) -> dict[str, Loss]:
    """Two views, one above the other. `ids` (B,): what is known of the samples."""

    def stacked(z_i: Tensor, z_j: Tensor) -> tuple[Tensor, Tensor]:
        """Rows, and where a row meets itself."""
        z = F.normalize(torch.cat((z_i, z_j)), dim=1)
        return z, torch.eye(len(z), dtype=torch.bool, device=z.device)

    def twins(z: Tensor) -> Tensor:
        return torch.arange(len(z), device=z.device).roll(len(z) // 2)

    def nt_xent(z_i: Tensor, z_j: Tensor) -> Tensor:
        z, itself = stacked(z_i, z_j)
        s = (products(z, z) * t).masked_fill(itself, -torch.inf)
        return F.cross_entropy(s, twins(z))

    def without_duplicates(z_i: Tensor, z_j: Tensor) -> Tensor:
        assert ids is not None
        z, itself = stacked(z_i, z_j)
        both = ids.repeat(2)
        duplicates = (both[:, None] == both) & ~itself.roll(len(z_i), 0)
        s = (products(z, z) * t).masked_fill(duplicates, -torch.inf)
        return F.cross_entropy(s, twins(z))

    def uel(z_i: Tensor, z_j: Tensor) -> Tensor:
        z, itself = stacked(z_i, z_j)
        s = (products(z, z.detach()) * t).masked_fill(itself, -torch.inf)
        log_p, rows = F.log_softmax(s, dim=1), torch.arange(len(z), device=z.device)
        columns = twins(z)
        others = torch.log1p(-log_p.exp()).index_put((rows, columns), log_p.new_zeros(()))
        return -(log_p[rows, columns] + others.sum(1)).mean()

    def sup_con(z_i: Tensor, z_j: Tensor) -> Tensor:
        assert ids is not None
        z, itself = stacked(z_i, z_j)
        both = ids.repeat(2)
        positive = (both[:, None] == both) & ~itself
        log_p = (products(z, z) * t).masked_fill(itself, -torch.inf).log_softmax(1)
        return -(log_p.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)).mean()

    def parts(z_i: Tensor, z_j: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S, where it has no negatives, and the positives."""
        z, itself = stacked(z_i, z_j)
        s = products(z, z) * t
        return s, itself | itself.roll(len(z_i), 0), s.diagonal(len(z_i)).repeat(2)

    def dcl(z_i: Tensor, z_j: Tensor) -> Tensor:
        s, own, positive = parts(z_i, z_j)
        return (s.masked_fill(own, -torch.inf).logsumexp(1) - positive).mean()

    def dclw(z_i: Tensor, z_j: Tensor) -> Tensor:
        s, own, positive = parts(z_i, z_j)
        agreement = positive.detach()[: len(z_i)] / (t * SIGMA)
        w = (2 - len(z_i) * agreement.softmax(0)).repeat(2)
        return (s.masked_fill(own, -torch.inf).logsumexp(1) - w * positive).mean()

    def hard_negative(z_i: Tensor, z_j: Tensor) -> Tensor:
        s, own, positive = parts(z_i, z_j)
        count, pos = len(s) - 2, positive.exp()
        negatives = s.exp().masked_fill(own, 0.0)
        importance = (BETA * s).exp().masked_fill(own, 0.0)
        hard = count * (importance * negatives).sum(1) / importance.sum(1)
        rest = (hard - TAU_PLUS * count * pos) / (1 - TAU_PLUS)
        rest = rest.clamp(min=count * math.exp(-t))
        return torch.log1p(rest / pos).mean()

    return {
        "nt_xent": nt_xent,
        "nt_xent, ids": without_duplicates,
        "uel": uel,
        "sup_con": sup_con,
        "dcl": dcl,
        "dcl, weighted": dclw,
        "hard_negative": hard_negative,
    }
