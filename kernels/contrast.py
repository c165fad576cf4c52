"""The contrastive losses from raw embeddings, with the gradients of their sum or mean.

Launches: rows onto the sphere, log-sum-exps, losses and weights, gradient sweeps, rows back. Work
in GEMMs g of all pairs and sweeps of exponentials e (rows.py and the sweeps say who owns what):

    nt_xent             1/2 g / 1/2 e for the sums (1 of each below 4,096 rows), 2 g / 1 e for the
                        gradient
    one_way, dq alone   2 g / 1 e, as pair_mean
    one_way, two_way    1 g / 1 e for the sums (a direction, below 4,096 rows), 2 g / 1 e for each
                        gradient

With rows that are not normalised, or a scale past the known maximum, sums of nt_xent and gradients
that serve rows and columns take one exponential more.

Saved between the launches: the rows in the type of the input, of 16 bits as they are (the lengths
go into the exponents and weights, and products stay exact), and a few numbers a row.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import rows
from ._launch import Pairs, launch, padded
from .pair_grad import Weights, row_gradient
from .pair_lse import row_sums
from .pair_mean import row_means
from .two_sided import both_sums

FORMS = ("nt_xent", "one_way", "two_way")


class _Block(NamedTuple):
    """How many whole rows a program takes, and the power of two that holds their width."""

    BM: int
    BD: int

    @classmethod
    def of(cls, width: int) -> "_Block":
        BD = max(16, triton.next_power_of_2(width))
        return cls(max(1, min(8, 2048 // BD)), BD)


def contrast(
    q: Tensor,
    k: Tensor,
    negatives: Tensor | None,
    scale: float,
    scale_tensor: Tensor | None = None,
    reciprocal: bool = False,
    form: str = "nt_xent",
    normalize: bool = True,
    need_dq: bool = False,
    need_dk: bool = False,
    need_dnegatives: bool = False,
    need_dscale: bool = False,
    reduction: str = "none",
) -> tuple[Tensor, ...]:
    """`reference.contrast`."""
    if form not in FORMS:
        raise ValueError(f"form must be 'nt_xent', 'one_way' or 'two_way', got {form!r}")
    job = _Contrast(q, k, negatives, (scale, scale_tensor, reciprocal), form, normalize)
    need_dnegatives = need_dnegatives and negatives is not None
    gradient = need_dq or need_dk or need_dnegatives or need_dscale
    job.sums(mean=form == "one_way" and (need_dq or need_dscale))
    loss = job.losses()
    factor = 1 / loss.numel() if reduction == "mean" else 1.0
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    grads: tuple[Tensor, ...] = tuple(job.new(0) for _ in range(4))
    if gradient:
        grads = job.gradients(need_dq, need_dk, need_dnegatives, need_dscale, factor)
    return loss, job.lse, job.lse_col, *grads


class _Units(NamedTuple):
    """Rows as the sweeps take them, and by how much they multiply them, if at all."""

    rows: Tensor
    inverse: Tensor | None

    def __getitem__(self, part: Any) -> "_Units":
        return _Units(self.rows[part], None if self.inverse is None else self.inverse[part])


class _Contrast:
    """One call: its operands, and what one launch leaves to the next."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        negatives: Tensor | None,
        scaling: tuple[float, Tensor | None, bool],
        form: str,
        normalize: bool,
    ) -> None:
        dense = [None if x is None else x if x.stride(1) == 1 else x.contiguous()
                 for x in (q, k, negatives)]  # fmt: skip
        self.q, self.k, self.negatives = dense
        self.scaling, self.form, self.normalize = scaling, form, normalize
        self.scale = (float(scaling[0]), scaling[1])
        self.B, self.D = q.shape
        self.block = _Block.of(self.D)
        B = self.B
        self.z = self._units(2 * B)
        self.z_q, self.z_k = self.z[:B], self.z[B:]
        self.cosine = self.new(B)
        alarm = self.new(B)
        self._rows(
            rows.pairs, B, self.q, self.k, self.z_q.rows, self.z_k.rows, self.z_q.inverse,
            self.z_k.inverse, self.cosine, alarm, B, self.q.stride(0), self.k.stride(0),
            self.z.rows.stride(0),
        )  # fmt: skip
        alarms = [alarm]
        self.z_n = self.z_k
        if self.negatives is not None:
            M = len(self.negatives)
            self.z_n, alarm = self._units(M), self.new(M)
            self._rows(
                rows.unit, M, self.negatives, self.z_n.rows, self.z_n.inverse, alarm, M,
                self.negatives.stride(0), self.z_n.rows.stride(0),
            )  # fmt: skip
            alarms.append(alarm)
        # A row with a NaN or Inf is NaN throughout once it is normalised.
        self.alarm = None if normalize else torch.cat(alarms).sum()

    def new(self, *shape: int) -> Tensor:
        return self.q.new_empty(shape, dtype=torch.float32)

    def _units(self, count: int) -> _Units:
        """Place for so many rows, padded as the sweeps want them."""
        width = padded(self.D)
        new = self.q.new_empty if width == self.D else self.q.new_zeros
        keeps = self.normalize and self.q.dtype != torch.float32
        return _Units(new((count, width)), self.new(count) if keeps else None)

    def _rows(self, kernel: Any, count: int, *args: Any, **flags: Any) -> None:
        grid = (triton.cdiv(count, self.block.BM),)
        launch(kernel, grid, *args, self.D, *self.block, self.normalize, **flags)

    # ------------------------------------------------------------------------------- the sums

    def sums(self, mean: bool) -> None:
        """The log-sum-exps; with `mean` also the mean of the keys, from the same sweep."""
        self.lse_col, self.o = self.new(0), None
        two_way = self.form == "two_way"
        if self.form == "nt_xent":
            pairs = self._pairs(self.z, self.z, "twins")
        else:
            skip = "none" if self.negatives is not None else "diagonal"
            pairs = self._pairs(self.z_q, self.z_n, skip)
        if mean:
            self.lse, self.o = row_means(pairs)
        elif self.form != "one_way" and pairs.large:
            self.lse, self.lse_col = both_sums(pairs, symmetric=not two_way)
        else:
            self.lse = self.new(pairs.N)
            row_sums(pairs, self.lse, pairs.ways)
            if two_way:
                self.lse_col = self.new(pairs.M)
                row_sums(pairs.turned(), self.lse_col, pairs.ways)

    def _pairs(
        self, q: _Units, k: _Units, skip: str, offset: int = 0, among: int | None = None
    ) -> Pairs:
        inverse = (q.inverse, k.inverse)
        return Pairs(
            q.rows, k.rows, *self.scaling, skip, offset, unit=self.normalize, inverse=inverse,
            among=among,
        )  # fmt: skip

    def losses(self) -> Tensor:
        """The loss of each row; the weights 1 - p of the positives stay here."""
        if self.form != "two_way":
            loss = torch.empty_like(self.lse)
            self.by_row = self.by_other = self._turn(self.lse, loss, 1)
            return loss
        loss = self.new(self.B, 2)
        self.by_row = self._turn(self.lse, loss, 2)
        self.by_other = self._turn(self.lse_col, loss[:, 1], 2)
        return loss

    def _turn(self, lse: Tensor, loss: Tensor, apart: int) -> Weights:
        N = len(lse)
        weights = Weights(lse, torch.empty_like(lse), torch.empty_like(lse))
        launch(
            rows.turn, (triton.cdiv(N, 128),), lse, self.cosine, self.alarm, loss, *weights[1:],
            *self.scale, N, self.B, apart, self.scaling[2], 128,
        )  # fmt: skip
        return weights

    # -------------------------------------------------------------------------- the gradients

    def _sweep(
        self,
        q: _Units,
        k: _Units,
        skip: str,
        by_row: Weights | None,
        by_col: Weights | None,
    ) -> Tensor:
        return row_gradient(self._pairs(q, k, skip), by_row, by_col, scaled=False)

    def _halves(self, by_row: Weights, *wanted: bool) -> list[Tensor | None]:
        """The sweeps of q and of k among both: one for all where no products depend on how many
        rows there are, so that either half has the same bits without the other."""
        B = self.B
        pairs = self._pairs(self.z, self.z, "twins")
        if all(wanted) and not pairs.wide:
            u = row_gradient(pairs, by_row, by_row, scaled=False)
            return [u[:, :B], u[:, B:]]
        found: list[Tensor | None] = []
        for half in (0, 1):
            part = slice(half * B, (half + 1) * B)
            pairs = self._pairs(self.z[part], self.z, "twins", half * B, 2 * B)
            mine = Weights(*(x[part] for x in by_row))
            found.append(row_gradient(pairs, mine, by_row, scaled=False) if wanted[half] else None)
        return found

    def gradients(
        self, need_dq: bool, need_dk: bool, need_dn: bool, need_dscale: bool, factor: float
    ) -> tuple[Tensor, ...]:
        B, own_q, own_k = self.B, need_dq or need_dscale, need_dk
        by_row, r, r_other, u_k = self.by_row, self.by_row.weight, None, None
        u_q = None if self.o is None else self.o[None]
        if self.form == "nt_xent":
            own_k, r_other = need_dk or need_dscale, r[B:]
            u_q, u_k = self._halves(by_row, own_q, own_k)
        elif self.form == "one_way":
            if own_k and self.negatives is None:
                u_k = self._sweep(self.z_k, self.z_q, "diagonal", None, by_row)
        else:
            by_col, r_other = self.by_other, self.by_other.weight
            if own_q:
                u_q = self._sweep(self.z_q, self.z_k, "diagonal", by_row, by_col)
            if own_k:
                u_k = self._sweep(self.z_k, self.z_q, "diagonal", by_col, by_row)
        dq = self.new(B, self.D) if need_dq else None
        dk = self.new(B, self.D) if need_dk else None
        dscale = self.new(B) if need_dscale else None
        if need_dq or need_dk or need_dscale:
            self._rows(
                rows.back, B, self.q, self.k, self.cosine, u_q, u_k,
                None if self.o is None else r, r, r_other, dq, dk, dscale, factor,
                *self.scale, B, self.q.stride(0), self.k.stride(0), self.z.rows.shape[1],
                *_parts(u_q), *_parts(u_k),
                STACKED=self.form == "nt_xent", RECIPROCAL=self.scaling[2],
            )  # fmt: skip
        return (
            self.new(0) if dq is None else dq,
            self.new(0) if dk is None else dk,
            self._negatives(by_row, factor) if need_dn else self.new(0),
            self.new(0) if dscale is None else dscale.sum().reshape(1),
        )

    def _negatives(self, by_row: Weights, factor: float) -> Tensor:
        assert self.negatives is not None
        M = len(self.negatives)
        u = self._sweep(self.z_n, self.z_q, "none", None, by_row)
        dx = self.new(M, self.D)
        self._rows(
            rows.back_negatives, M, self.negatives, u, dx, factor, *self.scale, M,
            self.negatives.stride(0), u.stride(1), *_parts(u), RECIPROCAL=self.scaling[2],
        )  # fmt: skip
        return dx


def _parts(u: Tensor | None) -> tuple[int, int]:
    """How many there are, and how far apart they lie."""
    return (0, 0) if u is None else (len(u), u.stride(0))
