"""What a batch of pairs looks like on the sphere."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import validation as check
from .backends import requested
from .composite import Pairs
from .numerics import Unit, as_given, compute_dtype, cosine, full_precision, unit_rows, wide
from .reference.sweep import by_rows
from .sweeps import Where


class PairStats(NamedTuple):
    """Each a 0-dim tensor without gradient."""

    top1: Tensor  # mean of the two directions
    top1_i: Tensor  # how often the nearest of z_j to a row of z_i is its own
    top1_j: Tensor  # and the other way round
    positive_similarity: Tensor
    negative_similarity: Tensor
    alignment: Tensor
    uniformity: Tensor


@torch.no_grad()
def pair_stats(
    z_i: Tensor, z_j: Tensor, *, normalize: bool = True, backend: str | None = None
) -> PairStats:
    r"""Retrieval accuracy, similarities, alignment and uniformity of a batch of pairs.

        top1_i               share of rows i with <z_i, z_j'> largest at its own j' (a tie at the
                             top is a miss)
        positive_similarity  mean of <z_i, z_j> over the pairs
        negative_similarity  mean over all other pairs of a row of z_i and one of z_j
        alignment            mean of |z_i - z_j|^2 over the pairs
        uniformity           log of the mean of e^{-2 |x - y|^2} over all x, y of one view, x != y:
                             the mean of the two views'

    Without gradient. Memory grows as B x D: the rows meet the columns a few at a time.

    Args:
        z_i: (B, D) embeddings of the first views.
        z_j: (B, D) embeddings of the second views, same dtype and device.
        normalize: divide each row by its L2 norm first.
        backend: None, or as in `use_backend`: for the log-sum-exp of uniformity, which takes
            float64 for rows that are not normalised (another backend than "triton" then).

    Returns:
        PairStats, a named tuple of 0-dim tensors. With one pair there are no negatives:
        `negative_similarity` and `uniformity` are NaN.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what was expected.

    Source: Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and
    Uniformity on the Hypersphere", ICML 2020, section 4.1, with alpha = 2 and t = 2.

    Example:
        >>> z = torch.randn(8, 16)
        >>> stats = pair_stats(z, z)
        >>> float(stats.top1), float(stats.alignment)
        (1.0, 0.0)
    """
    check.embeddings("z_i", z_i, "z_j", z_j)
    check.flag("normalize", normalize)
    return _stats(z_i, z_j, normalize, Where(requested(backend)))


@full_precision
def _stats(z_i: Tensor, z_j: Tensor, normalize: bool, where: Where) -> PairStats:
    dtype = compute_dtype(z_i.dtype)
    u_i, u_j = ((unit_rows if normalize else as_given)(x.to(dtype)) for x in (z_i, z_j))
    q, k, B = u_i.z, u_j.z, len(z_i)
    positive = cosine(u_i, u_j)
    # The sum over all pairs is the product of two sums.
    whole = (q.double().sum(0) * k.double().sum(0)).sum() - positive.double().sum()
    hits_i, hits_j = _nearest_is_own(u_i, u_j), _nearest_is_own(u_j, u_i)
    return PairStats(
        (hits_i + hits_j) / 2,
        hits_i,
        hits_j,
        positive.mean(),
        (whole / (B * (B - 1))).to(dtype) if B > 1 else positive.new_full((), torch.nan),
        (q - k).square().sum(-1).mean(),
        ((_uniformity(q, normalize, where) + _uniformity(k, normalize, where)) / 2).to(dtype),
    )


def _nearest_is_own(u: Unit, v: Unit) -> Tensor:
    """The share of rows whose own column is above all others.

    `<q, k_j>` less `<q, m>`, one for all j: `<q - m, k_j - m> + <m, k_j - m>` with the mean m. On
    the sphere the last is `-|k_j - m|^2 / 2` and a constant, so that nothing is left of the 1
    that all similarities of a collapsed batch are near, nor of what rounding did to a row's length.
    """
    m = wide(v.z).mean(0).to(v.z.dtype)
    q, k, middle = u.z - m, v.z - m, wide(m)
    far = wide(k)
    constant = (1 - middle.square().sum()) / 2
    level = torch.where(
        v.on_sphere.squeeze(-1), -0.5 * far.square().sum(-1), far @ middle - constant
    ).to(k.dtype)

    def rows(a: int, b: int) -> tuple[Tensor, ...]:
        s = (q[a:b] @ k.mT).add_(level)
        own = torch.arange(a, b, device=q.device)[:, None]
        mine = s.gather(1, own)
        return ((s.scatter(1, own, -torch.inf) < mine).all(1),)

    return by_rows(rows, len(q), len(k))[0].to(q.dtype).mean()


def _uniformity(z: Tensor, on_sphere: bool, where: Where) -> Tensor:
    """`log mean e^(-2 |x - y|^2)`: a log-sum-exp of `4 (<x, y> - |x|^2 / 2 - |y|^2 / 2)`."""
    B = len(z)
    if B == 1:
        return z.new_full((), torch.nan)
    if not on_sphere:  # the three terms may be large beside the distances
        z = wide(z)
        z = z - z.mean(0)
        where = where if where.backend != "triton" else Where("auto")  # it knows no float64
    half = -0.5 * z.square().sum(-1, keepdim=True)
    one = torch.ones_like(half)
    rows, columns = torch.cat((z, half, one), 1), torch.cat((z, one, half), 1)
    lse = Pairs(where, 4.0).lse(rows, columns, skip="diagonal")
    return lse.logsumexp(0) - math.log(B * (B - 1))
